"""The routes: each reads its body, asks the service, and leaves the rest to the rooms beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.requests import ClientDisconnect

import flagscale
from flagscale.errors import UserError
from flagscale.inference.server.answers import Answer, make_reader
from flagscale.inference.server.asking import ask_chat, ask_completion
from flagscale.inference.server.bodies import ChatBody, CompletionBody, LoadAdapterBody, UnloadAdapterBody, UpdateBody
from flagscale.inference.server.faults import ErrorBody, install_faults, refusal_of
from flagscale.inference.server.gate import Gate
from flagscale.inference.server.service import ServedModel, Service
from flagscale.inference.server.shapes import CHAT, COMPLETION

LEFT = 499
"""written to nobody: the client has gone"""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def make_app(service: Service, keys: Sequence[str], max_body_bytes: int) -> FastAPI:
    """The whole interface over one service."""
    app = FastAPI(
        title="flagscale inference server",
        version=flagscale.__version__,
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
    )
    install_faults(app)
    _add_openai(app, service)
    _add_adapters(app, service)
    _add_engine(app, service)
    routes = [path for path in app.openapi()["paths"] if "{" not in path]
    app.add_middleware(Gate, service=service, keys=keys, routes=routes, max_body_bytes=max_body_bytes)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(service, each) for each in await service.list_models()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        return _describe(service, await service.find_model(name))

    @app.post("/v1/completions", response_model=None, responses=STREAMED)
    async def complete(request: Request, body: CompletionBody) -> Response:
        model = await service.find_model(body.model)
        prompts = await ask_completion(service, body)
        echo = [_text(service, prompt.tokens) for prompt in prompts] if body.echo else None
        reader = make_reader(service.table, prompts, body, echo=echo, drops_output=body.max_tokens == 0)
        wants = body.logprobs is not None
        return await _respond(Answer(service, request, body, prompts, COMPLETION, reader, wants, model))

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(request: Request, body: ChatBody) -> Response:
        model = await service.find_model(body.model)
        prompts = await ask_chat(service, body)
        reader = make_reader(service.table, prompts, body)
        return await _respond(Answer(service, request, body, prompts, CHAT, reader, bool(body.logprobs), model))


async def _respond(answer: Answer) -> Response:
    try:
        return await answer.respond()
    except ClientDisconnect:
        return Response(status_code=LEFT)


def _describe(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "flagscale",
        "max_model_len": service.engine.max_model_len,
        "root": model.name if model.adapter is None else model.adapter.path,
        "parent": None if model.adapter is None else service.names[0],
        "version": service.engine.version if model.adapter is None else model.adapter.version,
    }


def _text(service: Service, tokens: Sequence[int]) -> str:
    tokenizer = service.engine.tokenizer
    return "" if tokenizer is None else str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _add_adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadAdapterBody) -> dict[str, Any]:
        """Serve a LoRA adapter from a folder in PEFT's format, between two steps, by a model name of its own."""
        try:
            adapter = await service.load_adapter(body.lora_name, body.lora_path, body.load_inplace)
        except UserError as error:
            raise refusal_of(error, "lora_path") from error
        return _describe(service, ServedModel(adapter.name, adapter))

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadAdapterBody) -> dict[str, Any]:
        """Forget an adapter that no unfinished request uses."""
        try:
            await service.running.drop_adapter(body.lora_name)
        except UserError as error:
            raise refusal_of(error, "lora_name") from error
        return {"id": body.lora_name, "object": "model", "deleted": True}


def _add_engine(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 when a request would be answered now; the body says why not."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": flagscale.__version__, "weights": service.engine.version if service.is_open else None}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        found = await service.running.metrics() if service.is_open else None
        return Response(service.meter.render(found), media_type=METRICS_TYPE)

    @app.post("/update_weights_from_disk")
    async def update_weights(body: UpdateBody) -> dict[str, Any]:
        """Replace all weights by those in a folder of safetensors files, between two steps, or none."""
        try:
            await service.update_weights(Path(body.model_path), body.version)
        except UserError as error:
            raise refusal_of(error, "model_path") from error
        return {"weights": body.version}

    @app.post("/sleep")
    async def sleep() -> dict[str, str]:
        """Give back the memory of keys and values; requests wait until `/wake`."""
        await service.running.sleep()
        return {"status": service.state}

    @app.post("/wake")
    async def wake() -> dict[str, str]:
        await service.running.wake()
        return {"status": service.state}
