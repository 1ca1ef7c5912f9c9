"""How each engine is started: its fixed words, its arguments in its own spelling, the chips that one replica needs.

An engine answers to the service's router only: it listens on the loopback, or where its router is on another machine on
every address, behind a key that the controller draws. So `port`, `host` and `api_key` of a model are the service's, and
the engine's own come from here.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from flagscale.errors import ConfigError, Fault
from flagscale.runner.config.arguments import check_arguments
from flagscale.runner.config.catalogue import load_catalogue
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import ServeModel
from flagscale.runner.config.vocabulary import translate_engine_args
from flagscale.runner.plan.common import address_of, bin_dirs_of
from flagscale.runner.plan.job import AtLaunch, ProcessSpec, Word, freeze
from flagscale.runner.plan.placement import Need, Place, chip_of
from flagscale.runner.plan.service import ENGINE_KEY
from flagscale.runner.plan.site import Site

LOOPBACK = "127.0.0.1"
OF_SERVICE = ("host", "port", "api_key", "api_key_env")
"""arguments that say how the service is reached, whichever engine is behind it"""
KEY_VARIABLES = {"vllm": "VLLM_API_KEY", "llama_cpp": "LLAMA_API_KEY", "native": ENGINE_KEY, "sglang": ENGINE_KEY}
"""where each engine reads the key that its router shows"""
MODEL_ARGUMENTS = {"sglang": "model_path"}
NAME_ARGUMENTS = {"llama_cpp": "alias"}
SIZES: dict[str, tuple[str, ...]] = {
    "vllm": ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    "sglang": ("tp_size", "pp_size"),
}
MOST_DEVICES = 65536

Arguments = dict[str, Any]
Environment = tuple[tuple[str, Word], ...]


def model_argument(engine: str) -> str:
    return MODEL_ARGUMENTS.get(engine, "model")


def merge_arguments(config: Config, index: int, model: ServeModel) -> Arguments:
    """A model's arguments in its engine's words, with what `flagscale serve` was told laid over them.

    Raises:
        ConfigError: what was told on the command line is no argument of the engine.
    """
    assert model.engine is not None
    told = config.experiment.runner.cli_args
    merged = {argument.name: argument.value for argument in config.arguments[index]}
    if told is not None:
        laid_over = dict(told.engine_args) | ({"model": told.model_path} if told.model_path else {})
        merged |= _translate(config, model.engine, laid_over, "experiment.runner.cli_args")
    return merged


def merge_host_arguments(config: Config, host_name: str, engine: str) -> Arguments:
    """What `experiment.node_args` lays over the arguments of an engine on one host."""
    laid_over = config.experiment.node_args.get(host_name, {}).get("engine_args", {})
    return _translate(config, engine, laid_over, f"experiment.node_args.{host_name}")


def _translate(config: Config, engine: str, laid_over: Mapping[str, Any], path: str) -> Arguments:
    given = translate_engine_args(engine, laid_over, {}, path)
    faults, _ = check_arguments(given, load_catalogue(engine), config.experiment.task.unknown_args)
    if faults:
        raise ConfigError(faults)
    return {argument.name: argument.value for argument in given}


def count_devices(config: Config, index: int, model: ServeModel, arguments: Arguments) -> Need:
    """The chips of one replica: as told by `resources.num_gpus`, else what its parallel sizes multiply to.

    Raises:
        ConfigError: that is no number of chips.
    """
    assert model.engine is not None
    path, told = f"serve.{index}", model.resources.num_gpus
    if chip_of(config.hosts[0], model.engine).device == "cpu":
        return Need(path, 0, "the CPU")
    if told is not None and (told > MOST_DEVICES or told != int(told)):
        expected = "a whole number of chips for a replica"
        raise ConfigError([Fault(f"{path}.resources.num_gpus", f"is {told:g}", expected)])
    sizes = {name: _size_of(name, arguments, path) for name in SIZES.get(model.engine, ())}
    product = prod(sizes.values())
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if product > MOST_DEVICES:
        raise ConfigError([Fault(path, f"{' × '.join(words)} is {product} chips", expected=f"at most {MOST_DEVICES}")])
    if told is None:
        return Need(path, product, " × ".join(words) or "one for a replica")
    if 0 < told < product:
        text = f"is {told:g}, but {' × '.join(words)} needs {product} chips"
        raise ConfigError([Fault(f"{path}.resources.num_gpus", text)])
    return Need(path, int(told), f"resources.num_gpus {told:g}")


def _size_of(name: str, arguments: Arguments, path: str) -> int:
    value = arguments.get(name, 1)
    try:
        size = int(value)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError([Fault(f"{path}.engine_args.{name}", f"is {value}", expected="a whole number above 0")])
    return size


def plan_engine(
    config: Config, site: Site, model: ServeModel, arguments: Arguments, place: Place, node_rank: int, env: Environment
) -> ProcessSpec:
    """The process of one replica on one of its hosts."""
    engine = model.engine
    assert engine is not None
    is_here = all(share.host.is_local for share in place)
    host = LOOPBACK if is_here else "0.0.0.0"
    own = {name: value for name, value in arguments.items() if name not in OF_SERVICE}
    own |= merge_host_arguments(config, place[node_rank].host.name, engine)
    bin_dir = config.experiment.runner.bin_dir
    port = AtLaunch("master_port")
    argv: tuple[Word, ...]
    if engine == "vllm":
        argv = ("vllm", "serve", str(own.pop("model", "")), "--host", host, "--port", port)
        if len(place) > 1:
            own.setdefault("distributed_executor_backend", "ray")
    elif engine == "sglang":
        module = ("sglang.launch_server",) if is_here else ("flagscale.serve.keyed", "sglang.launch_server")
        argv = ("python", "-m", *module, "--host", host, "--port", port, *_sglang_nodes(config, place, node_rank))
    elif engine == "llama_cpp":
        argv = ("llama-server", "--host", host, "--port", port)
    else:
        argv = ("python", "-m", "flagscale.inference.server", "--host", host, "--port", port)
        argv += ("--api-key-env", ENGINE_KEY)
    folders = (bin_dir, f"{site.root}/third_party/llama.cpp/build/bin" if engine == "llama_cpp" else None)
    return ProcessSpec(
        name=model.serve_id,
        argv=argv,
        cwd=site.root,
        backend=engine,
        arguments=tuple((name, freeze(value)) for name, value in own.items()),
        env=env,
        path_dirs=(site.root,),
        bin_dirs=(*(folder for folder in folders if folder), *bin_dirs_of(config, site, place[node_rank].host)),
    )


def _sglang_nodes(config: Config, place: Place, node_rank: int) -> tuple[Word, ...]:
    if len(place) == 1:
        return ()
    head, port = place[0].host.name, config.experiment.runner.master_port
    endpoint: Word = address_of(head, port) if port else AtLaunch("next_port", address_of(head, ""))
    return ("--node-rank", str(node_rank), "--nnodes", str(len(place)), "--dist-init-addr", endpoint)


def find_served_name(engine: str, arguments: Arguments) -> str | None:
    """What requests call the model, where its arguments say so."""
    named = arguments.get(name_argument(engine))
    if isinstance(named, list | tuple):
        return str(named[0]) if named else None
    return None if named is None else str(named)


def name_argument(engine: str) -> str:
    """The argument that says what requests call the model."""
    return NAME_ARGUMENTS.get(engine, "served_model_name")
