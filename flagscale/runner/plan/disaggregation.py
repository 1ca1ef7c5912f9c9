"""A model whose prompts are computed by other replicas than what follows them: two pools of seats, prefill and decode.

What is planned here is what differs between the pools: how many there are and where, and the words by which an engine
is told its role and how its cache is handed over. The router pairs the replicas (`serve/router/handover.py`), so no
engine needs to know where a proxy is: vLLM's own registration of instances (`proxy_ip`, `proxy_port`) stays off.

NixlConnector is the default: the pinned vLLM has it, and 0.11 has it too. FlagScale's is P2pNcclConnector, which works
with vLLM 0.11; 0.16 gives a request another id in each half, which later releases can be told not to do, and 0.32 does
not have it any more.

Sources: `KVTransferConfig` and the connectors of vLLM 0.11, 0.16 and 0.32; `--disaggregation-*` of SGLang 0.5.23.
"""

import ipaddress
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flagscale.errors import ConfigError, Fault, find_nearest
from flagscale.runner.config.experiment import Deploy
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config
from flagscale.runner.config.tasks import ServeModel
from flagscale.runner.plan.common import environment_of, resolve_path
from flagscale.runner.plan.engines import LOOPBACK, Arguments, Environment
from flagscale.runner.plan.job import AtLaunch, Word
from flagscale.runner.plan.placement import Place
from flagscale.runner.plan.replica import Special
from flagscale.runner.plan.scaling import Scaling
from flagscale.serve.router.settings import Handover, Role

DEFAULT_CONNECTOR = "NixlConnector"
CONNECTORS: Mapping[str, Handover] = {
    "P2pNcclConnector": "p2p",
    "NixlConnector": "nixl",
    "NixlPullConnector": "nixl",
    "ExampleConnector": "store",
    "SharedStorageConnector": "store",
}
"""vLLM's connectors by how they hand a cache over; the last is ExampleConnector's name before vLLM 0.12"""
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
BUFFER_SIZES = {"prefill": "1e1", "decode": "8e9"}
"""bytes; a consumer keeps what arrives before it is asked for, a producer sends at once"""
OF_DISAGGREGATION: Mapping[str, tuple[str, ...]] = {
    "vllm": (),
    "sglang": ("disaggregation_mode", "disaggregation_bootstrap_port"),
}
BOOTSTRAP_PORT = 8998
"""SGLang's own choice"""
_PORT = "\0port\0"


@dataclass(frozen=True, slots=True)
class Side:
    """One half of a model. address: the only host that it may be on; memory: of a decode replica, where it is set"""

    role: Role
    engine: str
    handover: Handover
    connector: Mapping[str, Any]
    num: int
    address: str | None
    memory: float | None
    log_dir: str | None

    @property
    def scaling(self) -> Scaling:
        return Scaling(self.num, self.num, self.num)


def find_sides(config: Config, index: int, model: ServeModel, arguments: Arguments) -> tuple[Side, ...]:
    """The two halves of a model, prefill first; none where it is served whole.

    Raises:
        ConfigError: it cannot be served in this way.
    """
    deploy = config.experiment.runner.deploy
    if not deploy.prefill_decode_disaggregation:
        return ()
    if faults := list(_find_faults(config, index, model, arguments)):
        raise ConfigError(faults)
    connector = _connector_of(deploy, arguments) if model.engine == "vllm" else {}
    handover = CONNECTORS[connector["kv_connector"]] if connector else "bootstrap"
    log_dir = resolve_path(config, deploy.prefill_decode_log_dir) if deploy.prefill_decode_log_dir else None
    assert model.engine is not None
    address = _host_of(deploy.prefill_address)
    prefill = Side("prefill", model.engine, handover, connector, deploy.prefill_num, address, None, log_dir)
    is_told = handover == "p2p" or "decode_gpu_memory_utilization" in deploy.model_fields_set
    memory = deploy.decode_gpu_memory_utilization if is_told else None
    address = _host_of(deploy.decode_address)
    return prefill, replace(prefill, role="decode", num=deploy.decode_num, address=address, memory=memory)


