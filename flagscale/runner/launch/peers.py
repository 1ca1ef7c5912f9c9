"""What the agents of one run tell each other, through the run's folder: standard library, part of the archive.

One file, `ending.json`, is written by whoever ends the run first: an agent whose job failed, a `stop`, a launcher that
gives up. Every agent looks for it and ends its own part. Only one can create it, so the first one stays and names the
cause. And each agent watches the heartbeat of one neighbour, the next host of the list: a host that vanished without a
word is missed by exactly one other, and the cost grows with the hosts and not with their square.

The trade-off: it needs a folder that all hosts see, and on a network's file system a new file may take some seconds to
be seen; in return it needs no connection between hosts and no living launcher. Where each host has a folder of its own,
`wire.py` carries notices from one to the other, and knows who is silent.
"""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.runner.launch.journal import Spec
from flagscale.runner.launch.notice import Notice, load_notice, write_notice
from flagscale.runner.launch.place import find_lost_place

if TYPE_CHECKING:
    from flagscale.runner.launch.wire import Wire

SILENCE_BEATS = 12
"""A neighbour whose heartbeat stands still for so many of them is gone: a minute at 5 s each."""


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _open_wire(spec: Spec) -> "Wire | None":
    if not spec.meet_port:
        return None
    from flagscale.runner.launch.wire import Wire  # loads OpenSSL, which hosts with a shared folder need not

    return Wire(spec)


class Peers:
    """One agent's view of the others. Where the spec names no neighbour it ends no others, and misses none."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.path = Path(spec.ending) if spec.ending else None
        self.wire = _open_wire(spec)
        self.known: Notice | None = None  # of a disk that takes nothing
        self.next_look = 0.0
        self.seen: dict[str, tuple[int | None, float]] = {}

    def tell(self, reason: str | None) -> None:
        if self.path is not None and self.spec.neighbour:
            self._keep(self.path, Notice(self.spec.label, reason or "no reason was given"))

    def _keep(self, path: Path, notice: Notice) -> Notice:
        write_notice(path, notice)
        self.known = load_notice(path) or self.known or notice
        return self.known

    def find_notice(self, waits: bool = False) -> Notice | None:
        """Of another than ourselves; `waits` for the answer of one who may know."""
        if self.path is None:
            return None
        notice = load_notice(self.path) or self.known
        if self.wire is not None and (told := (self.wire.ask if waits else self.wire.exchange)(notice)):
            notice = self._keep(self.path, told)
        return notice if notice and notice.label != self.spec.label else None

    def find_silence(self) -> str | None:
        """What to say if the neighbour's heartbeat stands still while our own can be written, or the wire is silent."""
        now = time.monotonic()
        if loss := find_lost_place(self.spec):
            return loss
        if self.wire is not None:
            return self.wire.find_silence(SILENCE_BEATS * self.spec.heartbeat_s)
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

    def leave(self) -> None:
        """This agent ends, and needs not be missed."""
        if self.wire is not None and self.path is not None:
            self.wire.leave(load_notice(self.path) or self.known)

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
