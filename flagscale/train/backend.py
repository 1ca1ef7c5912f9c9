"""Megatron made ready in this process: found, of the right version, and its arguments read.

Megatron answers a wrong argument with a usage text of a thousand lines or with a bare `assert`. Both are turned into
one sentence here, because they are what a user typed and no fault of a program.
"""

import contextlib
import importlib.util
import io
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flagscale.chips import Chip, find_chip
from flagscale.env import CHIP
from flagscale.errors import SourceError, UserError, find_nearest
from flagscale.hooks.hook import Hook, install_hooks

DEFAULT_CHIP = "NVIDIA"
SUPPORTED = ">=0.19.2,<0.20"
"""The versions of Megatron whose `pretrain` and builders are called as `train_gpt.py` calls them."""
NOISE = ("Transformer Engine and Apex are not installed", "absl.logging is not installed")
"""Beginnings of warnings that Megatron gives once for each rank and that ask nothing of the user."""


def chip_of_this_job() -> Chip:
    """The record that the launcher named in FLAGSCALE_CHIP; a process that nobody launched is on NVIDIA's.

    Raises:
        UserError: no chip is called so.
    """
    name = os.environ.get(CHIP, DEFAULT_CHIP)
    chip = find_chip(name)
    if chip is None:
        from flagscale.chips import CHIPS

        near = find_nearest(name, [word for known in CHIPS for word in (known.name, *known.aliases)])
        hint = f"; did you mean `{near}`?" if near else ""
        raise UserError(f"{CHIP}={name}: no such chip; there are {', '.join(known.name for known in CHIPS)}{hint}")
    return chip


def megatron_version() -> str:
    """The version of the Megatron that `import megatron` would find, read from its file: an import needs hooks first.

    Raises:
        SourceError: there is none on the path, or one without `megatron.training`.
    """
    found = importlib.util.find_spec("megatron")
    for folder in (found.submodule_search_locations or ()) if found else ():
        info = Path(folder) / "core" / "package_info.py"
        if info.is_file() and (Path(folder) / "training" / "__init__.py").is_file():
            numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", info.read_text(), re.MULTILINE))
            return ".".join(numbers.get(part, "0") for part in ("MAJOR", "MINOR", "PATCH"))
    raise SourceError("no Megatron-LM on the Python path: get it with `flagscale source fetch megatron`")


def _check_packages() -> None:
    """Megatron does not declare psutil: without it the first checkpoint's writer dies and the job waits for ever."""
    missing = [name for name in ("numpy", "packaging", "psutil", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"training with Megatron-LM needs {', '.join(missing)}: "
            f"`{sys.executable} -m pip install {' '.join(missing)}`"
        )


def start_megatron(hooks: Iterable[Hook] = ()) -> str:
    """Check what Megatron needs, install the hooks, and return Megatron's version.

    Raises:
        SourceError: Megatron is not there, or is of another version than this toolkit drives.
        UserError: a package is missing, or the launcher named a chip that nobody knows.
        HookError: a hook did not take.
    """
    os.environ["NO_VCS_VERSION"] = "1"  # else Megatron runs git, and takes the commit of whatever repository it lies in
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    chip_of_this_job()
    version = megatron_version()
    _check_packages()
    from packaging.specifiers import SpecifierSet

    if version not in SpecifierSet(SUPPORTED):
        raise SourceError(f"Megatron-LM {version} is on the Python path; expected {SUPPORTED}")
    install_hooks(hooks, version)
    return version


@contextlib.contextmanager
def _arguments(argv: Sequence[str]) -> Iterator[None]:
    """`sys.argv` for the while: Megatron's parser reads no other list."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


def parse_arguments(argv: Sequence[str]) -> Any:
    """Megatron's namespace for `argv`, not validated; world size and rank are those of the environment.

    Raises:
        UserError: an argument is unknown or has a value of the wrong kind; `--help` still exits.
    """
    from megatron.training.arguments import parse_args

    said = io.StringIO()
    try:
        with _arguments(argv), contextlib.redirect_stderr(said):
            return parse_args()
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UserError(said.getvalue().rpartition("error: ")[2].strip() or "Megatron's parser refused") from None


def _explain(error: Exception) -> str:
    """What Megatron meant: the message, else the statement that failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip()
    if not text or isinstance(error, KeyError):
        statement = linecache.getline(frame.filename, frame.lineno or 0).strip().rstrip("\\").strip()
        text = f"`{statement}` does not hold" if isinstance(error, AssertionError) else f"{error!r} in `{statement}`"
    return f"{text} (Megatron, {Path(frame.filename).name}:{frame.lineno})"


def validate_arguments(args: Any) -> None:
    """Let Megatron check the namespace and fill in what follows from it.

    Raises:
        UserError: Megatron does not accept the combination.
    """
    from megatron.training.arguments import validate_args

    try:
        validate_args(args, {})
    except Exception as error:  # whatever Megatron raises on an argument is about the argument
        raise UserError(_explain(error)) from error
    for unit in ("iters", "samples"):
        _check_warmup(args, unit)


def _check_warmup(args: Any, unit: str) -> None:
    """What Megatron would find only after the model is built: a warm-up that is not over when the decay is."""
    warmup = getattr(args, f"lr_warmup_{unit}")
    end = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if warmup and end and warmup >= end:
        raise UserError(
            f"--lr-warmup-{unit} {warmup} is not less than {end}, after which the learning rate has decayed "
            f"(--lr-decay-{unit}, else --train-{unit})"
        )


def check_transformer_config(args: Any) -> None:
    """Make the transformer's configuration, which checks what belongs together in a layer.

    Raises:
        UserError: Megatron does not accept the combination.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    try:
        core_transformer_config_from_args(args)
    except Exception as error:  # as above
        raise UserError(_explain(error)) from error
