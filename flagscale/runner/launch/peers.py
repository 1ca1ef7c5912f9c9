"""What the agents of one run tell each other, through the run's folder alone: standard library, part of the archive.

One file, `ending.json`, is written by whoever ends the run first: an agent whose job failed, a `stop`, a launcher that
gives up. Every agent looks for it and ends its own part. Only one can create it, so the first one stays and names the
cause. And each agent watches the heartbeat of one neighbour, the next host of the list: a host that vanished without a
word is missed by exactly one other, and the cost grows with the hosts and not with their square.

The trade-off: it needs a folder that all hosts see, and on a network's file system a new file may take some seconds to
be seen; in return it needs no connection between hosts and no living launcher.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from flagscale.runner.launch.journal import Spec
from flagscale.runner.launch.procs import is_same_alive

SILENCE_BEATS = 12
"""A neighbour whose heartbeat stands still for so many of them is gone: a minute at 5 s each."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Why a run is being ended. `label` is the host that says so, empty for a person or a launcher."""

    label: str
    reason: str
    is_forced: bool = False

    @property
    def text(self) -> str:
        return f"ended because of {self.label}: {self.reason}" if self.label else self.reason


def write_notice(path: Path, notice: Notice) -> bool:
    """Returns whether it is the first; a forced one replaces an earlier one that is not, under its reason."""
    earlier = load_notice(path)
    if earlier is not None and (earlier.is_forced or not notice.is_forced):
        return False
    kept = earlier or notice
    row = {"label": kept.label, "reason": kept.reason, "is_forced": notice.is_forced, "time": time.time()}
    try:
        if earlier is None:
            with path.open("x") as file:
                file.write(json.dumps(row))
        else:
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_text(json.dumps(row))
            draft.replace(path)
    except OSError:
        return False
    return True


def load_notice(path: Path) -> Notice | None:
    try:
        row = json.loads(path.read_text())
        return Notice(str(row["label"]), str(row["reason"]), bool(row["is_forced"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Keeper:
    """The process that keeps a host's place with a scheduler. what: `Slurm job 12`, `Ray`"""

    pid: int
    start_time: int
    what: str


def load_keeper(spec: Spec) -> Keeper | None:
    if not spec.keeper:
        return None
    try:
        return Keeper(**json.loads(Path(spec.keeper).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


class Peers:
    """One agent's view of the others. Where the spec names none it sees nothing and writes nothing."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.path = Path(spec.ending) if spec.ending else None
        self.next_look = 0.0
        self.seen: dict[str, tuple[int | None, float]] = {}

    def tell(self, reason: str | None) -> None:
        if self.path is not None:
            write_notice(self.path, Notice(self.spec.label, reason or "no reason was given"))

    def find_notice(self) -> Notice | None:
        """Of another than ourselves."""
        notice = load_notice(self.path) if self.path is not None else None
        return notice if notice and notice.label != self.spec.label else None

    def find_silence(self) -> str | None:
        """What to say if the neighbour's heartbeat stands still while our own can be written."""
        now = time.monotonic()
        if loss := self._find_lost_place():
            return loss
        if not self.spec.neighbour or now < self.next_look:
            return None
        self.next_look = now + self.spec.heartbeat_s
        limit_s = SILENCE_BEATS * self.spec.heartbeat_s
        folder = Path(self.spec.heartbeat).parent
        theirs = self._measure_age(folder / f"{self.spec.neighbour}.heartbeat", now)
        ours = self._measure_age(Path(self.spec.heartbeat), now)
        if theirs is None or theirs < limit_s or ours is None or ours >= limit_s:
            return None
        with contextlib.suppress(OSError):
            if b'"event": "job_ended"' in (folder / f"{self.spec.neighbour}.events.jsonl").read_bytes():
                return None
        return f"no heartbeat from {self.spec.neighbour} for {limit_s:g} s"

    def _find_lost_place(self) -> str | None:
        """What to say if a scheduler has taken back the place of this host: its keeper is dead."""
        keeper = load_keeper(self.spec)
        if keeper is None or is_same_alive(keeper.pid, keeper.start_time):
            return None
        return f"{keeper.what} has given up the place of {self.spec.label}: process {keeper.pid} was ended"

    def _measure_age(self, path: Path, now: float) -> float | None:
        """How long a file has not changed, by our own clock: those of two hosts need not agree."""
        modified = _modified(path)
        if modified is None:
            return None
        known = self.seen.get(path.name)
        if known is None or known[0] != modified:
            self.seen[path.name] = (modified, now)
            return 0.0
        return now - known[1]
