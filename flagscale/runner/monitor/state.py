"""What state a run is in, told truly: from the events of its agents and the processes that live.

Every answer is made anew from what is there, and nothing is cached: a state that was kept somewhere would be one more
thing that can be wrong after a crash.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flagscale.runner.launch.folder import RunRef, find_cluster
from flagscale.runner.launch.procs import find_ours
from flagscale.runner.launch.reach import load_true_records
from flagscale.runner.launch.record import Event, HostRecord, describe_stacks, order_by_cause
from flagscale.runner.launch.slurm_queue import find_queue
from flagscale.runner.monitor.progress import Iteration, find_last_iteration
from flagscale.runner.monitor.queued import judge_queued

State = Literal[
    "pending",
    "starting",
    "running",
    "stopping",
    "unreachable",
    "succeeded",
    "failed",
    "stopped",
    "lost",
    "never_started",
]
RankStateName = Literal["waiting", "starting", "up", "exited", "failed", "ended", "gone"]

ENDED: tuple[State, ...] = ("succeeded", "failed", "stopped", "lost", "never_started")
BAD: tuple[State, ...] = ("failed", "lost")
_WORST_FIRST: tuple[State, ...] = ("failed", "lost", "stopped", "never_started", "succeeded")
_BUSIEST_FIRST: tuple[State, ...] = ("unreachable", "stopping", "pending", "starting", "running")


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank. `ended` is by the end of others or of the job; `gone` died a moment ago and nobody said yet how."""

    rank: int
    host: str
    local_rank: int
    state: RankStateName
    pid: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    is_first_failure: bool = False


@dataclass(frozen=True, slots=True)
class HostState:
    """One host. Times are seconds since 1970; num_leftovers counts processes that live without agent and guard.

    hostname: what the machine calls itself, once its agent has started
    """

    label: str
    state: State
    agent_pid: int | None
    guard_pid: int | None
    heartbeat_age_s: float | None
    started: float | None
    ended: float | None
    exit_code: int | None
    reason: str | None
    num_leftovers: int
    hostname: str | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """A run as a whole."""

    run: RunRef
    state: State
    exit_code: int | None
    reason: str | None
    started: float | None
    ended: float | None
    hosts: tuple[HostState, ...]
    ranks: tuple[RankState, ...]
    progress: Iteration | None
    stacks: str | None = None
    """where the Python stacks of ranks were saved before a failure of others ended them"""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def num_leftovers(self) -> int:
        return sum(host.num_leftovers for host in self.hosts)


def query_run(run: RunRef) -> RunState:
    """
    Raises:
        RunError: the run's folder is damaged.
    """
    records = load_true_records(run)
    hosts = tuple(_judge_host(record) for record in records)
    if queue := find_queue(run):
        hosts = tuple(judge_queued(host, queue, run) for host in hosts)
    order = [record.label for record in order_by_cause(records)]
    hosts_by_cause = sorted(hosts, key=lambda host: order.index(host.label))
    bad = [host for host in hosts_by_cause if host.state in BAD]
    state = _judge_run(hosts)
    if state in BAD:  # the worst of all, or the cause of it
        state = bad[0].state
    worst = next(host for host in hosts_by_cause if host.state == state)
    told = worst if worst.reason or not bad else bad[0]  # a run whose other hosts still work
    queued = {host.label for host in hosts if host.state == "pending"}
    ranks = (
        rank if not bad or rank.host == bad[0].label else replace(rank, is_first_failure=False)
        for record in records
        for rank in _judge_ranks(record, record.label in queued)
    )
    starts = [host.started for host in hosts if host.started is not None]
    ends = [host.ended for host in hosts if host.ended is not None]
    found = [find_last_iteration(*record.find_last_part(record.spec.output)) for record in records]
    return RunState(
        run=run,
        state=state,
        exit_code=worst.exit_code,
        reason=_add_cluster(run, state, _name_host(told, len(hosts))),
        started=min(starts, default=None),
        ended=max(ends, default=None) if state in ENDED else None,
        hosts=hosts,
        ranks=tuple(sorted(ranks, key=lambda rank: rank.rank)),
        progress=next((item for item in reversed(found) if item), None),
        stacks=describe_stacks(records),
    )


def _add_cluster(run: RunRef, state: State, reason: str | None) -> str | None:
    """What became of the run's own Ray cluster, where that is why it was lost."""
    cluster = find_cluster(run) if state == "lost" else None
    said = query_run(cluster) if cluster else None
    if said is None or said.state not in ("failed", "lost"):
        return reason
    return f"{reason}; its Ray cluster {said.state}: {said.reason}"


