"""`plan_serve`: the controller, the seats of each model, their chips and threads, the exact words of each engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import hosts, plan, serve_model, serve_tree, write_hostfile

from flagscale.errors import ConfigError, UserError
from flagscale.runner.launch.dry import describe_plan, render_dry_run
from flagscale.runner.plan.job import AtLaunch, JobPlan
from flagscale.runner.plan.service import ENGINE_KEY, ServicePlan, decode_service, encode_service, list_first_jobs
from flagscale.runner.render.argv import render_argv

PORT = ("--host", "127.0.0.1", "--port", "<master_port: chosen at launch>")


def service_of(*models: dict[str, Any], folder: Path | None = None, **changes: Any) -> ServicePlan:
    job = plan(serve_tree(*models, **changes), folder) if folder else plan(serve_tree(*models, **changes))
    assert job.service is not None
    return decode_service(job.service)


def first_job(*models: dict[str, Any], **changes: Any) -> JobPlan:
    return list_first_jobs(service_of(*models, **changes))[0]


def argv_of(job: JobPlan, host: int = 0, process: int = 0) -> tuple[str, ...]:
    return render_argv(job.hosts[host].processes[process])


def env_of(job: JobPlan, host: int = 0) -> dict[str, Any]:
    return dict(job.hosts[host].processes[-1].env)


# --- engines ---------------------------------------------------------------------------------------------------------


def test_vllm() -> None:
    model = serve_model(
        engine_args={
            "model": "/m", "hf_overrides": {"rope": {"factor": 2}}, "enable_prefix_caching": False, "seed": None,
            "max_model_len": "4K", "trust_remote_code": True, "gpu_memory_utilization": 0.9,
        },
        engine_args_specific={"vllm": {"gpu_memory_utilization": 0.5}, "sglang": {"tp": 8}},
    )  # fmt: skip
    job = first_job(model)
    assert argv_of(job) == (
        "vllm", "serve", "/m", *PORT, "--hf-overrides", '{"rope": {"factor": 2}}',
        "--no-enable-prefix-caching", "--max-model-len", "4K", "--trust-remote-code", "--gpu-memory-utilization", "0.5",
    )  # fmt: skip
    assert job.secrets == (("VLLM_API_KEY", ENGINE_KEY),)
    assert (job.task, job.exp_dir) == ("replica", "/home/user/outputs/serve/vllm_model-0")


def test_sglang_names_its_model_once() -> None:
    model = serve_model("sglang", engine_args={"model": "/m", "model_path": "/n", "tensor_parallel_size": 2})
    assert argv_of(first_job(model)) == (
        "python", "-m", "sglang.launch_server", *PORT, "--model-path", "/n", "--tp-size", "2",
    )  # fmt: skip


def test_llama_cpp_is_found_where_it_is_built_or_on_the_path() -> None:
    job = first_job(serve_model("llama_cpp", engine_args={"model": "/m.gguf", "max_model_len": 4096}))
    assert argv_of(job) == (
        "llama-server", *PORT, "--model", "/m.gguf", "--ctx-size", "4096", "--alias", "/m.gguf",
    )  # fmt: skip
    assert job.hosts[0].processes[0].bin_dirs[0] == "/opt/flagscale/third_party/llama.cpp/build/bin"


def test_native() -> None:
    args = {"model": "/m", "max_model_len": "1k", "max_num_seqs": 4, "block_size": 8, "enable_prefix_caching": False}
    assert argv_of(first_job(serve_model("native", engine_args=args))) == (
        "python", "-m", "flagscale.inference.server", *PORT, "--api-key-env", ENGINE_KEY, "--model", "/m",
        "--max-model-len", "1000", "--max-running", "4", "--page-size", "8", "--no-prefix-caching",
        "--served-model-name", "/m",
    )  # fmt: skip


def test_the_folder_of_the_engine_goes_first_on_the_path() -> None:
    job = first_job(experiment__runner__bin_dir="/venv/bin")
    assert job.hosts[0].processes[0].bin_dirs == ("/venv/bin", "/opt/venv/bin")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama_cpp", "native"])
def test_where_the_service_answers_is_no_argument_of_its_engine(engine: str) -> None:
    model = serve_model(engine, engine_args={"model": "/m", "port": 1, "host": "0.0.0.0"})
    assert service_of(model).port == 1
    assert service_of(model).host == "0.0.0.0"
    assert "0.0.0.0" not in argv_of(first_job(model))
    deploy = {"port": 2, "host": "::1", "api_key_env": "KEY"}
    assert service_of(model, experiment__runner__deploy=deploy).url == "http://[::1]:2"
    cli = {"model_path": "/told", "port": 3, "engine_args": '{"seed": 9}'}
    service = service_of(model, experiment__runner={"deploy": deploy, "cli_args": cli})
    told = argv_of(list_first_jobs(service)[0])
    assert service.port == 3
    assert told.count("--port") == 1
    assert "/told" in told
    assert "/m" not in told
    assert "9" in told


def test_what_the_command_line_told_is_checked_like_the_rest() -> None:
    cli = {"engine_args": {"max_modle_len": 9}}
    with pytest.raises(ConfigError, match=r"engine_args\.max_modle_len.*did you mean `max_model_len`"):
        plan(serve_tree(experiment__runner__cli_args=cli))
    args = {"localhost": {"engine_args": {"seeed": 1}}}
    with pytest.raises(ConfigError, match=r"experiment\.node_args\.localhost.*did you mean `seed`"):
        plan(serve_tree(experiment__node_args=args))


def test_a_key_in_the_open_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"api_key: would stand on a command line.*api_key_env"):
        plan(serve_tree(serve_model(engine_args={"model": "/m", "api_key": "sk"})))


def test_secrets_pass_through_the_controller_under_their_sources_names() -> None:
    job = plan(serve_tree(experiment__secrets=["HF_TOKEN"], experiment__runner__deploy={"api_key_env": "KEY"}))
    assert job.secrets == (("HF_TOKEN", "HF_TOKEN"), ("KEY", "KEY"))
    assert job.service is not None
    replica = list_first_jobs(decode_service(job.service))[0]
    assert replica.secrets == (("HF_TOKEN", "HF_TOKEN"), ("VLLM_API_KEY", ENGINE_KEY))


# --- chips and threads -----------------------------------------------------------------------------------------------


def on_hosts(folder: Path, count: int, *models: dict[str, Any], slots: int = 8, **changes: Any) -> ServicePlan:
    write_hostfile(folder, hosts(count, slots, changes.pop("chip", "gpu")))
    return service_of(*models, folder=folder, experiment__runner={"hostfile": "hostfile.txt"}, **changes)


def model_of(tensor: int, engine: str = "vllm", **resources: Any) -> dict[str, Any]:
    return serve_model(engine, engine_args={"model": "/m", "tensor_parallel_size": tensor}, resources=resources)


def test_replicas_share_a_host_by_its_chips_and_an_update_has_room(tmp_path: Path) -> None:
    service = on_hosts(tmp_path, 2, model_of(4, num_replicas=3))
    seats = service.models[0].seats
    assert len(list_first_jobs(service)) == 3
    assert [seat.job.hosts[0].host.name for seat in seats] == ["node0", "node0", "node1", "node1"]
    assert [env_of(seat.job)["CUDA_VISIBLE_DEVICES"] for seat in seats] == ["0,1,2,3", "4,5,6,7"] * 2
    assert seats[1].takes[1:] == ("node0/4", "node0/5", "node0/6", "node0/7")


def test_a_replica_larger_than_a_host_takes_whole_hosts(tmp_path: Path) -> None:
    service = on_hosts(tmp_path, 5, model_of(16, num_replicas=2))
    assert [[host.host.name for host in seat.job.hosts] for seat in service.models[0].seats] == [
        ["node0", "node1"],
        ["node2", "node3"],
    ]


def test_only_chips_that_the_environment_lists_are_used() -> None:
    envs = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    tree = {"experiment__envs": envs, "experiment__runner": {}}
    seats = service_of(model_of(2), **tree).models[0].seats
    assert [env_of(seat.job)["CUDA_VISIBLE_DEVICES"] for seat in seats] == ["4,5", "6,7"]
    with pytest.raises(
        ConfigError, match=r"3 replicas of 2 chips .*tensor_parallel_size 2.* need 6, but localhost has 4"
    ):
        service_of(model_of(2, num_replicas=3), **tree)


def test_each_vendor_has_its_own_variables(tmp_path: Path) -> None:
    env = env_of(list_first_jobs(on_hosts(tmp_path, 1, model_of(2), chip="npu"))[0])
    assert env["ASCEND_RT_VISIBLE_DEVICES"] == env["NPU_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"num_gpus": 1}, "num_gpus: is 1, but tensor_parallel_size 4 needs 4 chips"),
        ({"num_gpus": 0.5}, "num_gpus: is 0.5; expected a whole number"),
        ({"num_replicas": 3}, "3 replicas of 4 chips .* need 12, but node0 has 8 free"),
        ({"max_replicas": 3}, "3 replicas of 4 chips"),
        ({"min_replicas": 0}, "min_replicas: is 0; expected 1 or more"),
        ({"num_replicas": 2, "max_replicas": 1}, "are not in this order"),
        ({"max_replicas": 1000}, "expected at most 256"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, resources: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        on_hosts(tmp_path, 1, model_of(4, **resources))


def test_hosts_of_unlike_size_do_not_make_one_replica(tmp_path: Path) -> None:
    (tmp_path / "hostfile.txt").write_text("a slots=8 type=gpu\nb slots=4 type=gpu\n")
    with pytest.raises(ConfigError, match=r"needs 12 chips .*a has 8, b has 4 free"):
        service_of(model_of(12), folder=tmp_path, experiment__runner={"hostfile": "hostfile.txt"})


def test_this_machine_s_chips_are_counted_when_it_is_launched() -> None:
    (job,) = list_first_jobs(service_of(model_of(8), experiment__runner={}))
    assert env_of(job)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"


def test_models_side_by_side_have_chips_of_their_own(tmp_path: Path) -> None:
    one, two = model_of(2) | {"serve_id": "a"}, model_of(4, "sglang") | {"serve_id": "b"}
    first, second = list_first_jobs(on_hosts(tmp_path, 1, one, two))
    assert env_of(first)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert env_of(second)["CUDA_VISIBLE_DEVICES"] == "2,3,4,5"


def test_on_a_cpu_the_threads_are_divided(tmp_path: Path) -> None:
    service = on_hosts(tmp_path, 1, model_of(1, num_replicas=2), chip="cpu")
    env = env_of(list_first_jobs(service)[0])
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"]) == ("4", "nobind")
    local = {"experiment__runner": {"device_type": "cpu"}}
    assert env_of(first_job(model_of(1), **local))["OMP_NUM_THREADS"] == AtLaunch("num_threads")
    assert env_of(first_job(model_of(1, num_cpus=3), **local))["OMP_NUM_THREADS"] == "3"
    said = {"experiment__envs": {"OMP_NUM_THREADS": "7"}}
    assert env_of(first_job(model_of(1), **local, **said))["OMP_NUM_THREADS"] == "7"


def test_replicas_without_chips_go_round_the_hosts(tmp_path: Path) -> None:
    seats = on_hosts(tmp_path, 2, model_of(1, num_replicas=3), chip="cpu").models[0].seats
    assert [seat.job.hosts[0].host.name for seat in seats[:4]] == ["node0", "node1", "node0", "node1"]


# --- several hosts ---------------------------------------------------------------------------------------------------


def test_vllm_over_hosts_starts_ray_under_it(tmp_path: Path) -> None:
    (job,) = list_first_jobs(on_hosts(tmp_path, 2, model_of(16)))
    assert [[process.name for process in host.processes] for host in job.hosts] == [["ray", "vllm_model"], ["ray"]]
    assert argv_of(job) == (
        "ray", "start", "--block", "--disable-usage-stats", "--head", "--port", "6379", "--dashboard-port", "8265",
        "--num-gpus", "8",
    )  # fmt: skip
    assert argv_of(job, 1)[4:] == ("--address", "node0:6379", "--num-gpus", "8")
    engine = argv_of(job, 0, 1)
    assert engine[:7] == ("vllm", "serve", "/m", "--host", "0.0.0.0", "--port", "<master_port: chosen at launch>")
    assert engine[-2:] == ("--distributed-executor-backend", "ray")
    assert env_of(job)["RAY_ADDRESS"] == "node0:6379"


def test_sglang_over_hosts_runs_on_each_with_its_own_arguments(tmp_path: Path) -> None:
    args = {"node1": {"engine_args": {"mem_fraction_static": 0.5}}}
    envs = {"node1": {"GLOO_SOCKET_IFNAME": "eth1"}}
    service = on_hosts(
        tmp_path, 2, model_of(16, "sglang"), experiment__node_args=args, experiment__nodes_envs=envs
    )  # fmt: skip
    (job,) = list_first_jobs(service)
    first, second = (host.processes[0] for host in job.hosts)
    assert first.argv[:4] == ("python", "-m", "flagscale.serve.keyed", "sglang.launch_server")
    assert first.argv[8:12] == ("--node-rank", "0", "--nnodes", "2")
    assert second.argv[-1] == AtLaunch("next_port", "node0:")
    assert "mem_fraction_static" not in dict(first.arguments)
    assert dict(second.arguments)["mem_fraction_static"] == 0.5
    assert (env_of(job, 1)["GLOO_SOCKET_IFNAME"], "GLOO_SOCKET_IFNAME" in env_of(job)) == ("eth1", False)


# --- the service as a value ------------------------------------------------------------------------------------------


def test_models_stand_behind_one_port() -> None:
    one, two = serve_model(serve_id="a"), serve_model("sglang", serve_id="b")
    service = service_of(one, two, experiment__runner={})
    assert ([model.name for model in service.models], service.port) == (["a", "b"], 8000)
    rows = [
        serve_model(serve_id=name, engine_args={"model": "/m", "port": port}) for name, port in (("a", 1), ("b", 2))
    ]
    with pytest.raises(ConfigError, match=r"deploy\.port: .*different ones: 1, 2"):
        service_of(*rows)
    assert service_of(*rows, experiment__runner={"deploy": {"port": 3}}).port == 3
    with pytest.raises(ConfigError, match="expected 1 to 65535"):
        service_of(serve_model(engine_args={"model": "/m", "port": 70000}))


@pytest.mark.parametrize(
    ("engine", "args", "name"),
    [
        ("vllm", {"served_model_name": ["big", "b"]}, "big"),
        ("sglang", {"served_model_name": "s"}, "s"),
        ("llama_cpp", {"served_model_name": "l"}, "l"),
        ("native", {}, "/m"),
    ],
)
def test_requests_call_a_model_by_its_served_name(engine: str, args: dict[str, Any], name: str) -> None:
    assert service_of(serve_model(engine, engine_args={"model": "/m", **args})).models[0].served_name == name


def test_a_service_survives_json() -> None:
    service = service_of(model_of(1, num_replicas=2), serve_model("native", serve_id="n"), experiment__runner={})
    assert decode_service(json.loads(json.dumps(encode_service(service)))) == service


def test_a_dry_run_shows_the_controller_and_every_first_replica() -> None:
    job = plan(serve_tree(serve_model("native", resources={"num_replicas": 2})))
    text = render_dry_run(job)
    assert text.count("python -m flagscale.serve ") == 2  # its argv and its script
    assert [line for line in text.splitlines() if line.startswith("# ======== ")] == [
        "# ======== replica native_model-0",
        "# ======== replica native_model-1",
    ]
    assert len(describe_plan(job)["replicas"]) == 2


def test_names_of_models_are_names_of_files() -> None:
    for name in ("a/b", "../x", "a b", "", "-x", "a\nb"):
        with pytest.raises(ConfigError, match="expected a name without spaces and slashes"):
            plan(serve_tree(serve_model(serve_id=name)))


def test_an_entry_point_of_its_own_reads_its_section_from_a_file() -> None:
    tree = serve_tree(experiment__task__entrypoint="flagscale/serve/robot.py")
    tree["serve"] = {"engine": {"model": "1e-5"}, "generate": {"on": [True, None, "yes"]}}
    job = plan(tree)
    path = "/home/user/outputs/serve_logs/scripts/serve.yaml"
    assert argv_of(job) == ("python", "flagscale/serve/robot.py", f"--config-path={path}")
    ((written, content),) = job.hosts[0].files
    assert written == path
    assert yaml.safe_load(content) == tree["serve"]


def test_shapes_that_are_not_planned_are_refused_by_name() -> None:
    tree = serve_tree(experiment__task__entrypoint="s.py", experiment__runner__deploy={"enable_composition": True})
    tree["serve"] = {"engine": {}}
    with pytest.raises(UserError, match="a graph of models is a list of nodes"):
        plan(tree)
