"""What the plans of all task types share: folders, environments, and a Ray cluster where several hosts need one."""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.chips import find_chip
from flagscale.chips.records import GLOO_INTERFACE
from flagscale.errors import UserError
from flagscale.runner.config.experiment import DEFAULT_BACKENDS, Runner
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import Train
from flagscale.runner.plan.job import AtLaunch, HostPlan, JobPlan, LauncherName, ProcessSpec, Word
from flagscale.runner.plan.site import Site

LOG_DIRS = {
    "train": "logs",
    "rl": "logs",
    "inference": "inference_logs",
    "serve": "serve_logs",
    "compress": "compress_logs",
}


_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_KEYWORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


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
    """`exp_dir` and the log folder are relative to the folder in which the command was typed."""
    exp_dir = resolve_path(config, config.experiment.exp_dir)
    named = config.experiment.runner.log_dir or _find_logging_dir(config)
    return Outputs(
        exp_dir, resolve_path(config, named) if named else posixpath.join(exp_dir, LOG_DIRS[config.task_type])
    )


def _find_logging_dir(config: Config) -> str | None:
    """`train.system.logging.log_dir`, where FlagScale's task files name it."""
    logging = config.task.system.get("logging") if isinstance(config.task, Train) else None
    named = logging.get("log_dir", logging.get("log-dir")) if isinstance(logging, dict) else None
    return str(named) if named else None


def resolve_path(config: Config, path: str) -> str:
    """The path from the folder in which the command was typed; an address such as `msc://..` as it is."""
    return path if "://" in path else posixpath.normpath(posixpath.join(str(config.cwd), path))


def backend_of(config: Config) -> str:
    return config.experiment.task.backend or DEFAULT_BACKENDS[config.task_type]


def require_entrypoint(config: Config) -> str:
    entrypoint = config.experiment.task.entrypoint
    if not entrypoint:
        raise UserError(f"experiment.task.entrypoint: is missing; a task of type {config.task_type} needs one")
    return entrypoint


def environment_of(config: Config, host: Host) -> tuple[tuple[str, str], ...]:
    """The environment of a host's processes: node over chip type over all over what the chip itself wants.

    Python writes its lines as they come (PYTHONUNBUFFERED): into a file it would keep back what a rank that dies had
    to say. Secrets are left out: the agent puts them in at launch.
    """
    experiment = config.experiment
    chip = find_chip(host.chip) if host.chip else None
    merged = {"PYTHONUNBUFFERED": "1"}
    if chip is not None:
        merged |= {"FLAGSCALE_CHIP": chip.name, **dict(chip.env)}
    merged |= experiment.envs
    merged |= experiment.device_type_specific.get(host.chip or "", {})
    merged |= experiment.node_specific.get(host.name, {})
    return tuple((name, value) for name, value in merged.items() if name not in config.secrets)


def python_of(config: Config, host: Host) -> str | None:
    """The interpreter that the configuration names for a host."""
    named = config.experiment.runner.python
    return named.get(host.name) if isinstance(named, dict) else named


def bin_dirs_of(config: Config, site: Site, host: Host) -> tuple[str, ...]:
    """What goes before the PATH of a host's processes: the folder of its interpreter.

    A container has a PATH of its own, and the launcher's folders are not in it.
    """
    if named := python_of(config, host):
        return (posixpath.dirname(named),) if "/" in named else ()
    return (site.bin_dir,) if site.bin_dir and not config.experiment.runner.docker else ()


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
    peer = _find_peer(config, node_rank)
    return HostPlan(
        host=host,
        node_rank=node_rank,
        processes=processes,
        make_dirs=tuple(dict.fromkeys(dirs)),
        files=files,
        before_start=cmds.before_start,
        after_stop=cmds.after_stop,
        peer=peer,
        interface_vars=_interface_vars(config, host) if peer or is_master_unknown(config) else (),
        python=python_of(config, host),
    )


def _find_peer(config: Config, node_rank: int) -> str:
    """A host that this one must reach: the first one, and for that one the second."""
    runner = config.experiment.runner
    if config.task_type in ("inference", "compress") or runner.per_node_task:
        return ""
    if is_master_unknown(config):
        return ""  # `keeper.py` knows it, once a scheduler has chosen
    if node_rank > 0:
        return master_of(config)
    return config.hosts[1].name if len(config.hosts) > 1 else ""


