"""Speaking to a controller: HTTP on this machine's loopback, with a token that only the service's owner can read.

GET  /status            the service as JSON
POST /update {service}  put another version in its place; returns at once, `status` tells how far it is
POST /stop              end in order; returns at once
"""

import asyncio
import hmac
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flagscale.errors import FlagScaleError, RunError, UserError
from flagscale.serve.folder import find_control

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from flagscale.runner.plan.service import ServicePlan

ASK_LIMIT_S = 10.0


class NoControllerError(RunError):
    """No controller answers for this folder."""


def ask_controller(exp_dir: Path, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the controller of a service answers; a body makes it a POST.

    Raises:
        NoControllerError: none answers.
        UserError: it refuses, with its reason.
    """
    control = find_control(exp_dir)
    if control is None:
        raise NoControllerError(f"no service was started in {exp_dir}")
    request = urllib.request.Request(
        control.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {control.token}", "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ASK_LIMIT_S) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        with error:
            told_text = error.read().decode(errors="replace")
        if error.code == 401:
            raise NoControllerError(f"no controller answers for {exp_dir}: its port is another service's") from None
        raise UserError(json.loads(told_text)["error"] if error.code == 409 else told_text) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)  # of an URLError the one that it stands for
        told_text = str(getattr(reason, "strerror", None) or reason).lower()
        raise NoControllerError(f"the controller of {exp_dir} does not answer: {told_text}") from None


class Update(Protocol):
    """An update that has begun."""

    @property
    def version(self) -> int: ...


class Controlled(Protocol):
    """What answers for a service: its controller, or the program of a graph of models."""

    @property
    def token(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def begin_update(self, service: "ServicePlan", config: Mapping[str, Any]) -> Update: ...

    def stop(self) -> None: ...


def build_control(controller: Controlled) -> "Starlette":
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from flagscale.runner.plan.service import decode_service

    async def show_status(_: "Request") -> "Response":
        return JSONResponse(controller.describe())

    async def update(asked: "Request") -> "Response":
        try:
            body = await asked.json()
            begun = controller.begin_update(decode_service(body["service"]), body["config"])
        except FlagScaleError as error:
            return JSONResponse({"error": str(error)}, 409)
        return JSONResponse({"version": begun.version})

    async def stop(_: "Request") -> "Response":
        controller.stop()
        return JSONResponse({})

    routes = [
        Route("/status", show_status),
        Route("/update", update, methods=["POST"]),
        Route("/stop", stop, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Gate, token=controller.token)])


class _Gate:
    """Lets in who shows the token."""

    def __init__(self, app: Any, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        shown = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(shown, self.expected):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("a token is needed", 401)(scope, receive, send)
            return
        await self.app(scope, receive, send)


async def serve_quietly(app: "Starlette", listener: socket.socket) -> None:
    """Answer until cancelled; signals are left to whoever runs the loop."""
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = server.force_exit = True
        await asyncio.wait([serving])
        raise
