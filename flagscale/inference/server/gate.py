"""Who may pass: bearer tokens, states in which the engine cannot be asked, and how large a body may be.

Plain ASGI, since it has to count a streamed request until its last byte, and a body before it is whole.
"""

import hmac
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flagscale.inference.server.faults import error_response
from flagscale.inference.server.service import Service

OPEN_PATHS = ("/health",)
"""answered without a key: probes have none"""

FREE_PATHS = ("/health", "/version", "/metrics", "/openapi.json")
"""answered in every state"""

REASONS = {"loading": "the model is still loading", "draining": "the server is ending"}


class Gate:
    """Lets a request through to `app`, or answers it."""

    def __init__(
        self, app: ASGIApp, service: Service, keys: Sequence[str], routes: Sequence[str], max_body_bytes: int
    ) -> None:
        self._app, self._service, self._routes = app, service, frozenset(routes)
        self._max_body_bytes = max_body_bytes
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = f"req-{secrets.token_hex(12)}"
        path = scope["path"]

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
                route = path if path in self._routes else "other"
                self._service.meter.num_answered.labels(route, str(message["status"])).inc()
            await send(message)

        if path not in OPEN_PATHS and not self._has_key(Headers(scope=scope)):
            message = "a valid key is needed: send the header `Authorization: Bearer KEY`"
            challenge = {"WWW-Authenticate": "Bearer"}
            refusal = error_response(401, message, code="invalid_api_key", headers=challenge)
            await refusal(scope, receive, tell)
        elif path in FREE_PATHS:
            await self._app(scope, self._limit(receive), tell)
        elif (reason := REASONS.get(self._service.state)) is not None:
            await error_response(503, reason, headers={"Connection": "close"})(scope, receive, tell)
        else:
            await self._count(scope, receive, tell)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.num_in_flight += 1
        try:
            await self._app(scope, self._limit(receive), send)
        finally:
            self._service.num_in_flight -= 1

    def _limit(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_up_to() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(
                    413, f"the body is larger than {self._max_body_bytes} bytes", {"Connection": "close"}
                )
            return message

        return receive_up_to

    def _has_key(self, headers: Headers) -> bool:
        if not self._keys:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return kind.lower() == "bearer" and any(found)
