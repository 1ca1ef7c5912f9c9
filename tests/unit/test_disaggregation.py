"""Two pools of seats for a model whose prompts are computed apart: words of each connector, places, refusals."""

from pathlib import Path
from typing import Any

import pytest
from factories import hosts, load, plan, serve_model, serve_tree, write_hostfile

from flagscale.errors import ConfigError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.plan.service import ModelPlan, ServicePlan, decode_service, encode_service
from flagscale.runner.render.argv import bind_word, render_argv

PORT = "<master_port: chosen at launch>"
NEXT = "<next_port: chosen at launch>"
HEAD = ("vllm", "serve", "/models/m", "--host", "127.0.0.1", "--port", PORT)
STORE = {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"shared_storage_path": "/kv"}}


def p2p_words(role: str, size: str, more: str = "") -> tuple[str, str]:
    text = f'{{"kv_connector": "P2pNcclConnector", "kv_role": "{role}", "kv_port": "{NEXT}", "kv_buffer_size": "{size}"'
    return "--kv-transfer-config", text + more + "}"


def service_of(
    model: dict[str, Any] | None = None, folder: Path | None = None, runner: dict[str, Any] | None = None, **deploy: Any
) -> ServicePlan:
    deploy = {"prefill_decode_disaggregation": True, **deploy}
    runner = {"nproc_per_node": 8, **(runner or {}), "deploy": deploy}
    tree = serve_tree(model or serve_model(), experiment__runner=runner)
    job = plan(tree, folder) if folder else plan(tree)
    assert job.service is not None
    return decode_service(job.service)


def argv_of(model: ModelPlan, seat: int = 0, host: int = 0) -> tuple[str, ...]:
    return render_argv(model.seats[seat].job.hosts[host].processes[0])


def env_of(job: JobPlan) -> dict[str, str]:
    return {name: bind_word(value, None) for name, value in job.hosts[0].processes[0].env}


def with_connector(connector: Any, **more: Any) -> dict[str, Any]:
    return serve_model(engine_args={"model": "/models/m", "kv_transfer_config": connector, **more})


def test_each_half_of_p2p_has_its_role_and_its_port() -> None:
    prefill, decode = service_of(prefill_num=1, decode_num=2, prefill_decode_connector="P2pNcclConnector").models
    assert (prefill.name, prefill.role, prefill.handover) == ("vllm_model-prefill", "prefill", "p2p")
    assert (decode.name, decode.role, decode.scaling.initial) == ("vllm_model-decode", "decode", 2)
    assert prefill.served_name == decode.served_name == "/models/m"
    assert argv_of(prefill) == (*HEAD, *p2p_words("kv_producer", "1e1"))
    assert argv_of(decode) == (*HEAD, *p2p_words("kv_consumer", "8e9"), "--gpu-memory-utilization", "0.7")
    env = env_of(prefill.seats[0].job)
    assert (env["VLLM_HOST_IP"], env["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"]) == ("127.0.0.1", "1")
    assert prefill.seats[0].kv_host == "127.0.0.1"


def test_a_users_own_words_of_p2p_stay_and_its_port_and_role_are_ours() -> None:
    extra = {"kv_connector_extra_config": {"send_type": "PUT"}}
    given = {"kv_connector": "P2pNcclConnector", "kv_buffer_size": "1e10", "kv_port": 7, "kv_role": "kv_both", **extra}
    _, decode = service_of(with_connector(given)).models
    told = ', "kv_connector_extra_config": {"send_type": "PUT"}'
    assert argv_of(decode)[7:9] == p2p_words("kv_consumer", "1e10", told)


@pytest.mark.parametrize("by", ["default", "key", "engine_args", "text"])
def test_nixl_is_the_default_and_is_chosen_by_either_key(by: str) -> None:
    if by == "default":
        service = service_of()
    elif by == "key":
        service = service_of(prefill_decode_connector="NixlConnector")
    else:
        config = {"kv_connector": "NixlConnector"}
        service = service_of(with_connector(config if by == "engine_args" else '{"kv_connector": "NixlConnector"}'))
    prefill, decode = service.models
    words = (*HEAD, "--kv-transfer-config", '{"kv_role": "kv_both", "kv_connector": "NixlConnector"}')
    assert argv_of(prefill) == argv_of(decode) == words
    env = env_of(decode.seats[0].job)
    assert (env["VLLM_NIXL_SIDE_CHANNEL_HOST"], env["VLLM_NIXL_SIDE_CHANNEL_PORT"]) == ("127.0.0.1", NEXT)
    assert decode.handover == "nixl"