def _host_of(address: str) -> str | None:
    return None if address == "auto" else address


def _connector_of(deploy: Deploy, arguments: Arguments) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` as the user gives it, with the name of its connector.

    Raises:
        ValueError: it is no mapping.
    """
    given = arguments.get("kv_transfer_config", {})
    if isinstance(given, str):
        given = json.loads(given)
    if not isinstance(given, Mapping):
        raise ValueError("no mapping")
    connector = json.loads(json.dumps(_thaw(given)))
    connector.setdefault("kv_connector", deploy.prefill_decode_connector or DEFAULT_CONNECTOR)
    return dict(connector)


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, list | tuple) else value


def _find_faults(config: Config, index: int, model: ServeModel, arguments: Arguments) -> Iterator[Fault]:
    runner, path = config.experiment.runner, f"serve.{index}"
    key = "experiment.runner.deploy.prefill_decode_disaggregation"
    assert isinstance(config.task, tuple)
    if len(config.task) > 1:
        yield Fault(key, f"takes one model, and `serve` holds {len(config.task)}", expected="a service for each")
    if model.engine is None or model.engine not in OF_DISAGGREGATION:
        text = f"{model.engine} cannot hand the cache of a prompt over to another engine"
        yield Fault(f"{path}.engine", text, expected=" or ".join(OF_DISAGGREGATION))
        return
    for name in ("num_replicas", "min_replicas", "max_replicas"):
        if getattr(model.resources, name) is not None:
            expected = "deploy.prefill_num and deploy.decode_num"
            yield Fault(f"{path}.resources.{name}", "says nothing of a model in two halves", expected)
    for name in OF_DISAGGREGATION[model.engine]:
        if name in arguments:
            yield Fault(f"{path}.engine_args.{name}", "is the service's to choose, by replica")
    names = [host.name for host in config.hosts]
    for name in ("prefill_address", "decode_address"):
        if (host := _host_of(getattr(runner.deploy, name))) and host not in names:
            near = find_nearest(host, names)
            expected = f"auto, or one of {', '.join(names)}" + f"; did you mean `{near}`?" * bool(near)
            yield Fault(f"experiment.runner.deploy.{name}", f"no host of this job is called {host}", expected)
    yield from _find_connector_faults(runner.deploy, model.engine, path, arguments)


def _find_connector_faults(deploy: Deploy, engine: str, path: str, arguments: Arguments) -> Iterator[Fault]:
    named, where = deploy.prefill_decode_connector, "experiment.runner.deploy.prefill_decode_connector"
    if engine != "vllm":
        if named:
            yield Fault(where, f"is vLLM's; {engine} has disaggregation_transfer_backend among its own arguments")
        return
    if dotted := [name for name in arguments if name.startswith("kv_transfer_config.")]:
        yield Fault(f"{path}.engine_args.{dotted[0]}", "cannot be joined", "kv_transfer_config as one mapping")
    try:
        connector = _connector_of(deploy, arguments)
    except ValueError:
        expected = "a mapping, or the text of a JSON object"
        yield Fault(f"{path}.engine_args.kv_transfer_config", "is no mapping", expected)
        return
    chosen = connector["kv_connector"]
    if named and chosen != named:
        yield Fault(where, f"is {named}, but kv_transfer_config names {chosen}", "one of them")
    if chosen not in CONNECTORS:
        given = f"{path}.engine_args.kv_transfer_config.kv_connector" if "kv_transfer_config" in arguments else where
        near = find_nearest(str(chosen), CONNECTORS)
        expected = ", ".join(CONNECTORS) + f"; did you mean `{near}`?" * bool(near)
        yield Fault(given, f"{chosen}: how this connector is to be asked is not known", expected)


def change_arguments(side: Side, arguments: Arguments) -> Arguments:
    """The engine's arguments on one side."""
    own = {name: value for name, value in arguments.items() if name != "kv_transfer_config"}
    if side.memory is not None:
        own["gpu_memory_utilization" if side.engine == "vllm" else "mem_fraction_static"] = side.memory
    if side.engine == "sglang":
        own["disaggregation_mode"] = side.role
    elif side.handover != "p2p":  # whose configuration has a port that is known only at launch
        own["kv_transfer_config"] = {"kv_role": "kv_both", **side.connector}
    return own


def plan_side(config: Config, side: Side, place: Place, number: int) -> Special:
    """What one replica of a side has of its own.

    Raises:
        ConfigError: its cache cannot be reached.
    """
    log_dir = f"{side.log_dir}/{side.role}_{number}" if side.log_dir else ""
    if side.handover == "store":
        return Special(log_dir=log_dir)
    if side.engine == "vllm" and len(place) > 1:
        hosts = ", ".join(share.host.name for share in place)
        text = f"a {side.role} replica would take {hosts}, and vLLM's connectors reach only the first of them"
        raise ConfigError([Fault("serve.0", text, "parallel sizes that fit on one host")])
    special = Special((), (), log_dir, _kv_host_of(config, place[0].host, side))
    port: Word = AtLaunch("next_port")
    env: Environment
    match side.handover:
        case "p2p":
            env = (("VLLM_HOST_IP", special.kv_host), ("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1"))
            return replace(special, env=env, words=("--kv-transfer-config", _describe_p2p(side)))
        case "nixl":
            env = (("VLLM_NIXL_SIDE_CHANNEL_HOST", special.kv_host), ("VLLM_NIXL_SIDE_CHANNEL_PORT", port))
            return replace(special, env=env)
    if side.role == "decode":
        return special
    if len(place) > 1:  # its ranks meet at that port, and no other prefill replica is on its hosts
        return replace(special, kv_port=BOOTSTRAP_PORT)
    return replace(special, words=("--disaggregation-bootstrap-port", port))


def _describe_p2p(side: Side) -> AtLaunch:
    """`--kv-transfer-config` of vLLM's P2pNcclConnector, which listens at `kv_port`."""
    values = {
        "kv_connector": side.connector["kv_connector"],
        "kv_role": KV_ROLES[side.role],
        "kv_port": _PORT,
        "kv_buffer_size": BUFFER_SIZES[side.role],
    }
    extra = {name: value for name, value in side.connector.items() if name not in ("kv_role", "kv_port")}
    before, _, after = json.dumps({**values, **extra}).partition(json.dumps(_PORT)[1:-1])
    return AtLaunch("next_port", before, after)


def _kv_host_of(config: Config, host: Host, side: Side) -> str:
    """The loopback where all hosts are this machine; else an address that the other hosts reach.

    vLLM binds to it, so that there it must be a number.
    """
    if all(it.is_local for it in config.hosts):
        return LOOPBACK
    named = host.name
    if side.engine == "vllm":
        environment = dict(environment_of(config, host))
        variables = ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_HOST_IP") if side.handover == "nixl" else ("VLLM_HOST_IP",)
        named = next((environment[name] for name in variables if environment.get(name)), named)
    if not (host.is_local and named == host.name) and (side.engine == "sglang" or _is_number(named)):
        return named
    text = f"{host.name} hands caches over at an address that the other hosts reach, and none is known"
    expected = f"its IP address in the hostfile, or experiment.nodes_envs.{host.name}.VLLM_HOST_IP"
    if side.engine == "sglang":
        expected = "its name or address in the hostfile"
    raise ConfigError([Fault("experiment.runner.hostfile", text, expected)])


def _is_number(address: str) -> bool:
    try:
        return bool(ipaddress.ip_address(address))
    except ValueError:
        return False


def name_side(serve_id: str, side: Side | None) -> str:
    """What a pool of seats is called."""
    return serve_id if side is None else f"{serve_id}-{side.role}"
