"""From options to a server that has ended: bind, load, serve, drain.

The port is bound before the model is loaded, so a port that is taken is told at once, and probes are answered while it
loads. SIGTERM lets what runs finish and refuses what comes; before the model is loaded there is nothing to finish, and
the signal does what it does to any process.
"""

import asyncio
import os
import signal
import socket
import time
from types import FrameType

import uvicorn

from flagscale.errors import UserError
from flagscale.inference.engine import AsyncEngine, Engine
from flagscale.inference.server.app import make_app
from flagscale.inference.server.options import ServerOptions
from flagscale.inference.server.service import Service

LAST_WORDS_S = 5
"""for connections after the last request was finished or aborted"""


class DrainingServer(uvicorn.Server):
    """Goes on answering after SIGTERM until nothing is in flight, or the time for that is over."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self._service.is_open:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        elif self._service.is_draining:
            self.should_exit = True
        else:
            self._deadline = time.monotonic() + self._drain_s
            self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._service.is_draining:
            is_late = time.monotonic() > self._deadline
            if is_late and self._service.num_in_flight:
                await self._service.abort_all()
            if is_late or not self._service.num_in_flight:
                return True
        return await super().on_tick(counter)


async def serve(options: ServerOptions) -> None:
    """Serve until a signal ends it.

    Raises:
        UserError: the port cannot be bound, or the model cannot be loaded.
    """
    service = Service(options.names)
    bound = bind(options.host, options.port)
    address = f"http://{options.host}:{bound.getsockname()[1]}"
    config = uvicorn.Config(
        make_app(service, options.keys, options.max_body_bytes),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    server = DrainingServer(config, service, options.drain_s)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        print(f"loading {options.model}; listening on {address}", flush=True)
        engine = await asyncio.to_thread(load_engine, options)
        async with AsyncEngine(engine) as running:
            service.open(engine, running)
            print(f"serving {options.names[0]} on {address}", flush=True)
            await serving
    finally:
        server.should_exit = True
        await serving
        service.close()


def load_engine(options: ServerOptions) -> Engine:
    """
    Raises:
        UserError: there is no model that the engine can run.
    """
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return Engine.from_folder(options.model, options.engine, dtype, options.device)


def bind(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: it is taken, not ours to take, or no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"{host}:{port}: cannot be bound: {reason}; expected a free port of this machine") from None
