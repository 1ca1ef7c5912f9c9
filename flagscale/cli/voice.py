"""How the command line speaks: errors on stderr in one shape, exit codes, and no traceback for what a user did."""

import errno
import os
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


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
