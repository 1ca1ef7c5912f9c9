"""What the router says itself: errors in the shape that OpenAI's clients read, and small JSON answers."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from flagscale.errors import FlagScaleError

Send = Callable[[dict[str, Any]], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}


class Refusal(FlagScaleError):  # noqa: N818 (an answer, more than an error)
    """A request that gets an error for an answer: `status`, and OpenAI's `code` and `param`."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """`{"error": {..}}`, on one line."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """The same as an event of a stream that has begun."""
        return b"data: " + self.body() + b"\n\n"


async def send_refusal(refusal: Refusal, send: Send, is_all: bool = True) -> None:
    """The whole answer; unless `is_all`, its end is left for the caller to send."""
    body = refusal.body()
    headers: HeaderList = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": not is_all})
