"""Waiting for a job that has been started: until every rank is up, or the first one fails."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flagscale.errors import LaunchError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.procs import Proc, send_signal
from flagscale.runner.launch.record import HostRecord, load_records
from flagscale.runner.plan.job import JobPlan

POLL_S = 0.2
NUM_LAST_LINES = 20
INTERRUPTED = 130
"""The exit code that shells give for Ctrl-C."""


def wait_until_up(run: RunRef, plan: JobPlan, foreground: bool) -> None:
    """Return when every rank and program of the plan is up, or the whole job has already succeeded.

    Raises:
        LaunchError: a rank or program failed, with its last lines; or the plan's start_timeout_s passed, and the job
            was ended; or Ctrl-C, which ends a foreground job and leaves any other running (exit code 130).
    """
    deadline = time.monotonic() + plan.start_timeout_s
    try:
        with show_progress() as show:
            while True:
                records = load_records(run)
                check_alive(run, records)
                text, is_up = describe_start(plan, records)
                show(f"{run.run_id}: {text}")
                if is_up:
                    return
                if time.monotonic() > deadline:
                    ask_to_end(records)
                    raise LaunchError(
                        f"run {run.run_id}: after {plan.start_timeout_s:g} s only {text}; the job was ended. "
                        f"Its output: {', '.join(str(run.output_path(label)) for label in run.labels)}"
                    )
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise explain_interrupt(run, foreground) from None


def explain_interrupt(run: RunRef, foreground: bool) -> LaunchError:
    if foreground:
        ask_to_end(load_records(run))
        error = LaunchError(f"interrupted; run {run.run_id} is being stopped (see `flagscale status {run.run_id}`)")
    else:
        error = LaunchError(
            f"interrupted; run {run.run_id} goes on starting. Follow it with `flagscale logs -f {run.run_id}`, "
            f"stop it with `flagscale stop {run.run_id}`"
        )
    error.exit_code = INTERRUPTED
    return error


def ask_to_end(records: tuple[HostRecord, ...], signum: int = signal.SIGTERM) -> None:
    """Ask every agent of this machine that lives; a guard passes it on."""
    for record in records:
        event = record.find("agent_started")
        if event is None or not record.is_here or not record.is_alive:
            continue
        for pid, start_time in ((event["pid"], event["start_time"]), (event["guard"], event["guard_start_time"])):
            if pid and start_time:
                send_signal(Proc(pid, 0, start_time, False), signum)


def describe_start(plan: JobPlan, records: tuple[HostRecord, ...]) -> tuple[str, bool]:
    """How far the start is, in words, and whether it is done."""
    num_up = sum(len({event["rank"] for event in record.all("rank_up")}) for record in records)
    num_started = sum(len({event["rank"] for event in record.all("rank_started")}) for record in records)
    programs = {(host.label, item.name) for host in plan.hosts for item in host.processes if item.num_ranks == 0}
    up = {(record.label, event["name"]) for record in records for event in record.all("process_up")}
    up |= {
        (record.label, event["name"])
        for record in records
        for event in record.all("process_exited")
        if event["exit_code"] == 0
    }
    if all((end := record.find("job_ended")) and end["outcome"] == "succeeded" for record in records):
        return "finished", True
    parts = []
    if plan.num_ranks:
        parts.append(f"{num_up} of {plan.num_ranks} ranks up" + (f", {num_started} started" * (num_started > num_up)))
    if programs:
        parts.append(f"{len(programs & up)} of {len(programs)} programs up")
    return "; ".join(parts) or "nothing to wait for", num_up >= plan.num_ranks and programs <= up


def check_alive(run: RunRef, records: tuple[HostRecord, ...]) -> None:
    """
    Raises:
        LaunchError: a host's job ended badly or its watchers are gone, with the last lines of what failed first.
    """
    for record in records:
        end = record.find("job_ended")
        if end is None and record.is_alive:
            continue
        if end is not None and end["outcome"] == "succeeded":
            continue
        reason = end["reason"] if end else f"the agent and the guard of {record.label} were killed"
        source = Path(end["source"]) if end and end["source"] else run.output_path(record.label)
        since = 0 if source != run.output_path(record.label) else output_start(record)
        lines = "\n".join(f"  {line}" for line in last_lines(source, NUM_LAST_LINES, since))
        where = "" if record.label == "host_0_localhost" else f" on {record.label}"
        raise LaunchError(f"run {run.run_id} did not start{where}: {reason}\nLast lines of {source}:\n{lines}")


def output_start(record: HostRecord) -> int:
    """Where in its host's output this run begins, in bytes: the file is appended to by every run."""
    event = record.find("agent_started")
    return int(event["output_start"]) if event else 0


def last_lines(path: Path, count: int, start: int = 0) -> list[str]:
    """The last lines of a file from byte `start` on; an empty list where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - (1 << 16)))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-count:]


@contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; elsewhere one line for each change. On standard error either way."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(text)
        return
    told = ""

    def tell(text: str) -> None:
        nonlocal told
        if text != told:
            told = text
            print(text, file=sys.stderr, flush=True)

    yield tell
