"""`python -m flagscale.serve.router FILE`: a router of its own, without the rest of the toolkit.

FILE is JSON, `-` is standard input (so that keys need not be written anywhere):

    {"settings": {"port": 8000, "policy": "prefix_aware"},
     "replicas": [{"id": "r0", "url": "http://127.0.0.1:8001", "model": "tiny"}]}
"""

import logging
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from flagscale.errors import ConfigError, Fault, FlagScaleError, UserError
from flagscale.serve.router.pool import Pool, Replica
from flagscale.serve.router.server import run_router
from flagscale.serve.router.settings import Handover, Role, RouterSettings


class ReplicaEntry(BaseModel):
    """A replica in the file; the fields are `Replica`'s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    url: str
    model: str
    api_key: SecretStr | None = None
    weight: float = 1.0
    version: str = ""
    role: Role = "whole"
    handover: Handover | None = None
    kv_address: str = ""


class RouterFile(BaseModel):
    """What the file has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: RouterSettings = RouterSettings()
    replicas: tuple[ReplicaEntry, ...]


def load_router(text: str, name: str) -> tuple[Pool, RouterSettings]:
    """The pool and settings that a file's text describes. Raises UserError with all faults; no value is repeated."""
    try:
        file = RouterFile.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            [
                Fault(".".join(map(str, it["loc"])), it["msg"].removeprefix("Value error, "), where=name)
                for it in error.errors(include_input=False, include_url=False)
            ]
        ) from None
    pool = Pool(file.settings)
    for it in file.replicas:
        pool.add(Replica(**{name: getattr(it, name) for name in ReplicaEntry.model_fields}))
    return pool, file.settings


def main(words: list[str]) -> int:
    """The exit code: 0 after an orderly end."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        if len(words) != 1 or words[0].startswith("--"):
            raise UserError("usage: python -m flagscale.serve.router FILE, or - for standard input")
        try:
            text = sys.stdin.read() if words[0] == "-" else Path(words[0]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{words[0]}: {getattr(error, 'strerror', None) or 'not text'}") from None
        run_router(*load_router(text, words[0]))
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
