"""`plan_serve`: a service as one job, its controller, which holds the plans of all replicas that it may start.

The controller runs on the launching machine. Every replica is a job of its own, in a folder of its own below
`<exp_dir>/serve/`, so that it is started, watched, logged and ended like any other.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from flagscale.errors import ConfigError, Fault, UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import CustomServe, ServeModel
from flagscale.runner.plan.common import (
    bin_dirs_of,
    dump_yaml,
    environment_of,
    find_outputs,
    plan_host,
    plan_job,
    require_entrypoint,
)
from flagscale.runner.plan.engines import (
    LOOPBACK,
    Arguments,
    count_devices,
    find_served_name,
    merge_arguments,
    model_argument,
    name_argument,
)
from flagscale.runner.plan.job import AtLaunch, HostPlan, JobPlan, ProcessSpec
from flagscale.runner.plan.placement import Ground, Need, Place
from flagscale.runner.plan.replica import Crowd, plan_replica
from flagscale.runner.plan.service import ModelPlan, Scaling, Seat, ServicePlan, encode_service
from flagscale.runner.plan.site import Site

DEFAULT_PORT = 8000
MOST_REPLICAS = 256
NAMED_OTHERWISE = ("llama_cpp", "native")
"""engines that would not call a model by the path it was given with"""


def plan_serve(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a service.

    Raises:
        UserError: the configuration asks for a shape of service that cannot be planned, or for more than there is.
    """
    deploy = config.experiment.runner.deploy
    if deploy.enable_composition or deploy.prefill_decode_disaggregation:
        key = "enable_composition" if deploy.enable_composition else "prefill_decode_disaggregation"
        raise UserError(f"experiment.runner.deploy.{key}: this release plans engines side by side, not this shape")
    if isinstance(config.task, CustomServe):
        return _plan_custom(config, hosts, site)
    service = plan_service(config, site)
    outputs = find_outputs(config)
    process = ProcessSpec(
        name="service",
        argv=("python", "-m", "flagscale.serve", AtLaunch("run_id", f"{outputs.exp_dir}/runs/", "/job.json")),
        cwd=site.root,
        env=(("PYTHONUNBUFFERED", "1"),),
        path_dirs=(site.root,),
        bin_dirs=(site.bin_dir,) if site.bin_dir else (),
    )
    dirs = (outputs.log_dir, outputs.pids_dir, outputs.details_dir)
    host = HostPlan(Host("localhost", 1), 0, (process,), make_dirs=dirs)
    sources = {source for _, source in config.secrets.items()} | ({deploy.api_key_env} if deploy.api_key_env else set())
    job = plan_job(config, outputs, (host,), service=encode_service(service))
    engines = ", ".join(dict.fromkeys(model.engine for model in service.models))
    secrets = tuple((source, source) for source in sorted(sources))
    return replace(
        job,
        backend=engines,
        secrets=secrets,
        master_addr="localhost",
        master_port=None,
        docker=None,
        no_shared_fs=False,
    )


@dataclass(slots=True)
class _Row:
    """What is known of one model while its service is planned."""

    index: int
    model: ServeModel
    arguments: Arguments
    scaling: Scaling
    need: Need
    places: list[Place] = field(default_factory=list)


def plan_service(config: Config, site: Site) -> ServicePlan:
    """The models of a service, each with the seats that its replicas can take.

    Raises:
        UserError: as `plan_serve`.
    """
    assert isinstance(config.task, tuple)
    rows = [_start_row(config, index, model) for index, model in enumerate(config.task)]
    ground = Ground(config)
    for row in rows:
        row.places = ground.place(row.need, row.scaling.highest)
    firsts = [place for row in rows for place in row.places[: row.scaling.initial]]
    crowd = dict(Counter(share.host.name for place in firsts for share in place))
    for row in rows:  # room for an update, which must not take what another model needs
        row.places += ground.place_more(row.need, row.scaling.highest)
    deploy = config.experiment.runner.deploy
    return ServicePlan(
        name=config.experiment.exp_name or "service",
        exp_dir=find_outputs(config).exp_dir,
        host=str(deploy.host or _find_one("host", rows) or LOOPBACK),
        port=_find_port(config, rows),
        api_key_env=deploy.api_key_env or "",
        models=tuple(_plan_model(config, site, row, crowd) for row in rows),
        router=tuple(deploy.router.items()),
        start_timeout_s=config.experiment.runner.start_timeout_s,
        host_lost_after_s=deploy.host_lost_after_s,
    )


