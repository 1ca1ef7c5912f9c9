"""Waiting for a job that has been started: until every rank is up, or the first one fails."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flagscale.errors import LaunchError
from flagscale.runner.launch.ending import catch_interrupts, tell_to_end
from flagscale.runner.launch.folder import RunRef, load_job
from flagscale.runner.launch.journal import read_tail
from flagscale.runner.launch.reach import Look, pass_notice
from flagscale.runner.launch.record import HostRecord, describe_stacks, order_by_cause
from flagscale.runner.launch.resume import describe_beginning
from flagscale.runner.launch.sources import describe_tree
from flagscale.runner.plan.job import JobPlan

POLL_S = 0.2
NUM_LAST_LINES = 20
INTERRUPTED = 130
"""The exit code that shells give for Ctrl-C."""
FINISHED = "finished"
LEAST_WIDTH = 9
"""of the names in what a launch says, so that it looks the same from one to the next"""


def wait_until_up(run: RunRef, plan: JobPlan, foreground: bool) -> None:
    """Return when every rank and program of the plan is up, or the whole job has already succeeded.

    Says on standard error what was started and how far it is. A job that is not stayed with gets a last line on
    standard output.

    Raises:
        LaunchError: a rank or program failed, with its last lines; or the plan's start_timeout_s passed, and the job
            was ended; or Ctrl-C, which ends a foreground job and leaves any other running (exit code 130).
    """
    with catch_interrupts(run, stops_job=foreground) as interrupts:
        print(describe_launch(run, plan, foreground), file=sys.stderr, flush=True)
        deadline = time.monotonic() + plan.start_timeout_s
        look = Look(run, answers={})
        with show_progress() as show:
            if run.launcher == "slurm":
                from flagscale.runner.launch.slurm import wait_in_queue

                if text := wait_in_queue(run, foreground, interrupts, show):
                    print(f"run {run.run_id}: {text}", flush=True)
                    return
                deadline = time.monotonic() + plan.start_timeout_s
            while True:
                if interrupts.num:
                    pass_notice(run)
                    raise explain_interrupt(run, is_stopping=foreground)
                records = look.load_records()
                check_alive(run, records, foreground)
                text, is_up = describe_start(records)
                show(text)
                if is_up:
                    break
                if time.monotonic() > deadline:
                    tell_to_end(run, f"the launcher: only {text} after {plan.start_timeout_s:g} s")
                    pass_notice(run)
                    raise LaunchError(
                        f"run {run.run_id}: after {plan.start_timeout_s:g} s only {text}; the job was ended. "
                        f"Its output: {', '.join(str(record.output) for record in records)}"
                    )
                time.sleep(POLL_S)
        if not foreground:
            hint = "" if text == FINISHED else f"; follow it with `flagscale logs -f {run.run_id}`"
            print(f"run {run.run_id}: {text}{hint}", flush=True)


def describe_launch(run: RunRef, plan: JobPlan, foreground: bool) -> str:
    """What was started, where its outputs are, where its training begins, how to follow and to stop it."""
    size = f", {plan.num_ranks} ranks" if plan.num_ranks else ""
    where = plan.hosts[0].host.name if len(plan.hosts) == 1 else f"{len(plan.hosts)} hosts"
    stop = f"flagscale stop {run.run_id}"
    trees = load_job(run.exp_dir, run.run_id)["trees"]
    away = [remote.name for remote in run.remotes if not remote.is_shared]
    on_hosts = f", on each of {', '.join(away)} its own" if away else ""
    rows = {
        "source": "; ".join(f"{tree['path']}: {describe_tree(tree)}" for tree in trees),
        "outputs": f"{run.exp_dir}{on_hosts}",
        "log": f"{run.output_path(run.labels[0]) if len(run.labels) == 1 else run.log_dir}{on_hosts}",
        "checkpoints": f"{plan.checkpoint_dir}{on_hosts}" if away and plan.checkpoint_dir else None,
        "training": describe_beginning(plan) if plan.task == "train" and not away else None,
        "follow": None if foreground else f"flagscale logs -f {run.run_id}",
        "stop": f"Ctrl-C, or elsewhere {stop}" if foreground else stop,
    }
    width = max(LEAST_WIDTH, *(len(name) for name, text in rows.items() if text))
    what = plan.task + (f" with {plan.backend}" if plan.backend else "")
    head = f"run {run.run_id}: {f'{plan.exp_name}, ' if plan.exp_name else ''}{what}{size} on {where}"
    return "\n".join([head, *(f"  {name:<{width}} {text}" for name, text in rows.items() if text)])


def explain_interrupt(run: RunRef, is_stopping: bool) -> LaunchError:
    if is_stopping:
        error = LaunchError(f"interrupted; run {run.run_id} is being stopped (see `flagscale status {run.run_id}`)")
    else:
        error = LaunchError(
            f"interrupted; run {run.run_id} goes on starting. Follow it with `flagscale logs -f {run.run_id}`, "
            f"stop it with `flagscale stop {run.run_id}`"
        )
    error.exit_code = INTERRUPTED
    return error


def describe_start(records: tuple[HostRecord, ...]) -> tuple[str, bool]:
    """How far the start is, in words, and whether it is done."""
    if all((end := record.find("job_ended")) and end["outcome"] == "succeeded" for record in records):
        return FINISHED, True
    num_ranks = sum(record.num_ranks for record in records)
    num_up, num_started = (
        sum(len(record.list_ranks(kind)) for record in records) for kind in ("rank_up", "rank_started")
    )
    programs = [is_up for record in records for is_up in record.list_programs().values()]
    parts = []
    if num_ranks:
        parts.append(f"{num_up} of {num_ranks} ranks up" + (f", {num_started} started" * (num_started > num_up)))
    if programs:
        parts.append(f"{sum(programs)} of {len(programs)} programs up")
    return "; ".join(parts) or "nothing to wait for", all(record.is_up for record in records)


def check_alive(run: RunRef, records: tuple[HostRecord, ...], foreground: bool) -> None:
    """
    Raises:
        LaunchError: a host's job ended badly or its watchers are gone, with the last lines of what failed first. In
            the foreground its exit code is the job's.
    """
    has_failed = any((end := record.find("job_ended")) and end["outcome"] == "failed" for record in records)
    if has_failed and any(record.is_alive and record.spec.neighbour for record in records):
        return  # the other hosts are ending too; whose fault it was is known when all have
    for record in order_by_cause(records):
        end = record.find("job_ended")
        if end is None and (record.is_alive or (record.answer and record.answer.unreachable)):
            continue
        if end is not None and end["outcome"] == "succeeded":
            continue
        reason = end["reason"] if end else f"the agent and the guard of {record.label} were killed"
        where = "" if record.label == "host_0_localhost" else f" on {record.label}"
        lines = [f"run {run.run_id} did not start{where}: {reason}", quote_last_words(record), describe_stacks(records)]
        error = LaunchError("\n".join(filter(None, lines)))
        if foreground and end and end["exit_code"]:
            error.exit_code = end["exit_code"]
        raise error


def quote_last_words(record: HostRecord) -> str:
    """The last lines of what failed first on this host, below the name of their file."""
    end = record.find("job_ended")
    source = str(end["source"]) if end and end["source"] else record.spec.output
    lines = read_tail(*record.find_last_part(source)).splitlines()[-NUM_LAST_LINES:]
    return "\n".join([f"last lines of {source}:", *(f"  {line}" for line in lines)])


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
