"""A run in a scheduler's queue: what its hosts' states mean in the light of what the scheduler says.

The agents' own events go first, since they saw what happened. The scheduler knows what they cannot: that nothing has
started yet and why, and that it was the scheduler itself that ended them.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from flagscale.runner.launch.notice import load_notice
from flagscale.runner.launch.slurm_queue import Queue

if TYPE_CHECKING:
    from flagscale.runner.launch.folder import RunRef
    from flagscale.runner.monitor.state import HostState, State

ENDED_BY_SLURM: "dict[str, State]" = {
    "TIMEOUT": "failed",
    "DEADLINE": "failed",
    "OUT_OF_MEMORY": "failed",
    "BOOT_FAIL": "lost",
    "NODE_FAIL": "lost",
    "PREEMPTED": "stopped",
    "CANCELLED": "stopped",
    "REVOKED": "stopped",
}
"""states of Slurm that tell more than the agents could -> what the run is then"""
MEANINGS = {
    "TIMEOUT": "Slurm ended it at its time limit",
    "NODE_FAIL": "a node of it failed",
    "PREEMPTED": "Slurm gave its nodes to another job",
    "CANCELLED": "it was cancelled in Slurm",
    "OUT_OF_MEMORY": "it used more memory than Slurm had given it",
}


def describe_end(queue: Queue) -> str:
    meaning = MEANINGS.get(queue.state)
    return f"{meaning} ({queue})" if meaning else str(queue)


def judge_queued(host: "HostState", queue: Queue, run: "RunRef") -> "HostState":
    """The state of one host, given what Slurm says of the job."""
    if host.state == "never_started":
        return _judge_unstarted(host, queue, run)
    if host.state == "lost" and queue.phase in ("running", "unknown"):
        return replace(host, state="unreachable", reason=f"{host.reason}; {queue}")
    notice = load_notice(run.notice_path)  # with a label it is an agent's, which only knows that it was signalled
    is_ours = host.state == "stopped" and notice is not None and not notice.label
    if host.state in ("stopped", "lost", "failed") and queue.state in ENDED_BY_SLURM and not is_ours:
        return replace(host, state=ENDED_BY_SLURM[queue.state], reason=describe_end(queue))
    return host


def _judge_unstarted(host: "HostState", queue: Queue, run: "RunRef") -> "HostState":
    match queue.phase:
        case "pending":
            return replace(host, state="pending", reason=str(queue))
        case "running":
            return replace(host, state="starting", reason=f"{queue}; its agent has not started yet")
        case "unknown":
            return replace(host, state="unreachable", reason=str(queue))
    if notice := load_notice(run.notice_path):
        return replace(host, state="stopped", reason=f"{notice.text}, before it had started")
    state = ENDED_BY_SLURM.get(queue.state, "never_started")
    return replace(host, state=state, reason=f"it did not start: {describe_end(queue)}")