def test_memory_of_decode_replicas_is_theirs_alone() -> None:
    prefill, decode = service_of(with_connector(STORE, gpu_memory_utilization=0.9)).models
    assert "0.9" in argv_of(prefill)
    assert "0.9" in argv_of(decode)  # nothing arrives beside what the engine takes
    prefill, decode = service_of(
        with_connector(STORE, gpu_memory_utilization=0.9), decode_gpu_memory_utilization=0.6
    ).models
    assert ("0.9" in argv_of(prefill), "0.6" in argv_of(decode), "0.9" in argv_of(decode)) == (True, True, False)
    _, decode = service_of(serve_model("sglang"), decode_gpu_memory_utilization=0.6).models
    assert argv_of(decode)[-4:] == ("--mem-fraction-static", "0.6", "--disaggregation-mode", "decode")


def test_sglang_has_modes_and_a_bootstrap_port() -> None:
    prefill, decode = service_of(serve_model("sglang")).models
    head = ("python", "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", PORT)
    model = ("--model-path", "/models/m", "--disaggregation-mode")
    assert argv_of(prefill) == (*head, "--disaggregation-bootstrap-port", NEXT, *model, "prefill")
    assert argv_of(decode) == (*head, *model, "decode")
    assert (prefill.handover, prefill.seats[0].kv_port) == ("bootstrap", 0)


def test_halves_have_chips_of_their_own_and_room_for_an_update() -> None:
    service = service_of(prefill_num=2, decode_num=3, runner={"nproc_per_node": 7})
    firsts = [seat.takes[1:] for model in service.models for seat in model.seats[: model.scaling.initial]]
    assert firsts == [(f"localhost/{number}",) for number in range(5)]
    assert [len(model.seats) for model in service.models] == [4, 3]
    assert len({seat.job.exp_dir for model in service.models for seat in model.seats}) == 7


def test_each_half_goes_where_it_is_told(tmp_path: Path) -> None:
    listed = (Host("10.0.0.1", 4, "gpu"), Host("10.0.0.2", 4, "gpu"), Host("10.0.0.3", 4, "gpu"))
    runner = {"hostfile": str(write_hostfile(tmp_path, listed)), "nproc_per_node": None}
    where = {"prefill_address": "10.0.0.2", "decode_address": "10.0.0.3"}
    service = service_of(None, tmp_path, runner, decode_num=3, prefill_decode_connector="P2pNcclConnector", **where)
    prefill, decode = service.models
    assert {seat.job.hosts[0].host.name for seat in prefill.seats} == {"10.0.0.2"}
    assert {seat.job.hosts[0].host.name for seat in decode.seats} == {"10.0.0.3"}
    assert (prefill.seats[0].kv_host, decode.seats[0].kv_host) == ("10.0.0.2", "10.0.0.3")
    assert env_of(prefill.seats[0].job)["VLLM_HOST_IP"] == "10.0.0.2"
    with pytest.raises(ConfigError, match=r"5 replicas of 1 chips .* need 5, but 10\.0\.0\.3 has 4 free"):
        service_of(None, tmp_path, runner, decode_num=5, decode_address="10.0.0.3")
    with pytest.raises(ConfigError, match=r"prefill_address: no host of this job is called 10\.0\.0\.4"):
        service_of(None, tmp_path, runner, prefill_address="10.0.0.4")


def test_hosts_known_by_name_need_the_address_that_vllm_listens_at(tmp_path: Path) -> None:
    runner = {"hostfile": str(write_hostfile(tmp_path, hosts(2, 1, "gpu"))), "nproc_per_node": None}
    with pytest.raises(ConfigError, match=r"node0 hands caches over .* expected its IP address in the hostfile, or "):
        service_of(None, tmp_path, runner)
    tree = serve_tree(
        experiment__runner={**runner, "deploy": {"prefill_decode_disaggregation": True}},
        experiment__node_specific={f"node{n}": {"VLLM_HOST_IP": f"10.0.0.{n}"} for n in range(2)},
    )
    job = plan(tree, tmp_path)
    assert job.service is not None
    assert [model.seats[0].kv_host for model in decode_service(job.service).models] == ["10.0.0.0", "10.0.0.1"]
    names = [model.seats[0].kv_host for model in service_of(serve_model("sglang"), tmp_path, runner).models]
    assert names == ["node0", "node1"]
    local = write_hostfile(tmp_path, (Host("localhost", 1, "gpu"), Host("10.0.0.2", 1, "gpu")))
    with pytest.raises(ConfigError, match="localhost hands caches over"):
        service_of(None, tmp_path, {"hostfile": str(local), "nproc_per_node": None, "master_addr": "10.0.0.1"})


