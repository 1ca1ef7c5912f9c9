"""The router as a process: listening, its guards against callers that never finish, and its end.

uvicorn does the work. Added are what a public address needs: a bound on the time and the size of a request's headers
(bodies have theirs in `request`), and an end in which requests finish first and everybody is told how many do.
"""

import asyncio
import logging
import socket
import sys
from asyncio.events import TimerHandle
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flagscale.errors import UserError
from flagscale.serve.router.app import ABORT, build_app
from flagscale.serve.router.pool import Pool
from flagscale.serve.router.settings import RouterSettings

log = logging.getLogger(__name__)

_CUT_GRACE_S = 3
_BACKLOG = 2048
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def make_protocol(settings: RouterSettings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with a limit on headers, from the connection or the byte after an answer to their end."""

    class GuardedProtocol(HttpToolsProtocol):
        _timer: TimerHandle | None = None
        _num_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and self._timer is None:
                self._await_headers()
            super().data_received(data)
            if self._timer is not None:
                self._num_bytes += len(data)
                if self._num_bytes > settings.max_header_bytes:
                    self._refuse(_TOO_LARGE)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def _await_headers(self) -> None:
            self._num_bytes = 0
            self._timer = self.loop.call_later(settings.header_timeout_s, self._refuse, _TOO_LATE)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, answer: bytes) -> None:
            self._stop_waiting()
            if not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return GuardedProtocol


class RouterServer(uvicorn.Server):
    """A server that ends in order: it accepts nobody new, lets requests finish for `drain_timeout_s`, then cuts them.

    `run()` blocks until SIGTERM or SIGINT; a service that has a loop of its own awaits `serve(sockets=[socket])`, and
    sets `should_exit` to end it.
    """

    def __init__(self, pool: Pool, settings: RouterSettings) -> None:
        self._pool = pool
        self._settings = settings
        super().__init__(
            uvicorn.Config(
                build_app(pool, settings),
                http=make_protocol(settings),
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(settings.drain_timeout_s) + _CUT_GRACE_S,
            )
        )
        uvicorn_log = logging.getLogger("uvicorn.error")
        uvicorn_log.addFilter(_is_news)
        uvicorn_log.setLevel(logging.WARNING)  # that it starts and ends is told here

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        count = self._pool.in_flight() + self._pool.held()
        tell(
            f"router ends; requests in flight: {count}"
            + f", they have {self._settings.drain_timeout_s:g} s" * bool(count)
        )
        cutter = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cutter.cancel()
        tell("router has ended")

    async def _cut(self) -> None:
        await asyncio.sleep(self._settings.drain_timeout_s)
        tell(f"router cuts what has not finished; requests: {self._pool.cut_all()}")


def listen(settings: RouterSettings) -> socket.socket:
    """A socket that listens at the settings' address. Raises UserError where that cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return listener


def run_router(pool: Pool, settings: RouterSettings) -> None:
    """Serve until SIGTERM or SIGINT, then end in order. Raises UserError where the address cannot be had."""
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        tell(f"router listens on http://{f'[{host}]' if ':' in host else host}:{port}")
        RouterServer(pool, settings).run(sockets=[listener])


def tell(line: str) -> None:
    """To whoever started the router: its output is the service's log."""
    print(line, file=sys.stderr, flush=True)


def _is_news(record: logging.LogRecord) -> Any:
    """An answer that was broken off is told where it happens, with the reason; uvicorn only sees that it has no end."""
    return "without completing response" not in record.getMessage()
