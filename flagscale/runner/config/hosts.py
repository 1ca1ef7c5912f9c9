"""Which hosts a job runs on, and how many ranks each starts: what was asked for, or a fault, never less."""

import re
from dataclasses import replace

from flagscale.chips import find_chip
from flagscale.errors import Fault, find_nearest
from flagscale.runner.config.experiment import Experiment
from flagscale.runner.config.hostfile import Host

NODES = "experiment.runner.nnodes"
RANKS = "experiment.runner.nproc_per_node"
MASTER = "experiment.runner.master_addr"
COUNT = re.compile(r"([1-9]\d{0,5})(?::[1-9]\d{0,5})?")


def choose_hosts(
    experiment: Experiment, listed: tuple[Host, ...] | None
) -> tuple[tuple[Host, ...], list[Fault], list[Fault]]:
    """(hosts with the ranks they start as `slots`, faults, warnings).

    listed: the hostfile's hosts, None where there is no hostfile: then the job runs on this machine.
    """
    runner = experiment.runner
    faults: list[Fault] = []
    warnings: list[Fault] = []
    if runner.type == "cloud":
        return _choose_cloud(experiment, faults), faults, warnings
    count = _count_nodes(runner.nnodes, faults)
    if runner.type in ("ray", "slurm"):
        _check_scheduled(experiment, faults)
    if runner.type == "slurm" or (runner.type == "ray" and listed is None and runner.ray_address):
        return _choose_placeholders(experiment, count, faults), faults, warnings
    if listed is None:
        if count > 1:
            faults.append(Fault(NODES, f"is {count}, but there is no hostfile", expected="experiment.runner.hostfile"))
        hosts: tuple[Host, ...] = (Host("localhost", _local_slots(experiment), runner.device_type),)
    else:
        hosts = listed
        if runner.nnodes is not None and count > len(listed):
            faults.append(Fault(NODES, f"is {count}, but the hostfile names {len(listed)} hosts"))
        elif runner.nnodes is not None and count < len(listed):
            left = ", ".join(host.name for host in listed[count:])
            warnings.append(Fault(NODES, f"is {count}: of the hostfile's {len(listed)} hosts these stay idle: {left}"))
            hosts = listed[:count]
        away = [host.name for host in hosts if not host.is_local]
        if runner.type == "local" and away:
            text = f"is local, but the hostfile names other machines: {', '.join(away)}"
            faults.append(Fault("experiment.runner.type", text, expected="ssh, or a hostfile of `localhost` alone"))
        if _needs_master(experiment) and hosts[0].is_local and not all(host.is_local for host in hosts):
            text = f"is missing: the first host is `{hosts[0].name}`, a name by which the others would mean themselves"
            faults.append(Fault(MASTER, text, expected="a name or an address by which they reach it"))
    faults += _find_python_faults(experiment, listed or hosts)
    return tuple(_with_ranks(host, experiment, faults) for host in hosts), faults, warnings


def _find_python_faults(experiment: Experiment, listed: tuple[Host, ...]) -> list[Fault]:
    names = [host.name for host in listed]
    python = experiment.runner.python
    unknown = [name for name in python if name not in names] if isinstance(python, dict) else []
    return [
        Fault(f"experiment.runner.python.{name}", "is no host of this job", suggestion=find_nearest(name, names))
        for name in unknown
    ]


def _needs_master(experiment: Experiment) -> bool:
    """Whether hosts must find the first one by its name in the hostfile."""
    runner = experiment.runner
    return experiment.task.type in ("train", "serve", "rl") and not (runner.master_addr or runner.per_node_task)


def _count_nodes(nnodes: int | str | None, faults: list[Fault]) -> int:
    if match := COUNT.fullmatch(str(nnodes if nnodes is not None else 1)):
        return int(match[1])
    faults.append(Fault(NODES, f"is `{nnodes}`", expected="a whole number above 0, or `min:max`"))
    return 1