def test_a_half_over_several_hosts_is_sglangs_only(tmp_path: Path) -> None:
    listed = tuple(Host(f"10.0.0.{n}", 2, "gpu") for n in range(4))
    runner = {"hostfile": str(write_hostfile(tmp_path, listed)), "nproc_per_node": None}
    sizes = {"model": "/models/m", "tensor_parallel_size": 4}
    prefill, decode = service_of(serve_model("sglang", engine_args=sizes), tmp_path, runner).models
    assert [host.host.name for host in decode.seats[0].job.hosts] == ["10.0.0.2", "10.0.0.3"]
    assert (prefill.seats[0].kv_host, prefill.seats[0].kv_port) == ("10.0.0.0", 8998)
    assert "--disaggregation-bootstrap-port" not in argv_of(prefill)
    with pytest.raises(ConfigError, match=r"a prefill replica would take 10\.0\.0\.0, 10\.0\.0\.1"):
        service_of(serve_model(engine_args=sizes), tmp_path, runner)


def test_logs_go_where_they_are_asked_for() -> None:
    prefill, decode = service_of(decode_num=2, prefill_decode_log_dir="logs/halves").models
    assert [seat.job.log_dir for seat in (*prefill.seats[:1], *decode.seats[:2])] == [
        f"/home/user/logs/halves/{name}" for name in ("prefill_0", "decode_0", "decode_1")
    ]
    (prefill, _) = service_of().models
    assert prefill.seats[0].job.log_dir == "/home/user/outputs/serve/vllm_model-prefill-0/serve_logs"


def test_the_policy_is_the_routers() -> None:
    assert dict(service_of().router) == {"pair_policy": "slo"}
    assert dict(service_of(prefill_decode_strategy="robin", router={"retries": 1}).router) == {
        "retries": 1,
        "pair_policy": "robin",
    }


def test_a_service_of_pairs_is_read_back_as_it_was() -> None:
    service = service_of(decode_num=2, admin_token_env="ADMIN")
    assert decode_service(encode_service(service)) == service
    assert service.admin_token_env == "ADMIN"


@pytest.mark.parametrize(
    ("model", "deploy", "told"),
    [
        (serve_model("native"), {}, "serve.0.engine: native cannot hand the cache"),
        (serve_model(resources={"num_replicas": 2}), {}, "resources.num_replicas: says nothing of a model in two"),
        (
            serve_model("sglang", engine_args_specific={"sglang": {"disaggregation_mode": "prefill"}}),
            {},
            "is the service",
        ),
        (serve_model("sglang"), {"prefill_decode_connector": "NixlConnector"}, "is vLLM's; sglang has"),
        (with_connector({"kv_connector": "NixConnector"}), {}, "did you mean `NixlConnector`"),
        (with_connector(STORE), {"prefill_decode_connector": "NixlConnector"}, "but kv_transfer_config names Example"),
        (serve_model(), {"prefill_decode_connector": "LMCacheConnectorV1"}, "how this connector is to be asked"),
    ],
)
def test_what_cannot_be_served_apart_is_refused(model: dict[str, Any], deploy: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        service_of(model, **deploy)
    assert told in str(refused.value)


def test_one_model_a_service() -> None:
    deploy = {"prefill_decode_disaggregation": True}
    with pytest.raises(ConfigError, match="takes one model, and `serve` holds 2"):
        plan(serve_tree(serve_model(), serve_model(serve_id="b"), experiment__runner__deploy=deploy))


def test_words_without_effect_are_told() -> None:
    config = load(serve_tree(experiment__runner__deploy={"prefill_num": 2, "decode_address": "h1"}))
    told = [str(fault) for fault in config.warnings]
    assert [text for text in told if "prefill_decode_disaggregation is off" in text] == told
    assert len(told) == 2