def _name_host(host: HostState, num_hosts: int) -> str | None:
    """Its reason; where there are several hosts and it is one host's own, behind that host's name."""
    is_own = num_hosts > 1 and host.state in ("failed", "lost", "unreachable", "never_started")
    return f"{host.label}: {host.reason}" if is_own and host.reason else host.reason


def _judge_run(hosts: Sequence[HostState]) -> State:
    states = {host.state for host in hosts}
    return next(state for state in (*_BUSIEST_FIRST, *_WORST_FIRST) if state in states)


def _judge_host(record: HostRecord) -> HostState:
    started, ended = record.find("agent_started"), record.find("job_ended")
    stopping = record.find("stopping")
    reason = ended["reason"] if ended else stopping["by"] if stopping else None
    num_leftovers = 0
    state: State
    if ended:
        state = ended["outcome"]
    elif record.answer and record.answer.unreachable:
        state, reason = "unreachable", _describe_silence(record, record.answer.unreachable)
    elif started is None:
        state, reason = "never_started", "its agent did not start"
    elif not record.is_watched:
        state = "lost"
        num_leftovers = len(find_ours(record.spec.token)) if record.is_here else 0
        num_leftovers = record.answer.num_left if record.answer else num_leftovers
        reason = _describe_loss(record, num_leftovers)
    elif stopping:
        state = "stopping"
    else:
        state = "running" if record.is_up else "starting"
    return HostState(
        label=record.label,
        state=state,
        agent_pid=started["pid"] if started else None,
        guard_pid=started["guard"] if started else None,
        heartbeat_age_s=record.heartbeat_age_s,
        started=started["time"] if started else None,
        ended=ended["time"] if ended else None,
        exit_code=ended["exit_code"] if ended else None,
        reason=reason,
        num_leftovers=num_leftovers,
        hostname=started["hostname"] if started else None,
    )


def _describe_silence(record: HostRecord, unreachable: str) -> str:
    age = record.heartbeat_age_s
    beat = "no heartbeat" if age is None else f"last heartbeat {age:.0f} s ago"
    return f"{unreachable}; {beat}"


def _describe_loss(record: HostRecord, num_leftovers: int) -> str:
    if not record.is_here and record.answer is None:
        return "no heartbeat, and its processes are on another machine, or the machine was started anew"
    left = f"{num_leftovers} of its processes still live" if num_leftovers else "none of its processes lives"
    return f"its agent and its guard were killed; {left}"


def _judge_ranks(record: HostRecord, is_queued: bool) -> list[RankState]:
    started: dict[int, Event] = {event["rank"]: event for event in record.all("rank_started")}
    exited: dict[int, Event] = {event["rank"]: event for event in record.all("rank_exited")}
    up = record.list_ranks("rank_up")
    rows: list[RankState] = []
    for entry in record.spec.processes:
        first_rank = record.find_first_rank(entry)
        for local_rank in range(entry.num_ranks):
            rank = first_rank + local_rank
            pid = started[rank]["pid"] if rank in started else None
            if end := exited.get(rank):
                is_first = bool(end.get("first"))
                is_ended = not is_first and end["signal"] == "SIGTERM"  # torchrun ended it, because another failed
                state: RankStateName = "exited" if end["exit_code"] == 0 else "ended" if is_ended else "failed"
                code, name = end["exit_code"], end["signal"]
                rows.append(RankState(rank, record.label, local_rank, state, pid, code, name, is_first))
            else:
                state = "waiting" if is_queued else _judge_living(record, started.get(rank), rank in up)
                rows.append(RankState(rank, record.label, local_rank, state, pid))
    return rows


def _judge_living(record: HostRecord, started: Event | None, is_up: bool) -> RankStateName:
    if record.has_ended:
        return "ended"
    if started is None:
        return "waiting" if record.is_watched else "ended"
    if not record.is_process_alive(started):
        return "gone"
    return "up" if is_up else "starting"


def encode_state(state: RunState) -> dict[str, Any]:
    """The state as JSON values. Keys are only ever added."""
    run = state.run
    return {
        "run_id": run.run_id,
        "state": state.state,
        "exit_code": state.exit_code,
        "reason": state.reason,
        "started": state.started,
        "ended": state.ended,
        "num_leftovers": state.num_leftovers,
        "stacks": state.stacks,
        "task": run.task,
        "exp_name": run.exp_name,
        "exp_dir": str(run.exp_dir),
        "log_dir": str(run.log_dir),
        "folder": str(run.folder),
        "outputs": [str(run.output_path(label)) for label in run.labels],
        "hosts": [asdict(host) for host in state.hosts],
        "ranks": [asdict(rank) for rank in state.ranks],
        "progress": asdict(state.progress) if state.progress else None,
    }