def _start_row(config: Config, index: int, model: ServeModel) -> _Row:
    if model.engine is None:
        text = f"`{model.serve_id}` has no engine; a graph of models needs enable_composition"
        raise UserError(f"serve.{index}: {text}")
    arguments = merge_arguments(config, index, model)
    if "api_key" in arguments:
        text = "would stand on a command line"
        instead = "an environment variable with the key, named by experiment.runner.deploy.api_key_env"
        raise ConfigError([Fault(f"serve.{index}.engine_args.api_key", text, expected=instead)])
    return _Row(index, model, arguments, _scaling_of(index, model), count_devices(config, index, model, arguments))


def _plan_model(config: Config, site: Site, row: _Row, crowd: Crowd) -> ModelPlan:
    model, arguments = row.model, row.arguments
    assert model.engine is not None
    named = find_served_name(model.engine, arguments)
    served_name = named or str(arguments[model_argument(model.engine)])
    if named is None and model.engine in NAMED_OTHERWISE:
        arguments = {**arguments, name_argument(model.engine): served_name}
    seats = []
    for number, place in enumerate(row.places):
        exp_dir = f"{find_outputs(config).exp_dir}/serve/{model.serve_id}-{number}"
        job = plan_replica(config, site, model, arguments, place, exp_dir, crowd)
        seats.append(Seat(job, (exp_dir, *(name for share in place for name in share.takes))))
    return ModelPlan(model.serve_id, model.engine, served_name, row.scaling, tuple(seats))


def _scaling_of(index: int, model: ServeModel) -> Scaling:
    asked = model.resources
    lowest = asked.min_replicas if asked.min_replicas is not None else asked.num_replicas or 1
    highest = asked.max_replicas or max(lowest, asked.num_replicas or 1)
    initial = asked.num_replicas or lowest
    path = f"serve.{index}.resources"
    if lowest < 1:
        raise ConfigError([Fault(f"{path}.min_replicas", "is 0", expected="1 or more: a service keeps a replica")])
    if highest > MOST_REPLICAS:
        raise ConfigError([Fault(f"{path}.max_replicas", f"is {highest}", expected=f"at most {MOST_REPLICAS}")])
    if not lowest <= initial <= highest:
        text = f"min_replicas {lowest}, num_replicas {initial}, max_replicas {highest} are not in this order"
        raise ConfigError([Fault(path, text)])
    told = {
        "target": asked.target_ongoing_requests,
        "upscale_delay_s": asked.upscale_delay_s,
        "downscale_delay_s": asked.downscale_delay_s,
    }
    return Scaling(initial, lowest, highest, **{name: value for name, value in told.items() if value is not None})


def _find_one(name: str, rows: list[_Row]) -> Any:
    """An argument of the service that stands with its models: all that give it must agree."""
    found = {str(row.arguments[name]): row.arguments[name] for row in rows if row.arguments.get(name) is not None}
    if len(found) > 1:
        text = f"the models of one service name different ones: {', '.join(found)}"
        raise ConfigError([Fault(f"experiment.runner.deploy.{name}", text, expected=f"one {name} for all, named here")])
    return next(iter(found.values()), None)


def _find_port(config: Config, rows: list[_Row]) -> int:
    runner = config.experiment.runner
    if runner.cli_args is not None and runner.cli_args.port:
        return runner.cli_args.port
    if runner.deploy.port:
        return runner.deploy.port
    port = _find_one("port", rows)
    if port is None:
        return DEFAULT_PORT
    if not str(port).isascii() or not str(port).isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError([Fault("serve.0.engine_args.port", f"is {port}", expected="1 to 65535")])
    return int(port)


def _plan_custom(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    outputs = find_outputs(config)
    entrypoint = require_entrypoint(config)
    section: Any = config.values["serve"]
    path = f"{outputs.scripts_dir}/serve.yaml"
    process = ProcessSpec(
        name="serve",
        argv=("python", entrypoint, f"--config-path={path}"),
        cwd=site.root,
        entrypoint=entrypoint,
        env=environment_of(config, hosts[0]),
        path_dirs=(site.root,),
        bin_dirs=bin_dirs_of(config, site, hosts[0]),
    )
    row = plan_host(config, outputs, hosts[0], 0, (process,), files=((path, dump_yaml(section)),))
    return plan_job(config, outputs, (row,))
