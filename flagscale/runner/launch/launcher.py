"""Choosing how a plan is started: by a scheduler, on this machine, or over SSH if one of its hosts is another one.

A container on this machine is another host too: all that there is to do goes through a command that enters it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale.runner.launch import local
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.local import GRACE_S
from flagscale.runner.launch.startup import wait_until_up
from flagscale.runner.plan.job import JobPlan


def submit_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> RunRef:
    """Start a plan wherever its hosts are, as `local.submit_job` or `ssh.submit_job`, and raise what they raise."""
    if plan.launcher == "slurm":
        from flagscale.runner.launch import slurm

        return slurm.submit_job(plan, config=config, command=command, env=env, grace_s=grace_s)
    if plan.launcher == "ray":
        from flagscale.runner.launch import ray

        return ray.submit_job(plan, config=config, command=command, env=env, grace_s=grace_s)
    if all(host.host.is_local for host in plan.hosts) and plan.docker is None:
        return local.submit_job(plan, config=config, command=command, env=env, grace_s=grace_s)
    from flagscale.runner.launch import ssh

    return ssh.submit_job(plan, config=config, command=command, env=env, grace_s=grace_s)


def start_job(
    plan: JobPlan,
    *,
    config: Mapping[str, Any],
    command: Sequence[str],
    env: Mapping[str, str],
    foreground: bool | None = None,
) -> RunRef:
    """`submit_job`, and return when all ranks are up; `foreground` as of `local.start_job`."""
    run = submit_job(plan, config=config, command=command, env=env)
    wait_until_up(run, plan, plan.foreground if foreground is None else foreground)
    return run
