"""How the command line speaks: errors on stderr in one shape, exit codes, and no traceback for what a user did."""

import errno
import os
import re
import sys
from collections.abc import Callable

from flagscale.errors import FlagScaleError

INTERRUPTED = 130


def guard(work: Callable[[], int]) -> int:
    """The exit code of `work`; an error that we raise on purpose becomes its message and its code."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except FlagScaleError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        extra = _find_extra(error.name or "")
        if extra is None:
            raise
        complain(f"this needs the package {error.name}, which is not installed: `pip install 'flagscale[{extra}]'`")
        return 2
    except BrokenPipeError:
        # whoever read our output has left: nothing more can be said on stdout, at exit neither
        _discard_output()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard_output()
        complain(f"cannot write{f' {error.filename}' if error.filename else ' the output'}: {error.strerror}")
        return 1


def _find_extra(module: str) -> str | None:
    """The optional part of this toolkit (`[project.optional-dependencies]`) whose package a module is."""
    from importlib.metadata import PackageNotFoundError, requires

    name = module.partition(".")[0].replace("_", "[-_]")
    try:
        found = [re.match(rf"{name}\b(?![-_.]).*extra == ['\"]([\w-]+)", each) for each in requires("flagscale") or ()]
    except PackageNotFoundError:
        return None
    return next((match[1] for match in found if match), None)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
