"""The program that answers for a graph of models: one asyncio loop with the interface, and Ray beside it.

It begins to listen at once, starts the head of Ray and the nodes, and is ready when every node has its replicas. A
replica that dies is Ray's to start again. When the head of Ray ends, so does the program, and the run has failed.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, TypeVar

import uvicorn

from flagscale.errors import FlagScaleError, LaunchError, UserError
from flagscale.runner.plan.graph import GraphPlan
from flagscale.runner.plan.service import ServicePlan, decode_service
from flagscale.serve.control import build_control, serve_quietly
from flagscale.serve.folder import Control, save_control
from flagscale.serve.graph.app import GraphEndpoint, build_app
from flagscale.serve.graph.cluster import Cluster, SilentError
from flagscale.serve.graph.deployments import NodeView
from flagscale.serve.router.server import listen, make_protocol
from flagscale.serve.router.settings import RouterSettings
from flagscale.serve.terms import make_settings

Phase = Literal["starting", "ready", "degraded", "failed", "stopping"]
T = TypeVar("T")
LOOK_EVERY_S = 0.5
SILENT_LIMIT_S = 60.0
HOLD_FAILED_S = 600.0
"""how long a graph that failed waits to be asked why, before it ends by itself"""


def tell(line: str) -> None:
    """To the program's output, which is the service's log."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Server(uvicorn.Server):
    """Serves until it is told to end, and leaves signals to the program."""

    def capture_signals(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


@dataclass(slots=True)
class GraphProgram:
    """A running graph."""

    service: ServicePlan
    graph: GraphPlan
    run_id: str
    settings: RouterSettings
    token: str
    cluster: Cluster
    views: dict[str, NodeView] = field(default_factory=dict)
    why: str | None = None
    note: str = "Ray starts"
    is_stopping: bool = False
    was_ready: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))
    endpoint: GraphEndpoint = field(init=False)
    server: Server = field(init=False)

    def __post_init__(self) -> None:
        app, self.endpoint = build_app(self.graph, self.settings, self)
        self.server = Server(
            uvicorn.Config(
                app,
                http=make_protocol(self.settings),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, int(self.settings.drain_timeout_s)),
            )
        )

    # --- what it is asked ---------------------------------------------------------------------------------------------

    async def call(self, node: str, args: Sequence[Any], fields: Mapping[str, Any]) -> Any:
        return await self.cluster.call(node, args, fields)

    def find_missing(self) -> list[str]:
        return [node.name for node in self.graph.nodes if not (v := self.views.get(node.name)) or not v.num_ready]

    @property
    def phase(self) -> Phase:
        if self.is_stopping:
            return "stopping"
        if self.why is not None:
            return "failed"
        is_full = len(self.views) == len(self.graph.nodes) and all(
            view.is_healthy and view.num_ready for view in self.views.values()
        )
        if is_full:
            return "ready"
        return "degraded" if self.was_ready else "starting"

    def describe(self) -> dict[str, Any]:
        """The service as JSON values, as a controller tells it; `graph` is its path."""
        return {
            "name": self.service.name,
            "run_id": self.run_id,
            "url": self.service.url,
            "graph": self.graph.route,
            "request": dict(self.graph.request),
            "state": self.phase,
            "why": self.why,
            "version": 1,
            "needs_key": bool(self.settings.api_keys),
            "api_key_env": self.service.api_key_env,
            "in_flight": self.endpoint.num_in_flight,
            "models": [self._describe_node(index) for index in range(len(self.graph.nodes))],
            "replicas": [
                {
                    "name": replica.id,
                    "model": name,
                    "state": replica.state,
                    "since": replica.since,
                    "hosts": [replica.host],
                    "takes": [f"{replica.host} pid {replica.pid}"] if replica.pid else [],
                    "pid": replica.pid,
                    "progress": "" if replica.state == "ready" else view.message or self.note,
                }
                for name, view in self.views.items()
                for replica in view.replicas
            ],
            "note": self.note,
            "update": None,
        }

    def _describe_node(self, index: int) -> dict[str, Any]:
        node = self.graph.nodes[index]
        view = self.views.get(node.name)
        return {
            "name": node.name,
            "engine": node.class_name,
            "served_name": node.name,
            "wanted": view.wanted if view else node.scaling.initial,
            "ready": view.num_ready if view else 0,
            "lowest": node.scaling.lowest,
            "highest": node.scaling.highest,
            "waiting": 0,
            "depends": list(node.depends),
        }

    def begin_update(self, service: ServicePlan, config: Mapping[str, Any]) -> NoReturn:
        del service, config
        raise UserError("a graph of models is not updated while it runs; stop it, and start it anew")

    def stop(self) -> None:
        """Begin to end in order. Also called from a signal."""
        self.is_stopping = True
        self.server.should_exit = True
        self.stopped.set()

    # --- its life -----------------------------------------------------------------------------------------------------

    async def run(self, control_socket: socket.socket) -> int:
        """Until it is asked to end, or Ray ends; returns the exit code."""
        with listen(self.settings) as listener:
            tell(f"{self.service.name}: listens on {self.service.url}{self.graph.route}")
            control = asyncio.create_task(serve_quietly(build_control(self), control_socket))
            serving = asyncio.create_task(self.server.serve(sockets=[listener]))
            keeping = asyncio.create_task(self.keep())
            try:
                await asyncio.wait([serving, keeping], return_when=asyncio.FIRST_COMPLETED)
                if keeping.done() and not self.is_stopping and keeping.exception() is not None:
                    await self._fail(keeping.exception())
                self.server.should_exit = True
                tell(f"ends; requests in flight: {self.endpoint.num_in_flight}")
                await serving
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
            finally:
                await self._wait_for(self.cluster.stop)
                tell("has ended")
                control.cancel()
                await asyncio.wait([control])
        return 1 if self.why else 0

    async def _fail(self, error: BaseException | None) -> None:
        """Tell why, and stay for a while so that whoever waits for the start can ask."""
        if not isinstance(error, FlagScaleError):
            import traceback

            traceback.print_exception(error)
        self.why = str(error) if isinstance(error, FlagScaleError) else f"the program made a mistake: {error!r}"
        tell(f"error: {self.why}")
        if not self.was_ready:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), HOLD_FAILED_S)

    async def keep(self) -> None:
        """Start Ray and the nodes, then look at them for as long as the program runs.

        Raises:
            LaunchError: Ray did not start or has ended, or a node cannot be started.
        """
        await self._wait_for(self.cluster.start, self.graph.num_hosts, self.service.start_timeout_s)
        self.note = "nodes start"
        tell("Ray is there; nodes start")
        await asyncio.gather(self._watch_head(), self._keep_nodes())

    async def _watch_head(self) -> None:
        """By itself, for whoever asks a Ray without a head waits long."""
        while True:
            self.cluster.check_alive()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _keep_nodes(self) -> None:
        await self._wait_for(self.cluster.deploy, self.graph)
        clock = time.monotonic
        seen = clock()
        deadline = seen + self.service.start_timeout_s
        while True:
            try:
                self.views = await self._wait_for(self.cluster.look, self.graph)
                seen = clock()
            except SilentError as error:
                if clock() - seen > SILENT_LIMIT_S:
                    raise LaunchError(f"Ray did not answer for {SILENT_LIMIT_S:g} s: {error}") from None
            if not self.was_ready:
                self._check_start(clock() > deadline)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _wait_for(self, function: Callable[..., T], *args: Any) -> T:
        """A function that waits for Ray, in a thread; the loop's own threads would be waited for at its end."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    def _check_start(self, is_late: bool) -> None:
        for name, view in self.views.items():
            if view.is_failed:
                raise LaunchError(f"node {name} cannot be started: {view.message}")
        if self.phase == "ready":
            self.was_ready = True
            tell("every node has its replicas")
        elif is_late:
            missing = ", ".join(self.find_missing())
            raise LaunchError(f"no replica of {missing} was ready after {self.service.start_timeout_s:g} s")


def run_program(job: Mapping[str, Any], address: str, head: Sequence[str]) -> int:
    """Be the program of a graph until it is stopped; returns the exit code.

    job: the run's job.json; address: where the head of Ray will answer; head: the command that starts it

    Raises:
        UserError: the settings cannot be right, or the address of the service is taken.
    """
    service = decode_service(job["plan"]["service"])
    assert service.graph is not None
    settings = make_settings(service, os.environ)
    with socket.create_server(("127.0.0.1", 0)) as control_socket:
        control = Control(control_socket.getsockname()[1], secrets.token_urlsafe(24), "", os.getpid())
        save_control(Path(service.exp_dir), control)

        async def run() -> int:
            cluster = Cluster(head, address, graph.working_dir)
            program = GraphProgram(service, graph, job["run_id"], settings, control.token, cluster)

            def end(_signum: int, _frame: FrameType | None) -> None:
                loop.call_soon_threadsafe(program.stop)

            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, end)
            return await program.run(control_socket)

        graph = service.graph
        return asyncio.run(run())
