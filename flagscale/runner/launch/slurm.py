"""Giving a job to Slurm: everything is written first, then one script is submitted, and Slurm chooses the machines.

The run's folder is on a file system that all nodes share, as it is for jobs over SSH, and the agents are the same: what
tells a run's state, follows it and ends it works as it is. Slurm adds a time before the start, in which nothing of the
job lives anywhere, and the right to end it (`slurm_queue.py`).

The trade-off: a node is not looked at before the start, since nobody knows which it will be. What can be checked where
one submits is checked there, and what goes wrong on a node is told by its agent, or by the script's own output.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flagscale.errors import LaunchError, UserError
from flagscale.runner.launch.archive import KEEPER, build_archive
from flagscale.runner.launch.checks import check_outputs, check_programs, gather_secrets
from flagscale.runner.launch.ending import Interrupts
from flagscale.runner.launch.files import NewFile, hold_lock, make_folder, remove_folders, write_all
from flagscale.runner.launch.folder import (
    RunRef,
    describe_job,
    list_files,
    list_folders,
    make_run_id,
    ref_of,
)
from flagscale.runner.launch.journal import read_tail, write_small
from flagscale.runner.launch.local import GRACE_S
from flagscale.runner.launch.patches import expect_patches
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.slurm_queue import JOB_FILE, Queue, call_slurm, cancel_job, find_queue
from flagscale.runner.launch.slurm_script import BATCH_LOG, bind_values, render_sbatch
from flagscale.runner.launch.sources import check_trees
from flagscale.runner.launch.ssh import end_stale
from flagscale.runner.plan.job import JobPlan

SCRIPT = "slurm.sh"
LOOK_EVERY_S = 1.0
NUM_LAST_LINES = 20


def submit_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> RunRef:
    """Write a plan down and submit it; returns once Slurm has taken it. As `local.submit_job`.

    Raises:
        UserError: the plan cannot run as it is, or Slurm refuses what it asks for; nothing stays written.
        LaunchError: the folder's run still lives, or Slurm does not answer.
    """
    gather_secrets(plan, env)  # they travel in the job's environment, which Slurm hands on
    check_programs(plan, env)
    check_trees(plan, expect_patches(plan))
    check_outputs(plan)
    exp_dir = Path(plan.exp_dir)
    made = make_folder(exp_dir / "runs")
    run: RunRef | None = None
    try:
        with hold_lock(exp_dir):
            run_id = make_run_id(datetime.now(UTC))
            script = render_sbatch(plan, run_id, plan.hosts[0].python or sys.executable)
            check_accepted(script, env)
            end_stale(exp_dir)
            values = bind_values(run_id)
            job = describe_job(plan, run_id, values, config, command)
            ref = ref_of(plan, run_id)
            files = [
                *list_files(plan, run_id, values, job, grace_s),
                NewFile(ref.folder / "keeper.pyz", build_archive(KEEPER), 0o600),
                NewFile(ref.folder / SCRIPT, script.encode(), 0o700),
            ]
            write_all(files, list_folders(plan, run_id))
            run = ref
            submit_script(run, env)
            return run
    finally:
        if run is None and made:
            (exp_dir / "runs" / "lock").unlink(missing_ok=True)
            remove_folders(made)


def check_accepted(script: str, env: Mapping[str, str]) -> None:
    """Let Slurm say whether it would take the script, before anything is written.

    Raises:
        LaunchError: there is no Slurm here, or it does not answer.
        UserError: it refuses what is asked for, in its own words.
    """
    _, fault = call_slurm(["sinfo", "--noheader", "--format=%P"], env)
    if fault:
        raise LaunchError(f"`experiment.runner.type` is slurm, but Slurm cannot be asked: {fault}")
    taken, fault = call_slurm(["sbatch", "--test-only"], env, script)
    if taken is None:
        raise UserError(f"Slurm refuses this job; see `experiment.runner.slurm`, `nnodes`:\n{_indent(fault)}")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def submit_script(run: RunRef, env: Mapping[str, str]) -> None:
    """
    Raises:
        LaunchError: Slurm did not take it, though it said that it would.
    """
    told, fault = call_slurm(["sbatch", "--parsable", str(run.folder / SCRIPT)], env)
    if told is None:
        raise LaunchError(f"run {run.run_id} was not submitted: {fault}")
    write_small(str(run.folder / JOB_FILE), told.strip().partition(";")[0] + "\n")


def wait_in_queue(run: RunRef, stays: bool, interrupts: Interrupts, show: Callable[[str], None]) -> str | None:
    """Wait until every node's agent has started; returns what to say instead if the job is to be left in the queue.

    stays: wait however long the queue is; Ctrl-C then takes the job out of it

    Raises:
        LaunchError: the job ended before all agents had started, with what its script printed.
        RunError: it cannot be taken out of the queue.
    """
    next_look = 0.0
    while True:
        records = load_records(run)
        if all(record.find("agent_started") for record in records):
            return None
        if interrupts.num:
            if stays:
                cancel_job(run)
            return None
        if any(record.has_ended for record in records):
            return None
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_EVERY_S
            queue = find_queue(run)
            if queue is not None:
                _check_queued(run, queue)
                show(str(queue))
                if queue.phase == "pending" and not stays:
                    return f"{queue}; follow it with `flagscale logs -f {run.run_id}`"
        time.sleep(0.2)


def _check_queued(run: RunRef, queue: Queue) -> None:
    if queue.phase not in ("ended", "forgotten") or any(record.find("agent_started") for record in load_records(run)):
        return
    log = run.folder / BATCH_LOG
    last = read_tail(log).splitlines()[-NUM_LAST_LINES:]
    told = "\n".join([f"last lines of {log}:", *(f"  {line}" for line in last)]) if last else ""
    raise LaunchError(f"run {run.run_id} did not start: {queue}\n{told}".rstrip())
