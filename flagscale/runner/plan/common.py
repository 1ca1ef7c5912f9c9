"""What the plans of all task types share: folders, environments, and a Ray cluster where several hosts need one."""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.chips import find_chip
from flagscale.errors import UserError
from flagscale.runner.config.experiment import DEFAULT_BACKENDS
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.plan.job import HostPlan, JobPlan, ProcessSpec
from flagscale.runner.plan.site import Site

LOG_DIRS = {
    "train": "logs",
    "rl": "logs",
    "inference": "inference_logs",
    "serve": "serve_logs",
    "compress": "compress_logs",
}


@dataclass(frozen=True)
class Outputs:
    """The folders of an experiment, absolute."""

    exp_dir: str
    log_dir: str

    @property
    def details_dir(self) -> str:
        return posixpath.join(self.log_dir, "details")

    @property
    def scripts_dir(self) -> str:
        return posixpath.join(self.log_dir, "scripts")

    @property
    def pids_dir(self) -> str:
        return posixpath.join(self.log_dir, "pids")


def find_outputs(config: Config) -> Outputs:
    """`exp_dir` and `runner.log_dir` are relative to the folder in which the command was typed."""
    exp_dir = resolve_path(config, config.experiment.exp_dir)
    named = config.experiment.runner.log_dir
    return Outputs(
        exp_dir, resolve_path(config, named) if named else posixpath.join(exp_dir, LOG_DIRS[config.task_type])
    )


def resolve_path(config: Config, path: str) -> str:
    return posixpath.normpath(posixpath.join(str(config.cwd), path))


def backend_of(config: Config) -> str:
    return config.experiment.task.backend or DEFAULT_BACKENDS[config.task_type]


def require_entrypoint(config: Config) -> str:
    entrypoint = config.experiment.task.entrypoint
    if not entrypoint:
        raise UserError(f"experiment.task.entrypoint: is missing; a task of type {config.task_type} needs one")
    return entrypoint


def environment_of(config: Config, host: Host) -> tuple[tuple[str, str], ...]:
    """The environment of a host's processes: node over chip type over all over what the chip itself wants.

    Secrets are left out: the agent puts them in at launch.
    """
    experiment = config.experiment
    chip = find_chip(host.chip) if host.chip else None
    merged: dict[str, str] = {}
    if chip is not None:
        merged |= {"FLAGSCALE_CHIP": chip.name, **dict(chip.env)}
    merged |= experiment.envs
    merged |= experiment.device_type_specific.get(host.chip or "", {})
    merged |= experiment.node_specific.get(host.name, {})
    return tuple((name, value) for name, value in merged.items() if name not in config.secrets)


def bin_dirs_of(site: Site) -> tuple[str, ...]:
    return (site.bin_dir,) if site.bin_dir else ()


def plan_host(
    config: Config,
    outputs: Outputs,
    host: Host,
    node_rank: int,
    processes: tuple[ProcessSpec, ...],
    make_dirs: tuple[str, ...] = (),
    files: tuple[tuple[str, str], ...] = (),
) -> HostPlan:
    cmds = config.experiment.cmds
    dirs = (outputs.log_dir, outputs.pids_dir, outputs.details_dir, *make_dirs)
    return HostPlan(
        host=host,
        node_rank=node_rank,
        processes=processes,
        make_dirs=tuple(dict.fromkeys(dirs)),
        files=files,
        before_start=cmds.before_start,
        after_stop=cmds.after_stop,
    )


def plan_job(config: Config, outputs: Outputs, hosts: tuple[HostPlan, ...], **fields: Any) -> JobPlan:
    experiment = config.experiment
    return JobPlan(
        task=config.task_type,
        backend=backend_of(config),
        exp_name=experiment.exp_name,
        exp_dir=outputs.exp_dir,
        log_dir=outputs.log_dir,
        hosts=hosts,
        master_addr=master_of(config),
        master_port=experiment.runner.master_port,
        secrets=tuple(sorted(config.secrets.items())),
        foreground=experiment.runner.foreground,
        start_timeout_s=experiment.runner.start_timeout_s,
        **fields,
    )


def master_of(config: Config) -> str:
    return config.experiment.runner.master_addr or config.hosts[0].name


def plan_ray(
    config: Config, site: Site, host: Host, node_rank: int, env: tuple[tuple[str, str], ...]
) -> tuple[ProcessSpec, ...]:
    """The Ray node of one host of several: it stays in the foreground, so that the agent ends it with the job."""
    if len(config.hosts) == 1:
        return ()
    runner = config.experiment.runner
    argv: tuple[str, ...] = ("ray", "start", "--block", "--disable-usage-stats")
    if node_rank == 0:
        argv += ("--head", "--port", str(runner.ray_port), "--dashboard-port", str(runner.ray_dashboard_port))
    else:
        argv += ("--address", f"{master_of(config)}:{runner.ray_port}")
    chip = find_chip(host.chip) if host.chip else None
    if host.chip is None or (chip is not None and chip.device == "cuda"):
        argv += ("--num-gpus", str(host.slots))
    elif chip is not None and chip.device == "cpu":
        argv += ("--num-cpus", str(host.slots))
    return (ProcessSpec("ray", argv, site.root, env=env, bin_dirs=bin_dirs_of(site)),)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """A task section as the file that its entry point reads."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text
