"""What is known of a run: the events that its agents wrote, held against the processes that live.

Events alone cannot be trusted for "running": whoever writes them can be killed. So the record asks whether the agent or
its guard lives (the same pid with the same start time, on the same start of the same machine). Where that cannot be
asked, from another machine over a shared folder, the age of the heartbeat answers.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.runner.launch import procs
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.journal import Spec

MISSED_BEATS = 4
"""A heartbeat this many times late counts as missing, where the processes themselves cannot be seen."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HostRecord:
    """One host of a run.

    is_here: its processes are of this machine, so that they can be asked after
    is_watched: its agent or its guard lives; by the heartbeat's age where `is_here` is False
    heartbeat_age_s: None before the first
    """

    spec: Spec
    events: tuple[Event, ...]
    is_here: bool
    is_watched: bool
    heartbeat_age_s: float | None

    def find(self, kind: str) -> Event | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def all(self, kind: str) -> Iterator[Event]:
        return (event for event in self.events if event["event"] == kind)

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def has_ended(self) -> bool:
        return self.find("job_ended") is not None

    @property
    def is_alive(self) -> bool:
        return self.is_watched and not self.has_ended

    def is_process_alive(self, event: Event) -> bool:
        """Whether the process of a `*_started` event lives; as the host's watchers do, if it cannot be asked."""
        if not self.is_here:
            return self.is_watched
        return procs.is_same_alive(event["pid"], event["start_time"] or -1)


def load_events(path: Path) -> tuple[Event, ...]:
    """All whole events; the last line of a writer that was killed may be half a line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return ()
    events: list[Event] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return tuple(events)


def _heartbeat_age(spec: Spec) -> float | None:
    try:
        return max(0.0, time.time() - Path(spec.heartbeat).stat().st_mtime)
    except OSError:
        return None


def load_record(run: RunRef, label: str) -> HostRecord:
    """
    Raises:
        RunError: the run's folder is damaged.
    """
    spec = run.load_spec(label)
    events = load_events(Path(spec.events))
    age = _heartbeat_age(spec)
    started = next((event for event in events if event["event"] == "agent_started"), None)
    if started is None:
        return HostRecord(spec, events, True, False, age)
    if started["machine"] == procs.name_machine():
        agent = procs.is_same_alive(started["pid"], started["start_time"] or -1)
        guard = procs.is_same_alive(started["guard"] or 0, started["guard_start_time"] or -1)
        return HostRecord(spec, events, True, agent or guard, age)
    is_fresh = age is not None and age < MISSED_BEATS * spec.heartbeat_s
    return HostRecord(spec, events, False, is_fresh, age)


def load_records(run: RunRef) -> tuple[HostRecord, ...]:
    return tuple(load_record(run, label) for label in run.labels)
