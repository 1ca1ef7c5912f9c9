"""Every error that this toolkit raises on purpose, and the one voice they speak in.

    FlagScaleError              exit code 1: the work failed
    ├── UserError               exit code 2: what was typed or written cannot be right; nothing was started
    │   └── ConfigError         all faults of one configuration, at once
    ├── LaunchError             a job could not be started, or died while starting
    ├── RunError                a run cannot be stopped or followed as asked
    │   └── UnknownRunError     exit code 2: what was typed means no run
    ├── SourceError             a backend's source cannot be fetched, or is not what its pin says
    ├── PatchError              a patch does not fit, or a tree holds edits that would be lost
    └── HookError               a hook did not take: the backend is not the version it was written for

The command line prints `str(error)` and no traceback for all of them; any other exception is our own mistake and keeps
its traceback.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


class FlagScaleError(Exception):
    """The work failed; the message says what, where, and what to do."""

    exit_code = 1


class UserError(FlagScaleError):
    """What was typed or written cannot be right; nothing was started."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a configuration.

    `path` is dotted (`experiment.runner.nnodes`), `where` names a file and line or an override.
    """

    path: str
    message: str
    expected: str | None = None
    suggestion: str | None = None
    where: str | None = None

    def at(self, where: str | None) -> "Fault":
        return replace(self, where=where)

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        if self.expected:
            text += f"; expected {self.expected}"
        if self.suggestion:
            text += f"; did you mean `{self.suggestion}`?"
        return f"{self.where}: {text}" if self.where else text


class ConfigError(UserError):
    """All faults of one configuration."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "" if count == 1 else f"{count} faults in the configuration:\n"
        super().__init__(head + "\n".join(f"  {fault}" if count > 1 else str(fault) for fault in self.faults))


class LaunchError(FlagScaleError):
    """A job could not be started, or died while starting."""


class RunError(FlagScaleError):
    """A run cannot be stopped or followed as asked."""


class UnknownRunError(RunError, UserError):
    """What was typed means no run, or several."""


class SourceError(FlagScaleError):
    """A backend's source cannot be fetched, or is not what its pin says."""


class PatchError(FlagScaleError):
    """A patch does not fit, or a tree holds edits that would be lost; the tree is as it was."""


class HookError(FlagScaleError):
    """A hook did not take: the backend is not the version it was written for."""


def find_nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was most likely meant to be, or None where nothing is near."""
    import difflib

    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return near[0] if near else None
