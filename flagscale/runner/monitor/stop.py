"""Stopping a run: ask its agent, wait until nothing is left, and end by token what has no agent any more."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import RunError
from flagscale.runner.launch.ending import tell_to_end
from flagscale.runner.launch.folder import RunRef, find_cluster
from flagscale.runner.launch.journal import write_small
from flagscale.runner.launch.procs import name_user
from flagscale.runner.launch.reach import Links, Look, ask_hosts, clean_hosts, signal_hosts, watchers_of
from flagscale.runner.launch.record import HostRecord, load_records
from flagscale.runner.launch.slurm_queue import cancel_job, find_queue
from flagscale.runner.monitor.state import RunState, query_run

POLL_S = 0.1
QUEUE_PATIENCE_S = 5.0
"""given to the script of a job whose agents have ended, seconds"""
QUEUE_LIMIT_S = 120.0
OWNER_AFTER_S = 5.0
"""An agent on another machine that has not begun to end by then may be one that we must not end."""
MARGIN_S = 330.0
"""Waited beyond the grace: `cmds.after_stop` may take 300 s."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a stop found and did. `was_alive` is False where there was nothing to stop."""

    state: RunState
    was_alive: bool
    num_leftovers: int


def find_owner(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def check_here(run: RunRef, records: tuple[HostRecord, ...]) -> None:
    """
    Raises:
        RunError: a living part of the run is on another machine, or someone else's.
    """
    away = [record for record in records if record.is_alive and not record.is_here and not run.has_notice]
    if away:
        names = ", ".join(str((record.find("agent_started") or {}).get("hostname")) for record in away)
        raise RunError(f"run {run.run_id} runs on {names}, not on this machine; stop it there")
    for record in records:
        owner = find_owner((record.find("agent_started") or {}).get("pid", 0)) if record.is_alive else None
        if owner is not None and os.geteuid() not in (0, owner):
            raise RunError(f"run {run.run_id} belongs to {name_user(owner)}, who alone may stop it")


def stop_run(run: RunRef, force: bool = False, wait: Callable[[], None] | None = None) -> Stopped:
    """End everything of a run and wait until it is gone. Stopping a run that has ended changes nothing.

    force: SIGKILL at once, without the time that processes are given to save
    wait: called between looks, instead of sleeping 0.1 s

    Raises:
        RunError: it runs on another machine that it was not started on, it does not end, or a host of it cannot be
            reached; all that can be reached is ended first.
    """
    with Links(run.remotes) as links:
        answers = ask_hosts(run, links)
        records = load_records(run, answers)
        check_here(run, records)
        queue = find_queue(run)
        is_queued = queue is not None and queue.phase in ("pending", "running", "unknown")
        was_alive = is_queued or any(record.is_alive for record in records)
        was_alive = was_alive or any(answer.unreachable for answer in answers.values())
        if was_alive:
            by = f"{name_user(os.getuid())} on {socket.gethostname()}"
            write_small(str(run.folder / "stop.json"), json.dumps({"by": by, "time": time.time()}))
            tell_to_end(run, by, force)
            reached = [record.label for record in records if not (record.answer and record.answer.unreachable)]
            signal_hosts(run, links, signal.SIGUSR1 if force else signal.SIGTERM, reached)
        if queue is not None and (force or queue.phase == "pending"):
            cancel_job(run)
        look = Look(run, links, answers=answers)
        _wait_for_end(run, look, wait)
        _wait_for_queue(run, wait)
        grace_s = 0.0 if force else max(record.spec.grace_s for record in records)
        num_leftovers = clean_hosts(run, links, grace_s)
    if cluster := find_cluster(run):
        stop_run(cluster, force, wait)
    state = query_run(run)
    silent = [f"{host.label} ({host.reason})" for host in state.hosts if host.state == "unreachable"]
    if silent:
        raise RunError(
            f"run {run.run_id}: cannot tell what lives on {', '.join(silent)}; all other hosts have ended. "
            f"Their agents end by themselves once they hear of it; `flagscale stop {run.run_id}` makes sure"
        )
    return Stopped(state, was_alive, num_leftovers)


def _wait_for_end(run: RunRef, look: Look, wait: Callable[[], None] | None) -> None:
    """Until no watcher is seen any more: over SSH where that goes, by the heartbeat where a host does not answer."""
    records = look.load_records()
    begin = time.monotonic()
    deadline = begin + MARGIN_S + max(record.spec.grace_s for record in records)
    is_owner_known = False
    while any(_may_work(run, record) for record in records):
        if time.monotonic() > deadline:
            raise RunError(f"run {run.run_id} does not end; see {Path(records[0].spec.agent_log)}")
        if not is_owner_known and time.monotonic() > begin + OWNER_AFTER_S:
            is_owner_known = True
            check_owners(run, look.links, [record for record in records if not record.find("stopping")])
        if wait is None:
            time.sleep(POLL_S)
        else:
            wait()
        records = look.load_records()
    look.wait()


def _wait_for_queue(run: RunRef, wait: Callable[[], None] | None) -> None:
    """Until the run's job has left the scheduler's queue; a script that does not end by itself is cancelled."""
    patience, deadline = time.monotonic() + QUEUE_PATIENCE_S, time.monotonic() + QUEUE_LIMIT_S
    while (queue := find_queue(run)) is not None and queue.phase in ("pending", "running", "unknown"):
        if time.monotonic() > deadline:
            raise RunError(f"run {run.run_id}: {queue}, {QUEUE_LIMIT_S:g} s after it was asked to end")
        if time.monotonic() > patience and queue.phase != "unknown":
            cancel_job(run)
            patience = deadline
        if wait is not None:
            wait()
        time.sleep(POLL_S)


def check_owners(run: RunRef, links: Links, records: Sequence[HostRecord]) -> None:
    """
    Raises:
        RunError: on another machine the run is someone else's.
    """
    asked = {record.label: watchers_of(record) for record in records if record.label in links.remotes}
    for label, reply in links.call("owner", asked).items():
        if owner := reply.answer.get("owner"):
            raise RunError(f"run {run.run_id} belongs to {owner} on {label}, who alone may stop it")


def _may_work(run: RunRef, record: HostRecord) -> bool:
    return record.is_watched and (record.is_here or run.has_notice)
