"""Starting a job on this machine: check, write all or nothing, hand over to an agent, wait until every rank is up.

From the hand-over on nothing depends on the launcher: it may be killed, and the job runs on and is found by
`flagscale status`. What it does while it waits is reading the agent's events.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flagscale import env as settings
from flagscale.errors import LaunchError
from flagscale.runner.launch.checks import (
    check_capacity,
    check_local,
    check_outputs,
    check_programs,
    choose_port,
    gather_secrets,
)
from flagscale.runner.launch.ending import ask_to_end, catch_interrupts, tell_to_end
from flagscale.runner.launch.files import hold_lock, make_folder, remove_folders, write_all
from flagscale.runner.launch.folder import (
    RunRef,
    describe_job,
    find_cluster,
    find_current,
    list_files,
    list_folders,
    make_run_id,
    ref_of,
)
from flagscale.runner.launch.patches import expect_patches
from flagscale.runner.launch.procs import end_leftovers
from flagscale.runner.launch.record import HostRecord, load_records
from flagscale.runner.launch.slurm_queue import find_queue
from flagscale.runner.launch.sources import check_trees
from flagscale.runner.launch.startup import explain_interrupt, wait_until_up
from flagscale.runner.plan.job import JobPlan, LaunchName

GRACE_S = 30.0
"""Between SIGTERM and SIGKILL at a stop, seconds: torchrun gives its own ranks as long."""
HANDOVER_LIMIT_S = 60.0
CLUSTER_LIMIT_S = 60.0


def start_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    foreground: bool | None = None,
    grace_s: float = GRACE_S,
) -> RunRef:
    """Start a plan whose hosts are all this machine, and return when all its ranks are known to be up.

    config: the resolved configuration, for the record, its secrets masked
    command: what the user typed, for the record
    env: the job's environment before the plan's own variables; secrets are taken from it
    foreground: Ctrl-C during the start ends the job; None leaves it to the plan
    grace_s: between SIGTERM and SIGKILL at a stop

    Raises:
        UserError: the plan cannot run as it is; nothing was written.
        LaunchError: the folder's run still lives, the disk is full, a port is taken, or the job died while starting.
    """
    run = submit_job(plan, config=config, command=command, env=env, grace_s=grace_s)
    wait_until_up(run, plan, plan.foreground if foreground is None else foreground)
    return run


def submit_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> RunRef:
    """`start_job` without the waiting: returns once the agents have started the processes."""
    check_local(plan)
    secrets = gather_secrets(plan, env)
    check_programs(plan, env)
    check_trees(plan, expect_patches(plan))
    check_outputs(plan)
    check_capacity(plan)
    exp_dir = Path(plan.exp_dir)
    made = make_folder(exp_dir / "runs")
    run: RunRef | None = None
    try:
        with hold_lock(exp_dir):
            end_stale(exp_dir)
            port = choose_port(plan)
            run_id = make_run_id(datetime.now(UTC))
            values: dict[LaunchName, str] = {"master_port": str(port), "next_port": str(port + 1), "run_id": run_id}
            job = describe_job(plan, run_id, values, config, command)
            write_all(list_files(plan, run_id, values, job, grace_s), list_folders(plan, run_id))
            run = ref_of(plan, run_id)
            hand_over_all(run, secrets, strip_secrets(plan, env))
            return run
    finally:
        if run is None and made:
            (exp_dir / "runs" / "lock").unlink(missing_ok=True)
            remove_folders(made)


def end_stale(exp_dir: Path) -> None:
    """Let only one run live in an experiment folder: refuse if one does, end what a dead one left behind.

    Raises:
        LaunchError: the run, since when, and how to stop it.
    """
    run = find_current(exp_dir)
    if run is None:
        return
    records = load_records(run)
    refuse_living(run, records)
    for record in records:
        if record.is_here:
            end_leftovers(record.spec.token, min(record.spec.grace_s, GRACE_S))


def refuse_living(run: RunRef, records: Sequence[HostRecord]) -> None:
    """
    Raises:
        LaunchError: one of a run's hosts works on.
    """
    for record in records:
        if record.is_alive:
            started = record.find("agent_started")
            since = datetime.fromtimestamp(started["time"]).strftime("%Y-%m-%d %H:%M:%S") if started else "just now"
            raise LaunchError(
                f"{run.exp_dir} already holds a job that runs: {run.run_id}, since {since}; "
                f"stop it with `flagscale stop {run.run_id}`, or use another `experiment.exp_dir`"
            )
    end_cluster(run)
    queue = find_queue(run)
    if queue is not None and queue.phase in ("pending", "running"):
        raise LaunchError(
            f"{run.exp_dir} already holds run {run.run_id}: {queue}; "
            f"stop it with `flagscale stop {run.run_id}`, or use another `experiment.exp_dir`"
        )


def end_cluster(run: RunRef) -> None:
    """Wait for the end of the Ray cluster of a run that has ended itself.

    Raises:
        LaunchError: it does not end.
    """
    cluster = find_cluster(run)
    if cluster is None:
        return
    tell_to_end(cluster, "the end of its job")
    deadline = time.monotonic() + CLUSTER_LIMIT_S
    while any(record.is_alive for record in load_records(cluster)):
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the Ray cluster of run {run.run_id} does not end; stop it with `flagscale stop {run.run_id}`"
            )
        time.sleep(0.2)


def strip_secrets(plan: JobPlan, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of agents: without secrets under either of their names, and without an outer job's token."""
    hidden = {settings.RUN_TOKEN, *(name for pair in plan.secrets for name in pair)}
    return {name: value for name, value in env.items() if name not in hidden}


def hand_over_all(run: RunRef, secrets: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Start the agents of all hosts. Ctrl-C waits for them, and then ends what they started.

    Raises:
        LaunchError: an agent did not answer, or Ctrl-C (exit code 130).
    """
    with catch_interrupts(run, stops_job=False) as interrupts:
        for label in run.labels:
            hand_over(run, label, secrets, env)
        if interrupts.num:
            ask_to_end(load_records(run))
            raise explain_interrupt(run, is_stopping=True)


def hand_over(run: RunRef, label: str, secrets: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Start the agent of one host; it answers once the host's processes are started.

    env: without secrets: the agent gets those over its standard input

    Raises:
        LaunchError: it did not answer.
    """
    argv = [sys.executable, "-I", "-S", str(run.folder / "agent.pyz"), str(run.spec_path(label))]
    try:
        done = subprocess.run(
            argv,
            input=json.dumps(dict(secrets)) + "\n",
            env=dict(env),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=HANDOVER_LIMIT_S,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"run {run.run_id}: the agent of {label} did not start: {error}") from None
    if done.returncode != 0 or not done.stdout:
        log = Path(run.load_spec(label).agent_log)
        told = log.read_text(errors="replace").strip() if log.is_file() else ""
        raise LaunchError(
            f"run {run.run_id}: the agent of {label} did not start{os.linesep}{told or done.stderr.strip()}"
        )
