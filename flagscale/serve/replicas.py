"""One replica as a run of the launcher: starting it, finding it again, looking at it, ending it.

All of this waits for processes and files, so the controller calls it from threads.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flagscale.errors import FlagScaleError
from flagscale.runner.launch.folder import RunRef, find_current, list_remotes, load_job
from flagscale.runner.launch.journal import read_tail
from flagscale.runner.launch.launcher import submit_job
from flagscale.runner.launch.reach import ASK_LIMIT_S, Links, Look
from flagscale.runner.launch.record import HostRecord, order_by_cause
from flagscale.runner.monitor.stop import stop_run
from flagscale.runner.plan.job import AtLaunch, JobPlan, ProcessSpec, Word, encode_plan
from flagscale.runner.plan.service import ENGINE_KEY
from flagscale.serve.causes import Cause, explain_end, find_progress
from flagscale.serve.folder import is_run_alive

GRACE_S = 15.0
"""Between SIGTERM and SIGKILL for an engine, seconds: its requests have been drained before."""
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Origin:
    """What every replica's run is launched with, beside its plan."""

    config: Mapping[str, Any]
    command: Sequence[str]
    engine_key: str
    num_threads: int


def bind_threads(job: JobPlan, num_threads: int) -> JobPlan:
    """The plan with the number of threads that each replica of this machine gets."""

    def bind(word: Word) -> Word:
        is_meant = isinstance(word, AtLaunch) and word.name == "num_threads"
        return word.bind({"num_threads": str(num_threads)}) if is_meant and isinstance(word, AtLaunch) else word

    def bind_process(process: ProcessSpec) -> ProcessSpec:
        return replace(process, env=tuple((name, bind(value)) for name, value in process.env))

    hosts = (replace(host, processes=tuple(map(bind_process, host.processes))) for host in job.hosts)
    return replace(job, hosts=tuple(hosts))


def start_replica(job: JobPlan, origin: Origin) -> RunRef:
    """Start a replica's run; returns once its processes are started.

    Raises:
        FlagScaleError: as `launcher.submit_job`.
    """
    env = {**os.environ, ENGINE_KEY: origin.engine_key}
    bound = bind_threads(job, origin.num_threads)
    return submit_job(bound, config=origin.config, command=origin.command, env=env, grace_s=GRACE_S)


def is_run_of(run: RunRef, job: JobPlan, num_threads: int) -> bool:
    """Whether a run is of this very plan: only then may it be taken for the replica that is meant."""
    meant = json.loads(json.dumps(encode_plan(bind_threads(job, num_threads))))
    return bool(load_job(run.exp_dir, run.run_id)["plan"] == meant)


def url_of(run: RunRef, job: JobPlan) -> str:
    """Where the engine of a run answers: at the port that its launch chose on its head host."""
    port = load_job(run.exp_dir, run.run_id)["values"]["master_port"]
    head = job.hosts[0].host
    is_here = all(host.host.is_local for host in job.hosts)
    name = "127.0.0.1" if is_here or head.is_local else head.name
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def read_output(record: HostRecord) -> str:
    """The last part of what this run wrote on a host."""
    return read_tail(*record.find_last_part(record.spec.output), TAIL_BYTES)


@dataclass(frozen=True, slots=True)
class Health:
    """How a run is: alive, or ended for a cause; progress is the last line of its head.

    silent: host -> why it cannot be reached; silent_s: for how long that has been so
    """

    is_alive: bool
    progress: str = ""
    cause: Cause | None = None
    silent: Mapping[str, str] = field(default_factory=dict)
    silent_s: float = 0.0


def look_at(look: Look) -> Health:
    """
    Raises:
        RunError: the run's folder is damaged.
    """
    records = look.load_records()
    if any(record.is_alive or (record.answer and record.answer.unreachable) for record in records):
        return Health(True, find_progress(read_output(records[0])), None, *_find_silent(look))
    first = order_by_cause(records)[0]
    end = first.find("job_ended")
    reason = end["reason"] if end else "its agent and its guard were killed"
    return Health(False, cause=explain_end(read_output(first), reason or "it ended by itself"))


def _find_silent(look: Look) -> tuple[dict[str, str], float]:
    """Which hosts cannot be reached, and for how long that has been so."""
    since, answers = dict(look.silent_since), look.answers
    silent = {
        remote.name: answers[remote.label].unreachable or ""
        for remote in look.run.remotes
        if remote.label in since and remote.label in answers
    }
    return silent, time.monotonic() - min(since.values()) if silent else 0.0


def find_unreachable(job: JobPlan) -> dict[str, str]:
    """Host -> why it cannot be reached over SSH, of those of a plan that cannot."""
    remotes = list_remotes(job)
    with Links(remotes, job.accept_new_host_keys) as links:
        replies = links.run_all({remote.label: (["echo", "{}"], b"") for remote in remotes}, ASK_LIMIT_S)
    return {links.remotes[label].name: reply.fault for label, reply in replies.items() if reply.fault}


def blame_hosts(silent: Mapping[str, str]) -> Cause:
    return Cause("host", "; ".join(f"{name} {why}" for name, why in silent.items()))


def clear_seat(job: JobPlan) -> dict[str, str]:
    """End what the last run in a seat's folder may have left; returns host -> why the seat cannot be used yet."""
    run = find_current(Path(job.exp_dir))
    fault = end_replica(run) if run is not None and (run.remotes or is_run_alive(run)) else None
    return find_unreachable(job) or ({job.hosts[0].host.name: fault} if fault else {})


def end_replica(run: RunRef, force: bool = False) -> str | None:
    """End a run and all that it left; returns what could not be done."""
    try:
        stop_run(run, force)
    except FlagScaleError as error:
        return str(error)
    return None
