"""What is known of a run: the events that its agents wrote, held against the processes that live.

Events alone cannot be trusted for "running": whoever writes them can be killed. So the record asks whether the agent or
its guard lives (the same pid with the same start time, on the same start of the same machine). Where that cannot be
asked, from another machine over a shared folder, the age of the heartbeat answers, unless the caller has asked that
host over SSH (`reach.ask_hosts`) and gives its answer along.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.runner.launch import procs
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.journal import Entry, Spec, load_events

MISSED_BEATS = 4
"""A heartbeat this many times late counts as missing, where the processes themselves cannot be seen."""

TAIL = ".tail"
"""Behind the name of a file: what is kept of its end, where it was not fetched whole."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said over SSH. unreachable: why it said nothing; num_left: processes that live without watchers."""

    is_watched: bool = False
    num_left: int = 0
    unreachable: str | None = None


@dataclass(frozen=True, slots=True)
class HostRecord:
    """One host of a run.

    is_here: its processes are of this machine, so that they can be asked after
    is_watched: its agent or its guard lives; by the heartbeat's age where `is_here` is False
    heartbeat_age_s: None before the first
    answer: None where the host was not asked, or is this machine
    mirror: below here lies what was fetched of a host that shares no folder, under its whole path; None elsewhere
    """

    spec: Spec
    events: tuple[Event, ...]
    is_here: bool
    is_watched: bool
    heartbeat_age_s: float | None
    answer: Answer | None = None
    mirror: Path | None = None

    def find(self, kind: str) -> Event | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def all(self, kind: str) -> Iterator[Event]:
        return (event for event in self.events if event["event"] == kind)

    @property
    def label(self) -> str:
        return self.spec.label

    def locate(self, path: str) -> Path:
        """Where a file of the host is to be read on this machine."""
        return locate(self.mirror, path)

    @property
    def output(self) -> Path:
        return self.locate(self.spec.output)

    def find_last_part(self, source: str) -> tuple[Path, int, int | None]:
        """(file, from byte, to byte) that end with the last lines of one of the host's files that this run wrote."""
        if self.mirror is not None:
            return self.locate(source + TAIL), 0, None
        return Path(source), *((self.output_start, self.output_end) if source == self.spec.output else (0, None))

    @property
    def output_start(self) -> int:
        """Where in the output this run begins, in bytes: the file is appended to by every run."""
        started = self.find("agent_started")
        return int(started["output_start"]) if started else 0

    @property
    def output_end(self) -> int | None:
        """Where a later run's part may begin; None while this one writes, or if it died with its watchers."""
        ended = self.find("job_ended")
        return int(ended["output_end"]) if ended else None

    @property
    def num_ranks(self) -> int:
        return sum(entry.num_ranks for entry in self.spec.processes)

    def find_first_rank(self, entry: Entry) -> int:
        """As torchrun gave it, once it did: it need not keep to the order of the hostfile."""
        events = [event for event in self.all("rank_started") if event.get("process") == entry.name]
        return int(events[-1]["rank"] - events[-1]["local_rank"]) if events else entry.first_rank

    def list_ranks(self, kind: str) -> set[int]:
        """The ranks that an event of this kind tells of."""
        return {event["rank"] for event in self.all(kind)}

    def list_programs(self) -> dict[str, bool]:
        """Name of each process without ranks -> whether it is up, or has ended well."""
        up = {event["name"] for event in self.all("process_up")}
        up |= {event["name"] for event in self.all("process_exited") if event["exit_code"] == 0}
        return {entry.name: entry.name in up for entry in self.spec.processes if not entry.num_ranks}

    @property
    def is_up(self) -> bool:
        return len(self.list_ranks("rank_up")) >= self.num_ranks and all(self.list_programs().values())

    @property
    def has_ended(self) -> bool:
        return self.find("job_ended") is not None

    @property
    def is_alive(self) -> bool:
        return self.is_watched and not self.has_ended

    @property
    def is_lost(self) -> bool:
        """Whether agent and guard were killed at one stroke: nobody was left to say how the job ended."""
        is_silent = self.answer is not None and self.answer.unreachable is not None
        return self.find("agent_started") is not None and not (self.has_ended or self.is_watched or is_silent)

    def is_process_alive(self, event: Event) -> bool:
        """Whether the process of a `*_started` event lives; as the host's watchers do, if it cannot be asked."""
        if not self.is_here:
            return self.is_watched
        return procs.is_same_alive(event["pid"], event["start_time"] or -1)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def locate(mirror: Path | None, path: str) -> Path:
    return Path(path) if mirror is None else mirror / path.lstrip("/")


