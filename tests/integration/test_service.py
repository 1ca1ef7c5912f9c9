"""`flagscale serve` with real processes and a fake engine: start, look, stop, and every way in which it goes wrong."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from factories import run_py
from services import Bench, wait_for

from flagscale.serve.folder import find_control


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench.make(tmp_path)
    yield made
    made.serve("stop", str(made.exp_dir), "--force")
    assert made.list_left() == []


def find_controllers(bench: Bench) -> tuple[int, int]:
    """(the one that watches, the one that works)."""
    control = find_control(bench.exp_dir)
    assert control is not None
    stat = Path(f"/proc/{control.pid}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[1]), control.pid


def test_a_service_is_started_looked_at_and_stopped(bench: Bench) -> None:
    import openai

    bench.write(resources={"num_replicas": 2})
    done = bench.serve(str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 0, done.stderr
    assert f"url      {bench.url}/v1" in done.stdout
    assert "0 of 2 replicas ready" in done.stderr
    client = openai.OpenAI(base_url=f"{bench.url}/v1", api_key="none", max_retries=0)
    assert client.completions.create(model="m", prompt="hi", max_tokens=3).choices[0].text == "w0 w1 w2"
    assert [model.id for model in client.models.list()] == ["m"]
    client.close()

    status = bench.status()
    assert (status["state"], status["version"], status["models"][0]["ready"]) == ("ready", 1, 2)
    assert [row["name"] for row in status["replicas"]] == ["m-0", "m-1"]
    table = bench.serve("status").stdout
    assert "m-1" in table
    assert "ready" in table
    assert "Loading weights" in bench.serve("logs", "--replica", "m-1").stdout
    everything = bench.serve("logs").stdout
    assert "controller | " in everything
    assert "m-0        | " in everything
    wrong = bench.serve("logs", "--replica", "m-7")
    assert (wrong.returncode, "did you mean `m-" in wrong.stderr) == (2, True)
    examined = bench.serve("doctor")
    assert (examined.returncode, "FAULT" in examined.stdout) == (0, False)
    again = bench.serve(str(bench.base / "conf" / "serve.yaml"))
    assert again.returncode == 1
    assert "already holds a service that runs" in again.stderr

    # the service is one row of the list, and `flagscale stop` knows what it is
    assert bench.call("list").stdout.count(str(status["run_id"])) == 1
    done = bench.call("stop", status["run_id"])
    assert (done.returncode, done.stdout) == (0, f"{status['run_id']}: stopped\n")
    assert bench.list_left() == []
    assert bench.serve("stop").stdout.endswith("nothing to stop\n")
    assert bench.status()["state"] == "succeeded"
    assert bench.serve("doctor").returncode == 1


def test_the_key_of_an_engine_stands_nowhere_that_others_can_read(bench: Bench) -> None:
    bench.write()
    bench.start("--api-key-env", "MY_KEY", MY_KEY="sk-of-callers")
    control = find_control(bench.exp_dir)
    assert control is not None
    secrets = ("sk-of-callers", control.engine_key, control.token)
    for path in bench.base.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o077:
            assert not any(secret in path.read_text(errors="replace") for secret in secrets), path
    shown = Path(f"/proc/{bench.find_pid('m-0')}/cmdline").read_text()
    assert not any(secret in shown for secret in secrets)
    body = {"model": "m", "prompt": "hi"}
    assert httpx.post(f"{bench.url}/v1/completions", json=body).status_code == 401
    headers = {"Authorization": "Bearer sk-of-callers"}
    assert httpx.post(f"{bench.url}/v1/completions", json=body, headers=headers).status_code == 200
    assert httpx.get(f"{control.url}/status").status_code == 401
    told = bench.serve("doctor")
    assert (told.returncode, "$MY_KEY is not set here" in told.stdout) == (1, True)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0", "out of memory: 2.00 GiB"),
        ("the sky fell\nRuntimeError: Engine core initialization failed", "Engine core initialization failed"),
    ],
)
def test_an_engine_that_dies_while_loading_is_named_and_nothing_is_left(bench: Bench, words: str, cause: str) -> None:
    bench.write_model("model", last_words=words)
    bench.write(resources={"num_replicas": 2})
    done = bench.serve(str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 1
    first = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert cause in first
    assert "Traceback" not in done.stderr
    assert bench.list_left() == []


def test_a_port_that_was_taken_meanwhile_is_tried_again(bench: Bench) -> None:
    words = "OSError: [Errno 98] Address already in use"
    bench.write_model("model", last_words=words, once=str(bench.base / "once"))
    bench.write()
    bench.start()
    assert "its port is taken" in bench.read_log()


def test_what_can_be_known_before_is_told_all_at_once_and_nothing_is_written(bench: Bench) -> None:
    bench.write()
    (bench.base / "bin" / "vllm").rename(bench.base / "bin" / "vlm")
    with socket.create_server(("127.0.0.1", bench.port)):
        done = bench.serve(
            str(bench.base / "conf" / "serve.yaml"), "--model-path", "./modle", "--host", "0.0.0.0",
            PATH="/usr/bin:/bin",
        )  # fmt: skip
    assert done.returncode == 2
    assert f"port {bench.port} is taken by process {os.getpid()}" in done.stderr
    assert f"no model at {bench.base}/modle; did you mean `{bench.base}/model`?" in done.stderr
    assert "vllm is not here" in done.stderr
    assert "pip install vllm" in done.stderr
    assert "--api-key-env" in done.stderr
    assert not bench.exp_dir.exists()


def test_arguments_of_the_command_line_are_checked(bench: Bench) -> None:
    bench.write()
    config = str(bench.base / "conf" / "serve.yaml")
    done = bench.serve(config, "--engine-args", '{"max_modle_len": 5}')
    assert (done.returncode, "did you mean `max_model_len`?" in done.stderr) == (2, True)
    done = bench.serve(config, "--engine-args", "{oops")
    assert (done.returncode, "the text of a JSON object" in done.stderr) == (2, True)
    done = bench.serve(config, "--dry-run", "--engine-args", '{"seed": 5}', "--replicas", "2")
    assert done.stdout.count("--seed 5") == 4  # argv and script of two replicas
    done = bench.serve("no_such_model")
    assert (done.returncode, "there is no example `no_such_model`" in done.stderr) == (2, True)
    done = bench.serve(config, "--replicas", "1", "+experiment.runner.deploy.router.polcy=session")
    assert (done.returncode, "polcy" in done.stderr) == (2, True)


def test_a_controller_that_is_killed_comes_back_and_takes_its_replicas_over(bench: Bench) -> None:
    bench.write()
    bench.start()
    engine, (_, controller) = bench.find_pid("m-0"), find_controllers(bench)
    os.kill(controller, signal.SIGKILL)
    wait_for(lambda: "is taken over" in bench.read_log())
    assert bench.complete() == "w0 w1 w2"
    assert bench.find_pid("m-0") == engine
    assert find_controllers(bench)[1] != controller


def test_where_all_controllers_are_killed_nothing_is_orphaned(bench: Bench) -> None:
    bench.write()
    bench.start()
    watcher, controller = find_controllers(bench)
    os.kill(watcher, signal.SIGKILL)
    os.kill(controller, signal.SIGKILL)
    wait_for(lambda: not bench.list_left())
    status = bench.status()
    assert (status["state"], status["why"]) == ("failed", "service died of SIGKILL")
    bench.start()  # and the service can be started again where it was
    assert bench.complete() == "w0 w1 w2"


def test_a_dead_controller_does_not_keep_a_service_from_being_stopped(bench: Bench) -> None:
    bench.write()
    bench.start()
    watcher, controller = find_controllers(bench)
    os.kill(watcher, signal.SIGSTOP)
    os.kill(controller, signal.SIGSTOP)
    status = bench.status()
    assert status["state"] == "unanswered"
    assert "flagscale serve stop" in status["why"]
    assert "lives and does not answer" in bench.serve("doctor").stdout
    os.kill(controller, signal.SIGKILL)
    done = bench.serve("stop", "--force")
    assert done.returncode == 0, done.stderr
    assert bench.list_left() == []


def test_in_the_foreground_ctrl_c_ends_the_service(bench: Bench) -> None:
    bench.write()
    with bench.popen("serve", str(bench.base / "conf" / "serve.yaml"), "--foreground") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready after" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert bench.list_left() == []


def test_actions_of_run_py(bench: Bench) -> None:
    config = bench.write()

    def run(action: str) -> str:
        done = run_py(config, f"action={action}", cwd=bench.base, env=bench.env())
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"vllm serve {bench.base}/model" in run("dryrun")
    assert "answers" in run("test")
    assert bench.list_left() == []
    assert "answers" in run("run")
    assert "m-0" in run("query")
    assert run("stop").endswith("stopped\n")


def test_a_model_s_own_folder_is_enough(bench: Bench) -> None:
    done = bench.serve("./model", "--engine", "vllm", "--bin-dir", "./bin", "--dry-run", "--port", str(bench.port))
    assert done.returncode == 0, done.stderr
    assert f"vllm serve {bench.base}/model" in done.stdout
    assert "--served-model-name model" in done.stdout
    assert json.dumps(done.stdout)
