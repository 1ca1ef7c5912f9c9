"""What a server is told when it starts, and the checks that need no model."""

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import UserError
from flagscale.inference.engine.config import EngineConfig

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """One server.

    names: the model's names in requests; the first is the one that answers bear
    port: 0 takes a free one
    keys: any of them is accepted as a bearer token; empty: no token is asked for
    drain_s: seconds that running requests have once the server was told to end
    max_body_bytes: larger requests are refused unread

    Raises:
        UserError: the server would be open to other machines without a key.
    """

    model: Path
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    drain_s: float = 30.0
    max_body_bytes: int = 32 * 2**20
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host}: a server that other machines reach needs a key; "
                "expected --api-key-env or --api-key-file, or a loopback address"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`; a name that is not `localhost` is not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_bytes(text: str) -> int:
    """A number of bytes: `1000`, `512M`, `2GiB`, in powers of 1024.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"{text}: not a number of bytes; expected one as `2GiB`, `512M` or `1000000`")
    return int(float(match[1]) * UNITS[match[2].upper()])


def load_keys(variable: str | None, file: Path | None) -> tuple[str, ...]:
    """The keys in an environment variable and in the lines of a file.

    Raises:
        UserError: a source is named and holds no key.
    """
    keys: list[str] = []
    if variable is not None:
        value = os.environ.get(variable, "").strip()
        if not value:
            raise UserError(f"--api-key-env {variable}: the environment has no such variable, or it is empty")
        keys.append(value)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: cannot be read: {error}") from None
        if not any(lines):
            raise UserError(f"--api-key-file {file}: holds no key; expected one in a line")
        keys.extend(filter(None, lines))
    return tuple(keys)
