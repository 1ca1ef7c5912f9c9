"""`plan_composed`: a graph of models as one job: a Ray cluster of our own over the hosts, and the program that answers.

The program starts the head of Ray beside it, and ends it: the words behind the address are the head's own command.
The other hosts run a Ray node under their agents. All share a token that is drawn at launch, for Ray listens on every
address.
"""

import hashlib
from dataclasses import replace

from flagscale.chips import find_chip
from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import ServeModel
from flagscale.runner.plan.common import (
    address_of,
    bin_dirs_of,
    environment_of,
    find_outputs,
    master_of,
    plan_host,
    plan_job,
    resolve_path,
)
from flagscale.runner.plan.engines import LOOPBACK
from flagscale.runner.plan.graph import GraphPlan, NodePlan
from flagscale.runner.plan.job import DRAWN, AtLaunch, HostPlan, JobPlan, ProcessSpec, Word
from flagscale.runner.plan.scaling import scaling_of
from flagscale.runner.plan.service import DEFAULT_PORT, ServicePlan, encode_service
from flagscale.runner.plan.site import Site

RAY_RESOURCES = {"cuda": "GPU", "npu": "NPU", "cpu": "CPU"}
"""torch's name of a device -> the name under which Ray counts such chips by itself"""
RAY_ENV = (
    ("RAY_AUTH_MODE", "token"),
    ("RAY_COLOR_PREFIX", "0"),
    ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0"),
)
"""A node is told to end when the service has drained: it has nothing to wait for."""
TOKEN = "RAY_AUTH_TOKEN"
STORE_BYTES = 500_000_000
"""of Ray's object store on each host, for results too large for a message"""