def _find_mirror(run: RunRef, spec: Spec) -> Path | None:
    """Of a host that shares no folder with this machine, unless it is this machine."""
    remote = run.find_remote(spec.label)
    if remote is None or remote.is_shared:
        return None
    own = next((event for event in load_events(Path(spec.events)) if event["event"] == "agent_started"), None)
    return None if own and own["machine"] == procs.name_machine() else run.mirror_dir(spec.label)


def load_record(run: RunRef, label: str, answer: Answer | None = None) -> HostRecord:
    """
    answer: what the host itself said, if it was asked

    Raises:
        RunError: the run's folder is damaged.
    """
    spec = run.load_spec(label)
    mirror = _find_mirror(run, spec)
    path, beat = locate(mirror, spec.events), locate(mirror, spec.heartbeat)
    age, events = _age(beat), load_events(path)
    started = next((event for event in events if event["event"] == "agent_started"), None)
    if started is None:
        return HostRecord(spec, events, run.find_remote(label) is None, False, age, answer, mirror)
    if started["machine"] != procs.name_machine():
        has_ended = any(event["event"] == "job_ended" for event in events)  # an agent's last word
        sign_s = age
        if age is None and run.has_notice:  # the first heartbeat comes a moment after the first events
            sign_s = _age(path)
        is_fresh = sign_s is not None and sign_s < MISSED_BEATS * spec.heartbeat_s and not has_ended
        if answer is None or answer.unreachable:
            return HostRecord(spec, events, False, is_fresh, age, answer, mirror)
        events = events if answer.is_watched else load_events(path)
        return HostRecord(spec, events, False, answer.is_watched and not has_ended, age, answer, mirror)
    agent = procs.is_same_alive(started["pid"], started["start_time"] or -1)
    guard = procs.is_same_alive(started["guard"] or 0, started["guard_start_time"] or -1)
    if not (agent or guard):
        events = load_events(path)  # they may have written their last words and left since we read
    return HostRecord(spec, events, True, agent or guard, age)


def load_records(run: RunRef, answers: Mapping[str, Answer] | None = None) -> tuple[HostRecord, ...]:
    return tuple(load_record(run, label, (answers or {}).get(label)) for label in run.labels)


def describe_stacks(records: Iterable[HostRecord]) -> str | None:
    """Where the Python stacks of ranks were saved before they were ended; None where they were not."""
    saved = ((record, event) for record in records if (event := record.find("stacks_saved")))
    found = [
        f"of rank {', '.join(map(str, event['ranks']))} in {_on(record, event['folder'])}" for record, event in saved
    ]
    return f"Python stacks {'; '.join(found)}" if found else None


def _on(record: HostRecord, path: str) -> str:
    return path if record.mirror is None else f"{path} on {record.label}"


_BAD = ("failed", "lost")
_OUTCOMES = (_BAD, ("stopped",), ("succeeded",))
_CAUSES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
CLOSE_S = 10.0
"""Failures so near to each other are of one cause."""


def order_by_cause(records: Iterable[HostRecord]) -> list[HostRecord]:
    """The host first that most likely brought the others down.

    When a rank dies, or the watchers of a host, ranks of other hosts fail a moment later by a broken connection, and
    their hosts may be quicker to say so. So among failures near to each other a death by the kernel's hand goes before
    an exception or an abort, and then the earlier goes before the later. A host whose watchers all died says nothing.
    """
    listed = list(records)
    times = [end["time"] for record in listed if (end := record.find("job_ended")) and end["outcome"] in _BAD]
    earliest = min(times, default=0.0)

    def weigh(record: HostRecord) -> tuple[int, int, float]:
        end = record.find("job_ended")
        if end is None:
            return (0, 0, 0.0) if record.is_lost else (len(_OUTCOMES), 0, 0.0)
        said = record.find("stopping") or end
        deaths = {event["signal"] for event in record.all("rank_exited") if event.get("first")}
        was_killed = end["outcome"] == "lost" or bool(deaths & set(_CAUSES))
        is_cause = end["time"] - earliest < CLOSE_S and was_killed
        return next(i for i, names in enumerate(_OUTCOMES) if end["outcome"] in names), not is_cause, said["time"]

    return sorted(listed, key=weigh)
