"""The interface of a graph of models.

POST <deploy.name>                   the request's fields -> the result of the graph, as JSON
POST /manager/set_task_status        {task_id, status}
POST /manager/get_task_status        {task_id} -> {task_id, status}
POST /manager/delete_task_status     {task_id} -> {task_id, status}
GET  /status, /openapi.json          with the key, where one is set; so all above
GET  /health                         without a key: 200 once every node has a replica
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import PydanticSerializationError, to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flagscale.runner.config.graph import list_sinks
from flagscale.runner.plan.graph import GraphPlan
from flagscale.serve.graph.board import TaskBoard
from flagscale.serve.graph.body import TaskName, make_request_model, read_fields, read_task
from flagscale.serve.graph.cluster import BusyError
from flagscale.serve.graph.evaluate import NodeError, evaluate_graph
from flagscale.serve.graph.node import describe_error
from flagscale.serve.graph.openapi import describe_api
from flagscale.serve.router.answers import Refusal, Send, send_refusal
from flagscale.serve.router.app import discard_body, outlives
from flagscale.serve.router.request import CallerLeftError, Receive, Scope, check_key, parse_body, read_body
from flagscale.serve.router.settings import RouterSettings

log = logging.getLogger(__name__)

JSON_HEADERS = [(b"content-type", b"application/json")]


class Backend(Protocol):
    """What computes, and knows how the nodes are."""

    async def call(self, node: str, args: Sequence[Any], fields: Mapping[str, Any]) -> Any:
        """What `forward` of a node gives for the results of others, or for the request's fields."""

    def find_missing(self) -> list[str]:
        """Nodes without a replica that is ready."""

    def describe(self) -> dict[str, Any]:
        """The service as JSON values."""


@dataclass(slots=True)
class GraphEndpoint:
    """Answers one request by one evaluation of the graph, which ends when the caller leaves."""

    graph: GraphPlan
    settings: RouterSettings
    backend: Backend
    num_in_flight: int = 0
    sink: str = field(init=False)
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        (self.sink,) = list_sinks(self.graph.depends)
        self.model = make_request_model(self.graph.request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            check_key(scope["headers"], self.settings.api_keys)
            body = await read_body(scope["headers"], receive, self.settings)
            fields = read_fields(self.model, parse_body(body))
            if missing := self.backend.find_missing():
                told = f"the graph is not ready: no replica of {', '.join(missing)}"
                raise Refusal(503, told, "not_ready", headers={"Retry-After": "5"})
            self.num_in_flight += 1
            try:
                if not await outlives(asyncio.create_task(self._answer(fields, send)), receive):
                    log.info("a caller left; its evaluation was ended")
            finally:
                self.num_in_flight -= 1
        except CallerLeftError:
            pass
        except Refusal as refusal:
            await send_refusal(refusal, send, is_all=refusal.status != 413)
            if refusal.status == 413:
                await discard_body(receive)
                await send({"type": "http.response.body"})

    async def _answer(self, fields: Mapping[str, Any], send: Send) -> None:
        body = self._encode(await self._evaluate(fields))
        headers = [*JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _evaluate(self, fields: Mapping[str, Any]) -> Any:
        def call(node: str, args: Sequence[Any]) -> Awaitable[Any]:
            return self.backend.call(node, args, {} if self.graph.depends[node] else fields)

        try:
            return await evaluate_graph(self.graph.depends, self.sink, call)
        except NodeError as error:
            cause = error.__cause__ or error
            if isinstance(cause, BusyError):
                told = f"node `{error.node}` is busy: {cause}"
                raise Refusal(503, told, "busy", headers={"Retry-After": "1"}) from None
            log.error("node %s failed", error.node, exc_info=cause)
            raise Refusal(500, f"node `{error.node}` failed: {describe_error(cause)}", "node_failed") from None

    def _encode(self, result: Any) -> bytes:
        try:
            return to_json(result)
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            log.error("the result of node %s is no JSON value: %s", self.sink, error)
            told = f"node `{self.sink}` gave a {type(result).__name__} that cannot be written as JSON"
            raise Refusal(500, told, "node_failed") from None


class Desk:
    """Answers what needs no evaluation."""

    def __init__(self, graph: GraphPlan, settings: RouterSettings, backend: Backend) -> None:
        self._backend, self._settings = backend, settings
        self._board = TaskBoard()
        self._document = describe_api(graph, bool(settings.api_keys))

    async def show_health(self, _: Request) -> Response:
        missing = self._backend.find_missing()
        status = f"no replica of {', '.join(missing)}" if missing else "ok"
        return JSONResponse({"status": status}, 503 if missing else 200)

    async def show_api(self, _: Request) -> Response:
        return JSONResponse(self._document)

    async def show_status(self, _: Request) -> Response:
        told = self._backend.describe()
        return JSONResponse({name: told[name] for name in ("state", "models", "replicas")})

    async def set_task(self, asked: Request) -> Response:
        task_id, status = read_task(await self._read(asked))
        self._board.set(task_id, status)
        return JSONResponse({"task_id": task_id, "status": status})

    async def get_task(self, asked: Request) -> Response:
        return await self._find(asked, self._board.get)

    async def delete_task(self, asked: Request) -> Response:
        return await self._find(asked, self._board.delete)

    async def _find(self, asked: Request, act: Callable[[str], Any]) -> Response:
        task_id = read_fields(TaskName, await self._read(asked))["task_id"]
        try:
            return JSONResponse({"task_id": task_id, "status": act(task_id)})
        except KeyError:
            raise Refusal(404, f"there is no task `{task_id}`", "unknown_task", "task_id") from None

    async def _read(self, asked: Request) -> dict[str, Any]:
        receive: Any = asked.receive
        return parse_body(await read_body(asked.headers.raw, receive, self._settings))


def build_app(graph: GraphPlan, settings: RouterSettings, backend: Backend) -> tuple[Starlette, GraphEndpoint]:
    """The application, and the part of it that counts what is in flight."""
    endpoint, desk = GraphEndpoint(graph, settings, backend), Desk(graph, settings, backend)

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def check_first(asked: Request) -> Response:
            check_key(asked.headers.raw, settings.api_keys)
            return await answer(asked)

        return check_first

    tasks = {"set": desk.set_task, "get": desk.get_task, "delete": desk.delete_task}
    routes = [
        Route(graph.route, endpoint, methods=["POST"]),
        *(Route(f"/manager/{verb}_task_status", guarded(act), methods=["POST"]) for verb, act in tasks.items()),
        Route("/status", guarded(desk.show_status)),
        Route("/openapi.json", guarded(desk.show_api)),
        Route("/health", desk.show_health),
    ]
    handlers: Any = {Refusal: _answer_refusal, HTTPException: _answer_http, CallerLeftError: _answer_nobody}
    return Starlette(routes=routes, exception_handlers=handlers), endpoint


async def _answer_refusal(_: Request, refusal: Refusal) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def _answer_http(asked: Request, error: HTTPException) -> Response:
    told = f"{asked.method} {asked.url.path[:200]}: {error.detail}"
    return await _answer_refusal(asked, Refusal(error.status_code, told, "no_such_call", headers=error.headers))


async def _answer_nobody(_: Request, __: CallerLeftError) -> Response:
    return Response(status_code=499)
