"""`plan_serve`: engines, their arguments, and the Ray cluster under several hosts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import hosts, plan, serve_model, serve_tree, write_hostfile

from flagscale.errors import ConfigError, UserError
from flagscale.runner.plan.job import AtLaunch, JobPlan
from flagscale.runner.render.argv import render_argv


def argv_of(job: JobPlan, host: int = 0, process: int = 0) -> tuple[str, ...]:
    return render_argv(job.hosts[host].processes[process])


def test_vllm() -> None:
    model = serve_model(
        engine_args={
            "model": "/m", "hf_overrides": {"rope": {"factor": 2}}, "enable_prefix_caching": False, "seed": None,
            "max_model_len": "4K", "trust_remote_code": True, "gpu_memory_utilization": 0.9,
        },
        engine_args_specific={"vllm": {"gpu_memory_utilization": 0.5}, "sglang": {"tp": 8}},
    )  # fmt: skip
    assert argv_of(plan(serve_tree(model))) == (
        "vllm", "serve", "/m", "--host", "127.0.0.1", "--hf-overrides", '{"rope": {"factor": 2}}',
        "--no-enable-prefix-caching", "--max-model-len", "4K", "--trust-remote-code", "--gpu-memory-utilization", "0.5",
    )  # fmt: skip


def test_sglang_names_its_model_once() -> None:
    model = serve_model("sglang", engine_args={"model": "/m", "model_path": "/n", "tensor_parallel_size": 2})
    assert argv_of(plan(serve_tree(model))) == (
        "python", "-m", "sglang.launch_server", "--host", "127.0.0.1", "--model-path", "/n", "--tp-size", "2",
    )  # fmt: skip


def test_llama_cpp() -> None:
    model = serve_model("llama_cpp", engine_args={"model": "/m.gguf", "max_model_len": 4096})
    assert argv_of(plan(serve_tree(model))) == (
        "./third_party/llama.cpp/build/bin/llama-server", "--host", "127.0.0.1", "--model", "/m.gguf",
        "--ctx-size", "4096",
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama_cpp"])
def test_ports_and_what_the_command_line_told_win(engine: str) -> None:
    model = serve_model(engine, engine_args={"model": "/m", "port": 1})
    words = argv_of(plan(serve_tree(model, experiment__runner__deploy={"port": 2})))
    assert words[words.index("--port") + 1] == "2"
    cli = {"model_path": "/told", "port": 3, "engine_args": '{"seed": 9}'}
    told = argv_of(plan(serve_tree(model, experiment__runner={"deploy": {"port": 2}, "cli_args": cli})))
    assert told[told.index("--port") + 1] == "3"
    assert told.count("--port") == 1
    assert "/told" in told
    assert "/m" not in told
    assert "9" in told


def test_the_users_host_is_kept() -> None:
    words = argv_of(plan(serve_tree(serve_model(engine_args={"model": "/m", "host": "0.0.0.0"}))))
    assert words[words.index("--host") + 1] == "0.0.0.0"


def plan_on(folder: Path, count: int, *models: dict[str, Any], **changes: Any) -> JobPlan:
    write_hostfile(folder, hosts(count, 8, "gpu"))
    return plan(serve_tree(*models, experiment__runner={"hostfile": "hostfile.txt"}, **changes), folder)


def test_vllm_over_hosts_starts_ray_under_it(tmp_path: Path) -> None:
    job = plan_on(tmp_path, 2, serve_model())
    assert [[process.name for process in host.processes] for host in job.hosts] == [["ray", "vllm_model"], ["ray"]]
    assert argv_of(job) == (
        "ray", "start", "--block", "--disable-usage-stats", "--head", "--port", "6379", "--dashboard-port", "8265",
        "--num-gpus", "8",
    )  # fmt: skip
    assert argv_of(job, 1)[4:] == ("--address", "node0:6379", "--num-gpus", "8")


def test_sglang_over_hosts_runs_on_each_with_its_own_arguments(tmp_path: Path) -> None:
    args = {"node1": {"engine_args": {"mem_fraction_static": 0.5}}}
    job = plan_on(tmp_path, 2, serve_model("sglang"), experiment__node_args=args)
    first, second = (host.processes[0] for host in job.hosts)
    assert first.argv[3:7] == ("--node-rank", "0", "--nnodes", "2")
    assert second.argv[-1] == AtLaunch("master_port", "node0:")
    assert "mem_fraction_static" not in dict(first.arguments)
    assert dict(second.arguments)["mem_fraction_static"] == 0.5


def test_several_models_stand_side_by_side() -> None:
    job = plan(serve_tree(serve_model(serve_id="a"), serve_model("sglang", serve_id="b")))
    assert [process.name for process in job.hosts[0].processes] == ["a", "b"]


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


@pytest.mark.parametrize("key", ["enable_composition", "prefill_decode_disaggregation"])
def test_shapes_that_are_not_planned_are_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match=key):
        plan(serve_tree(experiment__runner__deploy={key: True}))
    with pytest.raises(UserError, match="has no engine"):
        plan(serve_tree({"serve_id": "a", "module": "m.py", "name": "A"}))
