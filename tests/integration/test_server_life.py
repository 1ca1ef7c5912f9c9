"""A server's life: how it starts, what it asks for, how it is told to end; and any request that its schema allows."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import httpx  # noqa: E402
import schemathesis  # noqa: E402
from factories import ROOT  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from local_jobs import wait_for  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import KEY, PATIENCE_S, ServerProcess, make_folder, serving, start_server  # noqa: E402

AUTH = {"Authorization": f"Bearer {KEY}"}
WORDS = ("--api-key-env", "SESAME", "--max-model-len", "96")
LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with serving(folder.parent / "log", folder, *WORDS, SESAME=f" {KEY} ") as server:
        yield server
    assert "Traceback" not in server.printed


def ask(server: ServerProcess, path: str, body: Any = None, **headers: str) -> httpx.Response:
    method = "GET" if body is None else "POST"
    return httpx.request(method, server.url + path, json=body, headers=headers or AUTH, timeout=60)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/sleep", "/nowhere", "/openapi.json"])
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"])
def test_without_the_key_nothing_is_told(server: ServerProcess, path: str, header: str) -> None:
    answer = httpx.get(server.url + path, headers={b"Authorization": header.encode()})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_with_the_key_everything_is_and_probes_need_none(server: ServerProcess) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ready"}
    for scheme in ("Bearer", "bearer"):
        assert ask(server, "/v1/models", Authorization=f"{scheme} {KEY}").status_code == 200


def test_the_openapi_document_gives_errors_their_shape(server: ServerProcess) -> None:
    document = ask(server, "/openapi.json").json()
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert sorted(responses) == ["200", "4XX", "5XX"]


def test_weights_are_replaced_from_disk_all_or_nothing(server: ServerProcess, tmp_path: Path) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0}
    old = ask(server, "/v1/completions", body).json()
    other = make_folder(tmp_path / "other", seed=1)
    narrow = make_folder(tmp_path / "narrow", intermediate_size=40)
    part = make_folder(tmp_path / "part", num_hidden_layers=1)
    for wrong, message in (
        (narrow, "shape [40, 32]"),
        (part, "weights.model.layers.1.input_layernorm.weight: is in none of the files"),
        (tmp_path, "no *.safetensors file"),
    ):
        refused = ask(server, "/update_weights_from_disk", {"model_path": str(wrong), "version": 8})
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    again = ask(server, "/v1/completions", body).json()
    assert (again["choices"], again["system_fingerprint"]) == (old["choices"], "weights-0")
    assert ask(server, "/update_weights_from_disk", {"model_path": str(other), "version": "b"}).status_code == 200
    new = ask(server, "/v1/completions", body).json()
    assert (new["choices"] != old["choices"], new["system_fingerprint"]) == (True, "weights-b")
    assert ask(server, "/version").json()["weights"] == "b"


def test_requests_wait_while_the_engine_sleeps(server: ServerProcess) -> None:
    assert ask(server, "/sleep", {}).json() == {"status": "asleep"}
    assert httpx.get(server.url + "/health").status_code == 503
    answers: list[int] = []
    body = {"prompt": "a", "max_tokens": 2}
    thread = threading.Thread(target=lambda: answers.append(ask(server, "/v1/completions", body).status_code))
    thread.start()
    wait_for(lambda: "flagscale_requests_waiting 1.0" in ask(server, "/metrics").text)
    assert answers == []
    assert ask(server, "/wake", {}).json() == {"status": "ready"}
    thread.join(PATIENCE_S)
    assert answers == [200]


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/update_weights_from_disk", "/v1/load_lora_adapter"]
)
def test_whatever_is_sent_is_answered_or_refused_but_breaks_nothing(
    server: ServerProcess, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(ask(server, "/openapi.json").json())
    schema.config.update(base_url=server.url)

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    def ask_anything(case: Any) -> None:
        case.call_and_validate(headers=AUTH, checks=CHECKS)

    ask_anything()


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_server("--model", folder, "--port", port)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: 127.0.0.1:{port}: cannot be bound: Address already in use; expected a free port of this machine\n"
    )
    done = run_server("--model", tmp_path / "nothing", "--port", "0")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path}/nothing: no config.json; expected a folder with a model in the format of transformers\n"
    )


def run_server(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "flagscale.inference.server", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def test_it_answers_probes_while_the_model_loads_and_a_signal_then_ends_it_at_once(
    folder: Path, tmp_path: Path
) -> None:
    server = start_server(tmp_path / "log", folder, "--served-model-name", "tiny")
    try:
        server.wait_until("listening on ")
        # Loading takes longer than these two questions: transformers itself takes seconds to import.
        health = httpx.get(server.url + "/health")
        models = httpx.get(server.url + "/v1/models")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert (models.status_code, models.headers["Retry-After"]) == (503, "1")
        assert models.json()["error"]["message"] == "the model is still loading"
        server.process.terminate()
        assert server.process.wait(PATIENCE_S) == -signal.SIGTERM
    finally:
        server.process.kill()
        server.process.wait()


def test_sigterm_lets_what_runs_finish_and_refuses_what_comes(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", folder) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            server.process.terminate()
            wait_for(lambda: httpx.get(server.url + "/health").json() == {"status": "draining"})
            late = httpx.post(server.url + "/v1/completions", json=LONG)
            assert (late.status_code, late.json()["error"]["message"]) == (503, "the server is ending")
            *rest, last = lines
        assert last == "data: [DONE]"
        assert json.loads(rest[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(PATIENCE_S) == 0, server.printed


def test_what_does_not_finish_in_time_is_told_so(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", folder, "--drain-s", "0.2") as server:
        assert httpx.post(server.url + "/sleep").status_code == 200
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers: list[httpx.Response] = []
            thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=LONG)))
            thread.start()
            wait_for(lambda: "flagscale_requests_waiting 1.0" in httpx.get(server.url + "/metrics").text)
            server.process.terminate()
            thread.join(PATIENCE_S)
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["message"] == "the request was aborted: the server is ending"
        assert server.process.wait(PATIENCE_S) == 0, server.printed


def test_a_model_without_chat_template_says_so(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    with serving(tmp_path / "log", bare) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("this model has no chat template; expected a request to")
