"""The router as an ASGI application.

    POST /v1/completions, /v1/chat/completions, /v1/embeddings    passed to a replica
    GET  /v1/models, /v1/models/{model}                           what the pool has
    GET  /status, /metrics, /openapi.json                         with the key, where keys are set; the others above too
    PUT, DELETE /replicas/{id}                                    replicas from outside, see `registry`
    GET  /health, /                                               without a key: ready or not; the status page

The passed requests go from the server to `Forwarder` as plain ASGI messages: a request or response class around each
piece of a stream would cost more than all the rest.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import wraps
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flagscale.serve.router.answers import Refusal, Send, send_refusal
from flagscale.serve.router.history import EVERY_S, History
from flagscale.serve.router.metrics import Metrics, Record
from flagscale.serve.router.openapi import PASSED_PATHS, describe_api
from flagscale.serve.router.page import load_page
from flagscale.serve.router.paired import PairForwarder
from flagscale.serve.router.pool import Pool
from flagscale.serve.router.registry import Registry
from flagscale.serve.router.request import CallerLeftError, Receive, Scope, check_key, read_request
from flagscale.serve.router.settings import RouterSettings

log = logging.getLogger(__name__)

CALLER_LEFT = 499
ABORT = "flagscale.abort"
"""an extension of the ASGI scope: closes the connection at once, without what was not sent yet"""

_LINGER_S = 5.0

_Answerer = Callable[[Asked], Awaitable[Response]]


class Passthrough:
    """Passes one request on, and ends its way to the replica when the caller leaves."""

    def __init__(self, pool: Pool, settings: RouterSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._forwarder = PairForwarder(pool, settings, metrics)

    async def close(self) -> None:
        await self._forwarder.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        record = Record(loop.time())
        try:
            check_key(scope["headers"], self._settings.api_keys)
            request = await read_request(scope, receive, self._settings)
            record.started = loop.time()
            forward = asyncio.create_task(self._forwarder.forward(request, send, record))
            if not await outlives(forward, receive):
                record.code = CALLER_LEFT
        except CallerLeftError:
            record.code = CALLER_LEFT
        except Refusal as refusal:
            record.code = refusal.status
            await send_refusal(refusal, send, is_all=record.code != 413)
            if record.code == 413:
                await discard_body(receive)
                await send({"type": "http.response.body"})
        finally:
            self._metrics.count(record, loop.time() - record.started)
        if record.code == CALLER_LEFT and (abort := scope.get("extensions", {}).get(ABORT)):
            abort()


async def discard_body(receive: Receive) -> None:
    """Let a caller finish sending for a while: a connection that is closed on it would lose the answer on its way."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body"):
                pass


async def outlives(work: "asyncio.Task[None]", receive: Receive) -> bool:
    """Wait for `work`, or until the caller leaves: then end it. Whether it came to its end; raises what it raised."""
    leaving = asyncio.create_task(_wait_until_left(receive))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        return False
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Desk:
    """Answers what the router knows itself."""

    def __init__(self, pool: Pool, settings: RouterSettings, metrics: Metrics, history: History) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._history = history
        self._started = time.time()

    def models(self) -> list[dict[str, object]]:
        made = int(self._started)
        return [
            {"id": name, "object": "model", "created": made, "owned_by": "flagscale"} for name in self._pool.models()
        ]

    async def list_models(self, _: Asked) -> Response:
        return JSONResponse({"object": "list", "data": self.models()})

    async def show_model(self, asked: Asked) -> Response:
        name = asked.path_params["model"]
        found = next((model for model in self.models() if model["id"] == name), None)
        if found is None:
            raise Refusal(404, f"the model `{name[:100]}` is not served here", "model_not_found", "model")
        return JSONResponse(found)

    async def show_health(self, _: Asked) -> Response:
        states = self._pool.states()
        ready = sum(state.is_ready for state in states)
        body = {"status": "ok" if ready else "no replica is ready", "ready": ready, "replicas": len(states)}
        return JSONResponse(body, 200 if ready else 503)

    async def show_metrics(self, _: Asked) -> Response:
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_status(self, _: Asked) -> Response:
        replicas = [
            {**asdict(state), "history": [asdict(sample) for sample in self._history.samples(state.id)]}
            for state in self._pool.states()
        ]
        body = {
            "uptime_s": time.time() - self._started,
            "policy": self._settings.policy,
            "pair_policy": self._settings.pair_policy,
            "sample_every_s": EVERY_S,
            "held": {model: self._pool.held(model) for model in self._pool.models()},
            "replicas": replicas,
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    async def show_page(self, _: Asked) -> Response:
        html, policy = load_page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(html, media_type="text/html", headers=headers)

    async def show_api(self, _: Asked) -> Response:
        return JSONResponse(describe_api(bool(self._settings.api_keys)))


def build_app(pool: Pool, settings: RouterSettings) -> Starlette:
    """The router in front of `pool`, which was made with the same settings. Its lifespan is the probing's."""
    metrics, history, registry = Metrics(pool), History(pool), Registry(pool, settings)
    passthrough, desk = Passthrough(pool, settings, metrics), _Desk(pool, settings, metrics, history)

    def guarded(answerer: _Answerer) -> _Answerer:
        @wraps(answerer)
        async def check_first(asked: Asked) -> Response:
            check_key(asked.headers.raw, settings.api_keys)
            return await answerer(asked)

        return check_first

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        pool.start()
        keeper = asyncio.create_task(history.keep())
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await passthrough.close()
            await pool.close()

    routes = [Route(path, passthrough, methods=["POST"]) for path in PASSED_PATHS]
    routes += [
        Route("/v1/models", guarded(desk.list_models)),
        Route("/v1/models/{model:path}", guarded(desk.show_model)),
        Route("/replicas/{id}", registry.answer, methods=["PUT", "DELETE"]),
        Route("/status", guarded(desk.show_status)),
        Route("/metrics", guarded(desk.show_metrics)),
        Route("/openapi.json", guarded(desk.show_api)),
        Route("/health", desk.show_health),
        Route("/", desk.show_page),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={Refusal: _answer_refusal, HTTPException: _answer_http, Exception: _answer_fault},
    )


async def _answer_refusal(_: Asked, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def _answer_fault(asked: Asked, _: Exception) -> Response:
    """A mistake of ours, in the same shape; its traceback goes to the log."""
    return await _answer_refusal(asked, Refusal(500, "the router failed; its log says why", "internal_error"))


async def _answer_http(asked: Asked, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    what: dict[int, Any] = {
        404: f"there is no {asked.url.path[:200]} here",
        405: f"{asked.method} is not for this path",
    }
    code = "unknown_path" if error.status_code == 404 else "invalid_request"
    refusal = Refusal(error.status_code, what.get(error.status_code, error.detail), code, None, error.headers)
    return await _answer_refusal(asked, refusal)
