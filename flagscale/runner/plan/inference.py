"""`plan_inference` and `plan_compress`: an entry point that reads its task section from a file."""

import posixpath
from typing import Any

from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.common import (
    bin_dirs_of,
    dump_yaml,
    environment_of,
    find_outputs,
    plan_host,
    plan_job,
    require_entrypoint,
)
from flagscale.runner.plan.job import JobPlan, ProcessSpec
from flagscale.runner.plan.site import Site


def plan_inference(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of an offline inference job.

    Raises:
        UserError: the task has no entry point.
    """
    return _plan_reader(config, hosts, site)


def plan_compress(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a compression job.

    Raises:
        UserError: the task has no entry point.
    """
    return _plan_reader(config, hosts, site)


def _plan_reader(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """Every host runs `python <entrypoint> --config-path=<file>`, the file holding the task section."""
    outputs = find_outputs(config)
    entrypoint = require_entrypoint(config)
    section: Any = config.values[config.task_type] or {}
    path = posixpath.join(outputs.scripts_dir, f"{config.task_type}.yaml")
    rows = []
    for node_rank, host in enumerate(hosts):
        process = ProcessSpec(
            name=config.task_type,
            argv=("python", entrypoint, f"--config-path={path}"),
            cwd=site.root,
            entrypoint=entrypoint,
            env=environment_of(config, host),
            path_dirs=(site.root,),
            bin_dirs=bin_dirs_of(config, site, host),
        )
        rows.append(plan_host(config, outputs, host, node_rank, (process,), files=((path, dump_yaml(section)),)))
    return plan_job(config, outputs, tuple(rows))