def plan_composed(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a graph of models.

    Raises:
        ConfigError: bounds of replicas contradict each other, or Ray does not count the chips that are asked for.
    """
    deploy, outputs = config.experiment.runner.deploy, find_outputs(config)
    service = ServicePlan(
        name=config.experiment.exp_name or "service",
        exp_dir=outputs.exp_dir,
        host=deploy.host or LOOPBACK,
        port=_find_port(config),
        api_key_env=deploy.api_key_env or "",
        models=(),
        router=tuple(deploy.router.items()),
        start_timeout_s=config.experiment.runner.start_timeout_s,
        graph=plan_graph(config, hosts),
    )
    rows = []
    for node_rank, host in enumerate(hosts):
        process = _plan_program(config, site, hosts) if node_rank == 0 else _plan_worker(config, site, hosts, node_rank)
        rows.append(_with_scratch(plan_host(config, outputs, host, node_rank, (process,)), outputs.exp_dir))
    secrets = {**config.secrets, TOKEN: DRAWN}
    if deploy.api_key_env:
        secrets[deploy.api_key_env] = deploy.api_key_env
    job = plan_job(config, outputs, tuple(rows), service=encode_service(service))
    return replace(job, backend="Ray Serve", secrets=tuple(sorted(secrets.items())), master_port=_ray_port(config))


def plan_graph(config: Config, hosts: tuple[Host, ...]) -> GraphPlan:
    """The nodes, and what a request holds."""
    assert isinstance(config.task, tuple)
    deploy = config.experiment.runner.deploy
    request = deploy.request
    nodes: list[NodePlan] = []
    faults: list[Fault] = []
    for index, model in enumerate(config.task):
        try:
            nodes.append(_plan_node(config, hosts, index, model))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return GraphPlan(
        nodes=tuple(nodes),
        route=deploy.name or "/",
        request=tuple(zip(request.args, request.types, strict=True)) if request else (),
        working_dir=resolve_path(config, deploy.working_dir) if deploy.working_dir else "",
        num_hosts=len(hosts),
    )


def _plan_node(config: Config, hosts: tuple[Host, ...], index: int, model: ServeModel) -> NodePlan:
    asked, path = model.resources, f"serve.{index}.resources"
    gpu_name = "GPU"
    if asked.num_gpus:
        chips = {host.chip for host in hosts if host.chip}
        devices = {chip.device for name in chips if (chip := find_chip(name))}
        if unknown := devices - RAY_RESOURCES.keys():
            text = f"asks for chips of {', '.join(sorted(chips))}, which Ray does not hand out ({', '.join(unknown)})"
            raise ConfigError([Fault(f"{path}.num_gpus", text)])
        if devices == {"cpu"}:
            text = f"is {asked.num_gpus:g}, but the hosts have none: {', '.join(sorted(chips))}"
            raise ConfigError([Fault(f"{path}.num_gpus", text, expected="none, or num_cpus")])
        gpu_name = RAY_RESOURCES[min(devices - {"cpu"}, default="cuda")]
    return NodePlan(
        name=model.serve_id,
        path=resolve_path(config, str(model.module)),
        class_name=str(model.name),
        depends=tuple(model.depends),
        scaling=scaling_of(index, model),
        num_gpus=asked.num_gpus or 0.0,
        num_cpus=asked.num_cpus or 0.0,
        gpu_name=gpu_name,
    )


def _plan_program(config: Config, site: Site, hosts: tuple[Host, ...]) -> ProcessSpec:
    job = AtLaunch("run_id", f"{find_outputs(config).exp_dir}/runs/", "/job.json")
    argv = ("python", "-m", "flagscale.serve.graph", job, _ray_address(config, LOOPBACK))
    head: tuple[Word, ...] = ("--head", "--port", _ray_port_word(config), "--include-dashboard", "false")
    head += ("--ray-client-server-port", AtLaunch("next_port"))
    if len(hosts) > 1:
        head += ("--node-ip-address", master_of(config))
    return _process("graph", config, site, hosts[0], (*argv, *_ray_words(config, hosts[0], 0, head)))


def _plan_worker(config: Config, site: Site, hosts: tuple[Host, ...], node_rank: int) -> ProcessSpec:
    role = ("--address", _ray_address(config, master_of(config)))
    words = _ray_words(config, hosts[node_rank], node_rank, role)
    return _process("ray", config, site, hosts[node_rank], ("python", "-m", "flagscale.serve.graph.ray_node", *words))


def _process(name: str, config: Config, site: Site, host: Host, argv: tuple[Word, ...]) -> ProcessSpec:
    runner = config.experiment.runner
    bin_dirs = ((runner.bin_dir,) if runner.bin_dir else ()) + bin_dirs_of(config, site, host)
    env = (*environment_of(config, host), *RAY_ENV)
    return ProcessSpec(name, argv, site.root, env=env, path_dirs=(site.root,), bin_dirs=bin_dirs)


def _ray_words(config: Config, host: Host, node_rank: int, role: tuple[Word, ...]) -> tuple[Word, ...]:
    """The command of one Ray node: in the foreground, every port a free one, its scratch folder its own."""
    words: tuple[Word, ...] = ("ray", "start", "--block", "--disable-usage-stats", *role)
    words += (
        "--temp-dir",
        _scratch_of(find_outputs(config).exp_dir, node_rank),
        "--object-store-memory",
        str(STORE_BYTES),
    )
    for port in ("--min-worker-port", "--max-worker-port", "--dashboard-agent-listen-port"):
        words += (port, "0")
    words += ("--dashboard-agent-grpc-port", "0", "--metrics-export-port", "0")
    runner = config.experiment.runner
    chip = find_chip(host.chip) if host.chip else None
    if chip is not None and chip.device == "cpu":
        return (*words, "--num-gpus", "0", *(("--num-cpus", str(host.slots)) if runner.hostfile else ()))
    is_counted = runner.hostfile is not None or runner.nproc_per_node is not None
    if is_counted and (chip is None or chip.device == "cuda"):
        words += ("--num-gpus", str(host.slots))
    return words


def _scratch_of(exp_dir: str, node_rank: int) -> str:
    """Short, for Ray puts sockets into it, whose names have at most 107 bytes; no other living run has this folder."""
    return f"/tmp/fs-{hashlib.sha256(exp_dir.encode()).hexdigest()[:12]}-{node_rank}"


def _with_scratch(host: HostPlan, exp_dir: str) -> HostPlan:
    """The host, that makes a folder for Ray before its process and removes it after."""
    scratch = _scratch_of(exp_dir, host.node_rank)
    before = f"rm -rf -- {scratch} && mkdir -m 700 -- {scratch} || exit 1"
    after = f"rm -rf -- {scratch}"
    return replace(
        host,
        before_start="\n".join([before, *filter(None, [host.before_start])]),
        after_stop="\n".join([*filter(None, [host.after_stop]), after]),
    )


def _ray_port(config: Config) -> int | None:
    """The port of Ray's head where the configuration names one, else a free one is chosen at launch."""
    runner = config.experiment.runner
    return runner.master_port or (runner.ray_port if "ray_port" in runner.model_fields_set else None)


def _ray_port_word(config: Config) -> Word:
    port = _ray_port(config)
    return str(port) if port else AtLaunch("master_port")


def _ray_address(config: Config, host: str) -> Word:
    port = _ray_port(config)
    return address_of(host, port) if port else AtLaunch("master_port", address_of(host, ""))


def _find_port(config: Config) -> int:
    runner = config.experiment.runner
    told = runner.cli_args.port if runner.cli_args is not None else None
    return told or runner.deploy.port or DEFAULT_PORT
