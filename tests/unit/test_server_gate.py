"""The gate in front of the routes, and the voice of refusals, over an application in this process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import httpx  # noqa: E402
from engine_models import make_model  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402

from flagscale.errors import ConfigError, Fault, FlagScaleError, UserError  # noqa: E402
from flagscale.inference.engine import AsyncEngine, Engine  # noqa: E402
from flagscale.inference.server.app import make_app  # noqa: E402
from flagscale.inference.server.disk_weights import find_missing, read_weights  # noqa: E402
from flagscale.inference.server.faults import RequestError, describe_validation, error_body, error_of  # noqa: E402
from flagscale.inference.server.service import Service  # noqa: E402


def ask(service: Service, *requests: tuple[str, str, Any], limit: int = 1000, keys: tuple[str, ...] = ()) -> list[Any]:
    """The answers of the application around a service without an engine, or with the one it has."""

    async def run() -> list[Any]:
        transport = httpx.ASGITransport(app=make_app(service, keys, limit))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(method, path, content=body) for method, path, body in requests]

    return asyncio.run(run())


def test_before_the_model_is_loaded_only_what_needs_none_is_answered() -> None:
    service = Service(("m",))
    requests = [("GET", path, None) for path in ("/health", "/version", "/metrics", "/v1/models")]
    health, version, metrics, models = ask(service, *requests)
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert (version.status_code, version.json()["weights"]) == (200, None)
    assert "flagscale_http_requests_total" in metrics.text
    assert (models.status_code, models.json()["error"]["type"]) == (503, "server_error")
    assert (models.headers["retry-after"], models.headers["connection"]) == ("1", "close")


def test_a_server_that_ends_takes_nothing_new() -> None:
    service = Service(("m",))
    service.is_draining = True
    health, sleep = ask(service, ("GET", "/health", None), ("POST", "/sleep", None))
    assert health.json() == {"status": "draining"}
    assert (sleep.status_code, sleep.json()["error"]["message"]) == (503, "the server is ending")


def test_paths_that_do_not_exist_are_one_label_in_the_metrics() -> None:
    service = Service(("m",))
    *_, metrics = ask(service, *(("GET", f"/nothing/{i}", None) for i in range(3)), ("GET", "/metrics", None))
    assert 'flagscale_http_requests_total{path="other",status="503"} 3.0' in metrics.text
    assert "/nothing" not in metrics.text


def test_a_body_is_refused_once_it_is_too_large_told_or_not() -> None:
    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 300

    async def run() -> None:
        service = Service(("m",))
        async with AsyncEngine(Engine(make_model())) as running:
            service.open(running._engine, running)
            transport = httpx.ASGITransport(app=make_app(service, (), 1000))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                kind = {"Content-Type": "application/json"}
                for body in (b" " * 1001, chunks()):
                    answer = await client.post("/v1/completions", content=body, headers=kind)
                    assert answer.status_code == 413
                    assert answer.json()["error"]["message"] == "the body is larger than 1000 bytes"
                fits = await client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})
                assert fits.status_code == 200
                text = await client.post("/v1/completions", json={"prompt": "a"})
                assert "this engine has no tokenizer" in text.json()["error"]["message"]
                chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
                assert "this model has no chat template" in chat.json()["error"]["message"]
        assert service.num_in_flight == 0

    asyncio.run(run())


def test_any_of_several_keys_is_good() -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=make_app(Service(("m",)), ("one", "zwei"), 9))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for key, status in (("one", 200), ("zwei", 200), ("on", 401), ("one zwei", 401), ("", 401)):
                answer = await client.get("/version", headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "param", "message"),
    [
        (RequestError("no", param="n", code="c", status=404), 404, "n", "no"),
        (UserError("sampling.stop: this is wrong"), 400, "stop", "stop: this is wrong"),
        (UserError("the prompt is wrong"), 400, None, "the prompt is wrong"),
        (
            ConfigError([Fault("sampling.logit_bias.3", "is bad"), Fault("sampling.n", "is worse", "better")]),
            400,
            "logit_bias",
            "logit_bias.3: is bad; n: is worse; expected better",
        ),
        (FlagScaleError("the engine was closed"), 503, None, "the engine was closed"),
        (KeyError("secret"), 500, None, "the engine failed on this request"),
    ],
)
def test_every_error_has_one_voice(error: Exception, status: int, param: str | None, message: str) -> None:
    found = error_of(error)
    assert (found.status, found.param, found.message) == (status, param, message)


def test_a_message_can_always_be_written() -> None:
    body = error_body(400, "no \ud800 here")
    assert body["error"] == {"message": "no ? here", "type": "invalid_request_error", "param": None, "code": 400}
    assert error_body(503, "x")["error"]["type"] == "server_error"


def test_faults_of_a_body_are_told_together_and_without_its_content() -> None:
    errors = [
        {"type": "int", "loc": ("body", "n"), "msg": "not a number", "input": "secret"},
        {"type": "string", "loc": ("body", "prompt", "str"), "msg": "not a text"},
        {"type": "list", "loc": ("body", "prompt", "list[int]"), "msg": "not a list"},
        {"type": "missing", "loc": ("body", "messages", 0, "role"), "msg": "Field required"},
    ]
    message, param = describe_validation(RequestValidationError(errors))
    assert message == (
        "n: not a number; prompt: expected a text, a list of texts, a list of token ids, or a list of such lists; "
        "messages.0.role: Field required"
    )
    assert param == "n"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_a_folder_must_hold_all_of_a_model_and_is_cast_to_its_type(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from flagscale.inference.engine.weights import name_views

    make_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = make_model(family, seed=1)
    tensors = read_weights(tmp_path, model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert find_missing(model, name_views(model)) == []
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    name = next(name for name in kept if "layers.1" in name and "q_proj" in name)
    expert = next((name for name in kept if "experts.1." in name), None)
    for gone in filter(None, (name, expert)):
        del kept[gone]
    save_file(kept, file)
    with pytest.raises(ConfigError) as caught:
        read_weights(tmp_path, model)
    assert len(caught.value.faults) == (2 if expert else 1)
    assert f"weights.{name}: is in none of the files" in str(caught.value)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path, model)