def _interface_vars(config: Config, host: Host) -> tuple[str, ...]:
    """What the collectives of the host's chip heed, less what the configuration sets itself."""
    chip = find_chip(host.chip) if host.chip else None
    given = dict(environment_of(config, host))
    return tuple(name for name in (chip.interfaces if chip else (GLOO_INTERFACE,)) if name not in given)


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
        ssh_port=experiment.runner.ssh_port,
        accept_new_host_keys=experiment.runner.accept_new_host_keys,
        ssh_client=experiment.runner.ssh_client,
        launcher=launcher_of(experiment.runner),
        launcher_options=launcher_options_of(experiment.runner),
        no_shared_fs=experiment.runner.no_shared_fs,
        docker=experiment.runner.docker,
        **fields,
    )


def launcher_of(runner: Runner) -> LauncherName:
    return runner.type if runner.type == "ray" or runner.type == "slurm" else "direct"


def launcher_options_of(runner: Runner) -> tuple[tuple[str, str], ...]:
    if runner.type == "slurm":
        return runner.slurm.list_options()
    if runner.type == "ray":
        address = (("address", runner.ray_address),) if runner.ray_address else ()
        return (*address, ("wait_s", f"{runner.ray_wait_s:g}"))
    return ()


def master_of(config: Config) -> str:
    return config.experiment.runner.master_addr or config.hosts[0].name


def address_of(host: str, port: int | str) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_master_unknown(config: Config) -> bool:
    """Whether only a scheduler will say which machine is the first."""
    return config.hosts[0].is_placeholder and config.experiment.runner.master_addr is None


def master_endpoint(config: Config, host: str) -> Word:
    """Where ranks meet: the configuration's port, or the one that is chosen at launch."""
    port = config.experiment.runner.master_port
    if is_master_unknown(config) and host == master_of(config):
        return AtLaunch("master_addr", "", f":{port}") if port else AtLaunch("master_endpoint")
    return address_of(host, port) if port else AtLaunch("master_port", address_of(host, ""))


def plan_ray(
    config: Config,
    site: Site,
    host: Host,
    node_rank: int,
    env: tuple[tuple[str, Word], ...],
    hosts: tuple[Host, ...] = (),
) -> tuple[ProcessSpec, ...]:
    """The Ray node of one host of several: it stays in the foreground, so that the agent ends it with the job.

    hosts: those of this cluster, its head first; default all hosts of the job
    """
    hosts = hosts or config.hosts
    if len(hosts) == 1:
        return ()
    runner = config.experiment.runner
    argv: tuple[Word, ...] = ("ray", "start", "--block", "--disable-usage-stats")
    if node_rank == 0:
        argv += ("--head", "--port", str(runner.ray_port), "--dashboard-port", str(runner.ray_dashboard_port))
    else:
        argv += ("--address", ray_address(config, hosts))
    chip = find_chip(host.chip) if host.chip else None
    if host.chip is None or (chip is not None and chip.device == "cuda"):
        argv += ("--num-gpus", str(host.slots))
    elif chip is not None and chip.device == "cpu":
        argv += ("--num-cpus", str(host.slots))
    bin_dirs = ((runner.bin_dir,) if runner.bin_dir else ()) + bin_dirs_of(config, site, host)
    return (ProcessSpec("ray", argv, site.root, env=env, bin_dirs=bin_dirs),)


def ray_address(config: Config, hosts: tuple[Host, ...]) -> Word:
    """Where the head of a Ray cluster of these hosts answers."""
    if is_master_unknown(config):
        return AtLaunch("master_addr", "", f":{config.experiment.runner.ray_port}")
    head = master_of(config) if hosts[0] is config.hosts[0] else hosts[0].name
    return address_of(head, config.experiment.runner.ray_port)


def dump_yaml(values: Mapping[str, Any] | None) -> str:
    """A task section as the file that its entry point reads."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Strings in quotes, unless they are plain words: readers differ on what `1e-5`, `on` or `12:30` are."""

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        style = None if _PLAIN.fullmatch(text) and text.lower() not in _KEYWORDS else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)

    Dumper.add_representer(str, represent)
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    text: str = yaml.dump(dict(values or {}), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text
