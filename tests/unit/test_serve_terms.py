"""What a service means on this machine: settings with the key, threads, seats; and what is wrong before it starts."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import plan, serve_model, serve_tree

from flagscale.chips import Device
from flagscale.chips.probe import Probe
from flagscale.chips.records import GENERIC_CPU, NVIDIA
from flagscale.errors import UserError
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.plan.service import ServicePlan, decode_service
from flagscale.serve.preflight import check_models, check_service
from flagscale.serve.terms import count_threads, limit_seats, make_settings


def service_of(*models: dict[str, Any], **changes: Any) -> ServicePlan:
    job = plan(serve_tree(*models, **changes))
    assert job.service is not None
    return replace(decode_service(job.service), port=find_free_port() or 1)


def model_folder(base: Path, *files: str) -> Path:
    folder = base / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    return folder


def bin_dir(base: Path, *programs: str) -> str:
    folder = base / "bin"
    folder.mkdir()
    for name in programs:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def put(monkeypatch: pytest.MonkeyPatch, chip: Any, *ids: int) -> None:
    """Let this machine have such chips."""
    found = Probe(chip, tuple(Device(index) for index in ids), None, ())
    monkeypatch.setattr("flagscale.chips.probe.probe_host", lambda: found)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_the_service_s_with_the_key_of_the_environment() -> None:
    deploy = {"host": "0.0.0.0", "api_key_env": "KEY", "router": {"policy": "session", "retries": 5}}
    settings = make_settings(service_of(experiment__runner__deploy=deploy), {"KEY": "sk"})
    assert (settings.host, settings.policy, settings.retries) == ("0.0.0.0", "session", 5)
    assert [key.get_secret_value() for key in settings.api_keys] == ["sk"]
    assert make_settings(service_of(), {}).api_keys == ()


def test_an_open_address_needs_a_key() -> None:
    with pytest.raises(UserError, match=r"experiment\.runner\.deploy: .*0\.0\.0\.0.*needs at least one key"):
        make_settings(service_of(experiment__runner__deploy={"host": "0.0.0.0"}), {})


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"polcy": "session"}, "which has no `polcy`; did you mean `policy`"),
        ({"policy": "best"}, "for `policy`: Input should be"),
        ({"port": 1}, "which has no `port`"),
    ],
)
def test_settings_of_the_router_are_checked_with_the_configuration(router: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        service_of(experiment__runner__deploy={"router": router})


def test_threads_are_divided_by_the_replicas_that_begin_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    model = serve_model("native", resources={"num_replicas": 5, "max_replicas": 6})
    assert count_threads(service_of(model)) == 2
    assert count_threads(service_of(serve_model("native", resources={"num_replicas": 50}))) == 1


# --- chips -----------------------------------------------------------------------------------------------------------


def test_seats_whose_chips_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, NVIDIA, 0, 1, 2)
    args = {"model": "/m", "tensor_parallel_size": 2}
    service = service_of(serve_model(engine_args=args), experiment__runner={})
    assert [len(model.seats) for model in (service.models[0], limit_seats(service).models[0])] == [2, 1]
    on_cpu = service_of(serve_model("native"))
    assert limit_seats(on_cpu) == on_cpu


@pytest.mark.parametrize(
    ("chip", "ids", "says"),
    [
        (GENERIC_CPU, (), r"needs 4 chips, and this machine has none.*device_type=cpu"),
        (NVIDIA, (0, 1), r"needs 4 chips, but this machine has 2 \(NVIDIA\); missing: \[2, 3\]"),
        (GENERIC_CPU, (0, 1, 2, 3), r"needs 4 chips of NVIDIA, but this machine has Generic_CPU"),
    ],
)
def test_too_few_chips_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chip: Any, ids: tuple[int, ...], says: str
) -> None:
    put(monkeypatch, chip, *ids)
    args = {"model": str(model_folder(tmp_path, "config.json")), "tensor_parallel_size": 4}
    runner = {"bin_dir": bin_dir(tmp_path, "vllm")}
    with pytest.raises(UserError, match=says):
        check_models(service_of(serve_model(engine_args=args), experiment__runner=runner))


def test_enough_chips_are_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(monkeypatch, NVIDIA, 0, 1, 2, 3)
    args = {"model": str(model_folder(tmp_path, "config.json")), "tensor_parallel_size": 4}
    check_models(service_of(serve_model(engine_args=args), experiment__runner={"bin_dir": bin_dir(tmp_path, "vllm")}))


# --- model and engine ------------------------------------------------------------------------------------------------

ON_CPU = {"device_type": "cpu"}


@pytest.mark.parametrize(
    ("engine", "files", "says"),
    [
        ("native", (), "holds no config.json"),
        ("llama_cpp", ("config.json",), r"holds no \*\.gguf file"),
        ("native", ("config.json",), None),
        ("llama_cpp", ("a.gguf",), None),
    ],
)
def test_a_folder_has_to_hold_what_its_engine_loads(
    tmp_path: Path, engine: str, files: tuple[str, ...], says: str | None
) -> None:
    folder = model_folder(tmp_path, *files)
    runner = ON_CPU | {"bin_dir": bin_dir(tmp_path, "llama-server")} | {}
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    service = service_of(serve_model(engine, engine_args={"model": str(folder)}), experiment__runner=runner)
    if engine == "native":  # this very environment has what it needs
        runner = ON_CPU | {"bin_dir": str(Path(sys.executable).parent)}
        service = service_of(serve_model(engine, engine_args={"model": str(folder)}), experiment__runner=runner)
    if says is None:
        check_service(service, {})
    else:
        with pytest.raises(UserError, match=says):
            check_service(service, {})


def test_a_name_of_a_hub_is_for_engines_that_look_it_up(tmp_path: Path) -> None:
    runner = ON_CPU | {"bin_dir": bin_dir(tmp_path, "vllm")}
    check_models(service_of(serve_model(engine_args={"model": "Qwen/Qwen3-8B"}), experiment__runner=runner))
    for name in ("./qwen", "/no/such/model", "~/no such model"):
        with pytest.raises(UserError, match="there is no model at"):
            check_models(service_of(serve_model(engine_args={"model": name}), experiment__runner=runner))


def test_what_before_start_may_bring_is_no_fault(tmp_path: Path) -> None:
    args = {"model": str(tmp_path / "made")}
    cmds = {"before_start": "source activate engine && make_model --output ./made"}
    check_models(service_of(serve_model("native", engine_args=args), experiment__cmds=cmds))
    with pytest.raises(UserError, match="there is no model at"):
        check_models(service_of(serve_model(engine_args={"model": str(tmp_path / "x")}), experiment__cmds=cmds))
    with pytest.raises(UserError, match="there is no model at"):  # a part of a word is another word
        check_models(service_of(serve_model(engine_args={"model": str(tmp_path / "mad")}), experiment__cmds=cmds))


def test_an_engine_that_is_not_here_is_told_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder = str(model_folder(tmp_path, "config.json", "a.gguf"))
    for engine, says in (
        ("vllm", r"no program `vllm` on the PATH; install it.*--bin-dir.*--engine native"),
        ("sglang", "no program `python` on the PATH"),
        ("llama_cpp", r"no program `llama-server`.*cmake --build"),
    ):
        service = service_of(serve_model(engine, engine_args={"model": folder}), experiment__runner=ON_CPU)
        with pytest.raises(UserError, match=says):
            check_models(service)


def test_an_interpreter_without_the_engine_s_module_is_named(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path, "config.json"))
    runner = ON_CPU | {"bin_dir": str(Path(sys.executable).parent)}
    with pytest.raises(UserError, match=r"sglang is not here: .*python has no module `sglang`"):
        check_models(service_of(serve_model("sglang", engine_args={"model": folder}), experiment__runner=runner))


def test_address_faults_are_told_together(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path, "config.json"))
    runner = ON_CPU | {"bin_dir": bin_dir(tmp_path, "vllm"), "deploy": {"api_key_env": "NO_SUCH_KEY"}}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = service_of(serve_model(engine_args={"model": folder}), experiment__runner=runner)
        service = replace(service, port=taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"(?s)\$NO_SUCH_KEY is not set.*port {service.port} is taken by process"):
            check_service(service, {})
