"""The small doors of serving: a model without a YAML, a server that takes its key by an option, the first process."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factories import ROOT, composed, load, plan, run_python, serve_model, serve_tree

from flagscale.cli.serve import lay_over, start
from flagscale.errors import UserError
from flagscale.runner.config.load import load_config
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.service import decode_service
from flagscale.runner.plan.site import Site
from flagscale.serve.recipes import choose_engine, compose_model, is_model

# --- a model's own folder --------------------------------------------------------------------------------------------


def test_what_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").touch()
    assert is_model(str(tmp_path / "hf"), None)
    assert is_model(str(tmp_path / "gguf" / "m.gguf"), None)
    assert is_model("Qwen/Qwen3-8B", "vllm")
    assert not is_model("Qwen/Qwen3-8B", "native")
    assert not is_model("qwen3", "vllm")
    assert not is_model("conf/serve.yaml", None)
    assert not is_model(str(tmp_path), None)
    assert choose_engine(tmp_path / "hf") == "native"
    assert choose_engine(tmp_path / "gguf") == choose_engine(tmp_path / "gguf" / "m.gguf") == "llama_cpp"


def test_a_folder_makes_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(compose_model("./my model", None, tmp_path), tmp_path)
    job = plan_config(config, Site("/flagscale"))
    assert job.service is not None
    (model,) = decode_service(job.service).models
    assert (model.name, model.engine, model.served_name) == ("my-model", "native", "my model")
    assert job.exp_dir == str(tmp_path / "outputs/my-model")
    hub = load_config(compose_model("Qwen/Qwen3-8B", "vllm", tmp_path), tmp_path)
    assert hub.arguments[0][0].value == "Qwen/Qwen3-8B"


def test_overrides_lie_over_a_configuration_that_was_made(tmp_path: Path) -> None:
    words = ("++experiment.runner.device_type=cpu", "serve.0.engine_args.seed=3")
    config = load_config(compose_model("/m", "vllm", tmp_path, words), tmp_path)
    assert config.experiment.runner.device_type == "cpu"
    assert config.values["serve"][0]["engine_args"] == {"model": "/m", "served_model_name": "m", "seed": 3}
    for wrong in ("~serve", "serve.1.x=1", "serve.0={"):
        with pytest.raises(UserError, match=re.escape(f"`{wrong}` is no override")):
            compose_model("/m", "vllm", tmp_path, (wrong,))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./modle", "there is no model at {here}/modle; did you mean `{here}/model`?"),
        ("/no/such/model", "there is no model at /no/such/model; / is the part of it that exists"),
        ("empty", "the folder {here}/empty holds no model: no config.json and no *.gguf"),
        ("tinny", "there is no example `tinny` with a serve.yaml; did you mean `tiny`?"),
        ("Qwen/Qwen3-8B", "for the model Qwen/Qwen3-8B of a hub, name an engine: --engine vllm|sglang"),
    ],
)
def test_a_word_that_is_no_model_is_told_as_what_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        start([name])
    assert str(caught.value).endswith(told.format(here=tmp_path))


def test_tiny_serves_what_was_trained_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training writes below the folder in which it is typed, and so does the service."""
    from flagscale.cli.jobs import compose
    from flagscale.cli.jobs import plan as plan_job

    here = tmp_path / "a b"
    here.mkdir()
    monkeypatch.chdir(here)
    trained = plan_job(compose("tiny", "train", [])).plan
    service = plan_job(compose("tiny", "serve", [])).plan.service
    (seat,) = {model.seats[0] for model in decode_service(service or {}).models}
    host = seat.job.hosts[0]
    words = shlex.split(host.before_start or "")
    model = str(here / "outputs/tiny_serve/model")
    assert words[2:] == ["--checkpoints", dict(trained.hosts[0].processes[0].arguments)["save"], model]
    assert dict(host.processes[0].arguments)["model"] == model


# --- options ---------------------------------------------------------------------------------------------------------


def options(**given: object) -> argparse.Namespace:
    names = ("model_path", "port", "engine", "engine_args", "replicas", "bin_dir", "host", "api_key_env", "foreground")
    return argparse.Namespace(**dict.fromkeys(names) | given)


def test_options_lie_over_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    tree = composed(serve_tree(serve_model(engine_args={"model": "/m"}), experiment__deploy={"port": 1}))
    given = options(
        model_path="./other", port=2, engine="native", engine_args='{"seed": 1}', replicas=3, bin_dir="venv",
        host="127.0.0.2", api_key_env="KEY", foreground=True,
    )  # fmt: skip
    config = load_config(lay_over(tree, given), tmp_path)
    job = plan_config(config, Site("/flagscale"))
    assert job.service is not None
    service = decode_service(job.service)
    assert (service.port, service.host, service.api_key_env, job.foreground) == (2, "127.0.0.2", "KEY", True)
    (model,) = service.models
    assert (model.engine, model.scaling.initial) == ("native", 3)
    process = model.seats[0].job.hosts[0].processes[0]
    assert dict(process.arguments)["model"] == str(tmp_path / "other")
    assert process.bin_dirs[0] == str(tmp_path / "venv" / "bin")
    assert tree.values["serve"][0]["engine"] == "vllm"  # what was composed is not changed


def test_without_options_nothing_changes() -> None:
    tree = serve_tree(serve_model())
    assert plan(tree) == plan_config(load(lay_over(composed(tree), options()).values), Site(*_site()))


def _site() -> tuple[str, str, dict[str, str]]:
    from factories import SITE

    return SITE.root, SITE.bin_dir or "", dict(SITE.sources)


# --- the key as an option --------------------------------------------------------------------------------------------


def test_the_key_joins_the_words_inside_the_process(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "FLAGSCALE_ENGINE_KEY": "sk"}
    done = run_python("-m", "flagscale.serve.keyed", "server", "--tp-size", "2", env=env)
    assert done.stdout == "__main__ ['--tp-size', '2', '--api-key', 'sk']\n", done.stderr


def test_without_a_key_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from flagscale.serve.keyed import main

    monkeypatch.delenv("FLAGSCALE_ENGINE_KEY", raising=False)
    with pytest.raises(UserError, match="FLAGSCALE_ENGINE_KEY"):
        main(["json.tool"])


# --- the process that watches ----------------------------------------------------------------------------------------


def test_a_controller_that_cannot_start_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    done = run_python("-m", "flagscale.serve", str(tmp_path / "job.json"))
    assert done.returncode == 1
    assert done.stderr.count("KeyError") == 1


def test_a_controller_that_is_killed_is_started_again_and_a_signal_is_passed_on(tmp_path: Path) -> None:
    """The controller is stood in for by a module of the same name that waits."""
    package = tmp_path / "flagscale" / "serve"
    package.mkdir(parents=True)
    (tmp_path / "flagscale" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text((ROOT / "flagscale/serve/__main__.py").read_text())
    (package / "controller.py").write_text(
        "import os, signal, sys, time\n"
        "def run_controller(job):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "flagscale" / "errors.py").write_text("class FlagScaleError(Exception): pass\n")
    (tmp_path / "job.json").write_text("{}")
    words = [sys.executable, "-m", "flagscale.serve", str(tmp_path / "job.json")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        os.kill(int(process.stdout.readline()), signal.SIGKILL)
        assert "died of SIGKILL" in process.stdout.readline()
        assert process.stdout.readline().strip().isdigit()
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