def _check_scheduled(experiment: Experiment, faults: list[Fault]) -> None:
    runner, kind = experiment.runner, experiment.task.type
    path = "experiment.runner.type"
    if kind == "serve":
        text = f"is {runner.type}, but it is the service's own controller that starts its replicas"
        faults.append(Fault(path, text, expected="ssh"))
    elif kind == "rl" and runner.type == "ray":
        text = "is ray, but a task of type rl starts a Ray cluster over its hosts by itself"
        faults.append(Fault(path, text, expected="ssh or slurm"))
    if runner.docker:
        text = f"is set, but with runner.type {runner.type} agents start on the host itself"
        faults.append(Fault("experiment.runner.docker", text, expected="ssh"))
    if runner.no_shared_fs:
        text = f"is true, but with runner.type {runner.type} agents are told of the run through its folder"
        faults.append(Fault("experiment.runner.no_shared_fs", text, expected="a folder that all hosts share"))


def _choose_placeholders(experiment: Experiment, count: int, faults: list[Fault]) -> tuple[Host, ...]:
    """`node0`, `node1`, ..: machines that a scheduler chooses."""
    runner = experiment.runner
    if runner.type == "slurm" and runner.hostfile:
        text = "is set, but with runner.type slurm it is Slurm that chooses the nodes"
        expected = "none; `experiment.runner.slurm.nodelist` asks for certain nodes"
        faults.append(Fault("experiment.runner.hostfile", text, expected=expected))
    slots = _local_slots(experiment)
    names = [f"node{number}" for number in range(count)]
    hosts = (Host(name, slots, runner.device_type, is_placeholder=True) for name in names)
    return tuple(_with_ranks(host, experiment, faults) for host in hosts)


def _choose_cloud(experiment: Experiment, faults: list[Fault]) -> tuple[Host, ...]:
    """This machine alone: the platform starts the same command on every node."""
    runner = experiment.runner
    for name, value in (
        ("node_rank", runner.node_rank),
        ("master_addr", runner.master_addr),
        ("master_port", runner.master_port),
        ("nnodes", runner.nnodes),
    ):
        if value is None:
            faults.append(Fault(f"experiment.runner.{name}", "is missing: runner.type cloud needs it"))
    count = _count_nodes(runner.nnodes, faults)
    if runner.node_rank is not None and runner.nnodes is not None and runner.node_rank >= count:
        text = f"is {runner.node_rank}, but runner.nnodes is {count}"
        faults.append(Fault("experiment.runner.node_rank", text, expected=f"0 to {count - 1}"))
    return (_with_ranks(Host("localhost", _local_slots(experiment), runner.device_type), experiment, faults),)


def _local_slots(experiment: Experiment) -> int:
    visible = _count_visible(experiment.envs, experiment.runner.device_type)
    return max(experiment.runner.nproc_per_node or 0, 1) if visible is None else visible


def _with_ranks(host: Host, experiment: Experiment, faults: list[Fault]) -> Host:
    """The host, its slots cut down to the ranks that were asked for, its chip filled in."""
    runner = experiment.runner
    chip = host.chip or runner.device_type
    envs = {
        **experiment.envs,
        **experiment.device_type_specific.get(chip or "", {}),
        **experiment.node_specific.get(host.name, {}),
    }
    visible = _count_visible(envs, chip)
    ranks = runner.nproc_per_node
    if ranks is None:
        ranks = min(host.slots, visible) if visible else host.slots
    elif ranks > host.slots:
        source = "its hostfile line has" if runner.hostfile else "the visible devices make"
        faults.append(Fault(RANKS, f"is {ranks}, but {source} {host.slots} slots on {host.name}"))
    elif visible is not None and ranks > visible:
        faults.append(Fault(RANKS, f"is {ranks}, but only {visible} devices are visible on {host.name}"))
    return replace(host, slots=ranks, chip=chip)


def _count_visible(envs: dict[str, str], chip: str | None) -> int | None:
    """How many devices the job's own environment makes visible, None where it does not say.

    A list that hides every device, empty or -1, is how jobs on a CPU are written: it counts nothing.
    """
    record = find_chip(chip) if chip else None
    names = record.visible_devices if record else [name for name in envs if name.endswith("_VISIBLE_DEVICES")]
    listed = next((envs[name] for name in names if name in envs), "")
    devices = [item for item in listed.split(",") if item.strip() and item.strip() != "-1"]
    return len(devices) or None
