"""A job as a value: everything that will run, on every host, before anything runs.

A plan is made by pure functions from a configuration and a list of hosts. It can be printed, compared, kept as JSON and
run again. What only the moment of launch can know (a free port, the run's id) stands in it by name, as `AtLaunch`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from flagscale.errors import UserError
from flagscale.runner.config.hostfile import Host

PLAN_VERSION = 1

LaunchName = Literal["master_port", "next_port", "num_threads", "run_id", "master_addr", "master_endpoint"]
"""master_port: a free port of the head host; next_port: the one after it; num_threads: a replica's part of a CPU;
master_addr: the first machine where a scheduler chooses it; master_endpoint: `<master_addr>:<master_port>`"""
DRAWN = "drawn at launch"
"""In place of a variable's name, as the source of a secret: a random word that no one but the job's processes know."""
LauncherName = Literal["direct", "ray", "slurm"]


@dataclass(frozen=True, slots=True)
class AtLaunch:
    """A word of which a part is known only at launch: `before + <value of name> + after`."""

    name: LaunchName
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        return f"{self.before}<{self.name}: chosen at launch>{self.after}"

    def bind(self, values: "dict[LaunchName, str]") -> str:
        return f"{self.before}{values[self.name]}{self.after}"


Word: TypeAlias = str | AtLaunch


@dataclass(frozen=True, slots=True)
class BackendTree:
    """A folder that a process imports its backend from.

    chip: whose patch set the folder must bear; None where any will do
    """

    path: str
    backend: str
    chip: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process group on one host: a program, or a torchrun with its ranks.

    argv: the program and its fixed words; `arguments` follow, as the renderer of `backend` spells them
    arguments: (name, JSON value) in order
    entrypoint: a file that must exist under `cwd`
    num_ranks: how many ranks it starts on this host; 0 where the program has no ranks
    first_rank: the global rank of its local rank 0
    announces: its ranks write `rank_<rank>.up` into $FLAGSCALE_RANK_DIR once they are past their start
    env: exported in this order; names in `JobPlan.secrets` are not here, the agent puts them in at launch
    path_dirs: put before PYTHONPATH
    bin_dirs: put before PATH
    tree: the backend's; it stands in path_dirs too
    """

    name: str
    argv: tuple[Word, ...]
    cwd: str
    backend: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    entrypoint: str | None = None
    num_ranks: int = 0
    first_rank: int = 0
    announces: bool = False
    env: tuple[tuple[str, Word], ...] = ()
    path_dirs: tuple[str, ...] = ()
    bin_dirs: tuple[str, ...] = ()
    tree: BackendTree | None = None


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What one host does: shell before, folders, files, processes, shell after."""

    host: Host
    node_rank: int
    processes: tuple[ProcessSpec, ...]
    make_dirs: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    """(absolute path, content), written before the processes start"""
    before_start: str | None = None
    after_stop: str | None = None
    peer: str = ""
    """the address of another host of the job; empty where this one is alone, or the planner does not know any"""
    interface_vars: tuple[str, ...] = ()
    """variables that get the interface which leads to `peer`, found on the host, where nothing else sets them"""
    python: str | None = None
    """the interpreter there; None: the launcher's own path, in a container `python3`"""

    @property
    def label(self) -> str:
        """The contract's name of this host in every log and script: `host_<rank>_<host>`."""
        return f"host_{self.node_rank}_{self.host.name}"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A whole job.

    exp_dir, log_dir: absolute; log_dir holds scripts/, pids/, details/ and one `<label>.output` a host
    checkpoint_dir: where a training job saves and looks for what it resumes from, None for other tasks
    secrets: (name in the job, name in the launcher's environment or `DRAWN`) of variables whose values are written
        nowhere
    foreground: stay attached and return the job's exit code
    """

    task: str
    backend: str
    exp_name: str
    exp_dir: str
    log_dir: str
    hosts: tuple[HostPlan, ...]
    master_addr: str = "localhost"
    master_port: int | None = None
    """None: a free port is chosen on the head host at launch"""
    checkpoint_dir: str | None = None
    load_dir: str | None = None
    secrets: tuple[tuple[str, str], ...] = ()
    foreground: bool = False
    start_timeout_s: float = 1800.0
    ssh_port: int | None = None
    launcher: LauncherName = "direct"
    """direct: this machine, or hosts over SSH"""
    launcher_options: tuple[tuple[str, str], ...] = ()
    """for slurm: options of sbatch, the value empty for a switch; for ray: `address`, `wait_s`"""
    accept_new_host_keys: bool = False
    """remember the key of a host that was never met; one that changed is refused in any case"""
    ssh_client: Literal["paramiko", "openssh"] = "paramiko"
    no_shared_fs: bool = False
    """each host has an experiment folder of its own, on the same path"""
    docker: str | None = None
    """the container on every host that the job runs in, and its agent with it"""
    service: Mapping[str, Any] | None = None
    """what the controller of a service is told (`plan/service.py`)"""
    version: int = PLAN_VERSION

    @property
    def num_ranks(self) -> int:
        return sum(process.num_ranks for host in self.hosts for process in host.processes)


def freeze(value: Any) -> Any:
    """A JSON value that cannot be changed: lists become tuples, mappings read-only."""
    if isinstance(value, Mapping):
        return MappingProxyType({str(key): freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _encode(value: Any) -> Any:
    if isinstance(value, AtLaunch):
        return {"at_launch": value.name, "before": value.before, "after": value.after}
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def encode_plan(plan: JobPlan) -> dict[str, Any]:
    """The plan as JSON values: key order is the fields' order, so equal plans give equal bytes."""
    encoded: dict[str, Any] = _encode(plan)
    return encoded


def _word(value: Any) -> Word:
    if isinstance(value, dict):
        return AtLaunch(value["at_launch"], value["before"], value["after"])
    return str(value)


def _process(row: dict[str, Any]) -> ProcessSpec:
    words = tuple(_word(word) for word in row["argv"])
    env = tuple((name, _word(value)) for name, value in row["env"])
    dirs = {name: tuple(row[name]) for name in ("path_dirs", "bin_dirs")}
    arguments = tuple((name, freeze(value)) for name, value in row["arguments"])
    tree = BackendTree(**row["tree"]) if row.get("tree") else None
    return ProcessSpec(**{**row, **dirs, "argv": words, "env": env, "arguments": arguments, "tree": tree})


def _host(row: dict[str, Any]) -> HostPlan:
    return HostPlan(
        **{
            **row,
            "host": Host(**row["host"]),
            "processes": tuple(_process(process) for process in row["processes"]),
            "make_dirs": tuple(row["make_dirs"]),
            "files": tuple((path, content) for path, content in row["files"]),
            "interface_vars": tuple(row.get("interface_vars", ())),
        }
    )


def decode_plan(row: dict[str, Any]) -> JobPlan:
    """The inverse of `encode_plan`.

    Raises:
        UserError: the plan was written by a version of this toolkit that this one cannot read.
    """
    if row.get("version") != PLAN_VERSION:
        raise UserError(f"this plan has version {row.get('version')}; this release reads version {PLAN_VERSION}")
    hosts = tuple(_host(host) for host in row["hosts"])
    pairs = {name: tuple((key, value) for key, value in row.get(name, ())) for name in ("secrets", "launcher_options")}
    return JobPlan(**{**row, **pairs, "hosts": hosts})
