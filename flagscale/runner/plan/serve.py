"""`plan_serve`: an engine process for each model, over as many hosts as there are."""

from typing import Any

from flagscale.errors import UserError
from flagscale.runner.config.arguments import GivenArgument
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import CustomServe, ServeModel
from flagscale.runner.config.vocabulary import translate_engine_args
from flagscale.runner.plan.common import (
    bin_dirs_of,
    dump_yaml,
    environment_of,
    find_outputs,
    master_endpoint,
    master_of,
    plan_host,
    plan_job,
    plan_ray,
    require_entrypoint,
)
from flagscale.runner.plan.job import JobPlan, ProcessSpec, Word, freeze
from flagscale.runner.plan.site import Site

LOOPBACK = "127.0.0.1"


def plan_serve(config: Config, hosts: tuple[Host, ...], site: Site) -> JobPlan:
    """The plan of a service.

    Raises:
        UserError: the configuration asks for a shape of service that cannot be planned.
    """
    deploy = config.experiment.runner.deploy
    if deploy.enable_composition or deploy.prefill_decode_disaggregation:
        key = "enable_composition" if deploy.enable_composition else "prefill_decode_disaggregation"
        raise UserError(f"experiment.runner.deploy.{key}: this release plans engines side by side, not this shape")
    if isinstance(config.task, CustomServe):
        return _plan_custom(config, hosts, site)
    assert isinstance(config.task, tuple)
    outputs = find_outputs(config)
    rows = []
    for node_rank, host in enumerate(hosts):
        env = environment_of(config, host)
        engines = [model.engine for model in config.task]
        processes = plan_ray(config, site, host, node_rank, env) if "vllm" in engines else ()
        for index, model in enumerate(config.task):
            if model.engine is None:
                raise UserError(
                    f"serve.{index}: `{model.serve_id}` has no engine; a graph of models needs enable_composition"
                )
            if node_rank == 0 or model.engine == "sglang":
                processes += (_plan_engine(config, site, host, node_rank, index, model, env),)
        rows.append(plan_host(config, outputs, host, node_rank, processes))
    return plan_job(config, outputs, tuple(rows))


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
        bin_dirs=bin_dirs_of(site),
    )
    row = plan_host(config, outputs, hosts[0], 0, (process,), files=((path, dump_yaml(section)),))
    return plan_job(config, outputs, (row,))


def _plan_engine(
    config: Config,
    site: Site,
    host: Host,
    node_rank: int,
    index: int,
    model: ServeModel,
    env: tuple[tuple[str, str], ...],
) -> ProcessSpec:
    arguments = _engine_arguments(config, host, index, model)
    if model.engine == "vllm":
        argv: tuple[Word, ...] = ("vllm", "serve", str(arguments.pop("model", "")))
    elif model.engine == "sglang":
        argv = ("python", "-m", "sglang.launch_server", *_sglang_nodes(config, node_rank))
    else:
        argv = ("./third_party/llama.cpp/build/bin/llama-server",)
    assert model.engine is not None
    return ProcessSpec(
        name=model.serve_id,
        argv=argv,
        cwd=site.root,
        backend=model.engine,
        arguments=tuple((name, freeze(value)) for name, value in arguments.items()),
        env=env,
        path_dirs=(site.root,),
        bin_dirs=bin_dirs_of(site),
    )


def _engine_arguments(config: Config, host: Host, index: int, model: ServeModel) -> dict[str, Any]:
    """The model's arguments; over them its host's, the deployment's port, and what `flagscale serve` was told."""
    runner = config.experiment.runner
    given: list[GivenArgument] = list(config.arguments[index])
    laid_over: dict[str, Any] = dict(config.experiment.node_args.get(host.name, {}).get("engine_args", {}))
    if runner.deploy.port and len(config.arguments) == 1:
        laid_over["port"] = runner.deploy.port
    if runner.cli_args is not None:
        laid_over |= runner.cli_args.engine_args
        laid_over |= {"model": runner.cli_args.model_path} if runner.cli_args.model_path else {}
        laid_over |= {"port": runner.cli_args.port} if runner.cli_args.port else {}
    assert model.engine is not None
    given += translate_engine_args(model.engine, laid_over, {}, "experiment.runner.cli_args")
    merged = {argument.name: argument.value for argument in given}
    return {"host": LOOPBACK, **merged}


def _sglang_nodes(config: Config, node_rank: int) -> tuple[Word, ...]:
    if len(config.hosts) == 1:
        return ()
    endpoint = master_endpoint(config, master_of(config))
    return ("--node-rank", str(node_rank), "--nnodes", str(len(config.hosts)), "--dist-init-addr", endpoint)
