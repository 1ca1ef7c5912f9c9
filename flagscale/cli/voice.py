"""How the command line speaks: errors on stderr in one shape, exit codes, and no traceback for what a user did."""

import os
import sys
from collections.abc import Callable

from flagscale.errors import FlagScaleError

INTERRUPTED = 130


def guard(work: Callable[[], int]) -> int:
    """The exit code of `work`; an error that we raise on purpose becomes its message and its code."""
    try:
        return work()
    except FlagScaleError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has left: nothing more can be said on stdout, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
