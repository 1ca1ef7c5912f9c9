"""Ray as the program of a graph needs it: one head beside it, the nodes as applications of Ray Serve, calls of them.

What it is asked for and what it tells is put into words in `deployments.py`. Except `call`, everything waits for Ray
and is called in a thread.
"""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flagscale.errors import LaunchError
from flagscale.runner.launch.ray_cluster import OLDEST
from flagscale.runner.plan.graph import GraphPlan
from flagscale.serve.graph.deployments import MOST_WAITING, NodeView, find_shortage, make_application, read_view
from flagscale.serve.graph.ray_node import NUM_STARTS, describe_end, end_leftovers, start_node

POLL_S = 0.3
END_LIMIT_S = 20.0


class BusyError(Exception):
    """More calls of a node wait than may."""


class ReplicaLostError(Exception):
    """The replica that computed has ended."""


class SilentError(Exception):
    """Ray does not tell how the nodes are."""


@dataclass(slots=True)
class Cluster:
    """A Ray cluster of our own; `head` is the command of its first node, which is started and ended here.

    working_dir: the folder that all workers start in a copy of; empty where there is none
    """

    head: Sequence[str]
    address: str
    working_dir: str = ""
    is_stopping: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _handles: dict[str, Any] = field(default_factory=dict)

    def start(self, num_hosts: int, limit_s: float) -> None:
        """Start the head, and return when all hosts have joined.

        Raises:
            LaunchError: there is no Ray, its head ended, or not all came in time.
        """
        ray = _import_ray()
        deadline = time.monotonic() + limit_s
        for attempt in range(1, NUM_STARTS + 1):
            try:
                self._process = start_node(self.head)
                self._join(ray, deadline)
                break
            except LaunchError as error:
                has_ended = self._process is not None and self._process.poll() is not None
                end_leftovers()
                if not has_ended or attempt == NUM_STARTS or self.is_stopping or time.monotonic() > deadline:
                    raise
                print(f"{error}; it is started again", flush=True)
        while (count := sum(node["Alive"] for node in ray.nodes())) < num_hosts:
            self.check_alive()
            if time.monotonic() > deadline:
                raise LaunchError(f"only {count} of {num_hosts} hosts joined Ray within {limit_s:g} s")
            time.sleep(POLL_S)

    def _join(self, ray: Any, deadline: float) -> None:
        """Join the cluster once its head can be joined: it answers before it knows itself."""
        self._wait_for_port(deadline)
        runtime_env = {"working_dir": self.working_dir} if self.working_dir else None
        while True:
            try:
                ray.init(address=self.address, runtime_env=runtime_env, logging_level="ERROR", configure_logging=False)
                return
            except (ValueError, ray.exceptions.RayError) as error:  # as of a working folder that is too large
                raise LaunchError(f"Ray cannot be joined: {error}") from None
            except (OSError, RuntimeError) as error:
                self.check_alive()
                if time.monotonic() > deadline:
                    said = str(error).strip().splitlines()[0]
                    raise LaunchError(f"the head of Ray at {self.address} cannot be joined: {said}") from None
            time.sleep(POLL_S)

    def _wait_for_port(self, deadline: float) -> None:
        """Ray itself would wait for minutes, and not say for what."""
        host, _, port = self.address.rpartition(":")
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), 1.0).close()
                return
            time.sleep(POLL_S)
        raise LaunchError(f"the head of Ray does not answer at {self.address}")

    def check_alive(self) -> None:
        """
        Raises:
            LaunchError: the head has ended.
        """
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            raise LaunchError(f"the head of Ray {describe_end(code)}")

    def deploy(self, graph: GraphPlan) -> None:
        """Begin to start all nodes.

        Raises:
            LaunchError: the cluster can never hold them.
        """
        import ray
        from ray import serve
        from ray.serve.api import RunTarget

        if fault := find_shortage(graph, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
            raise LaunchError(fault)
        serve.start(proxy_location="Disabled")
        targets = [
            RunTarget(make_application(node, graph.working_dir), name=node.name, route_prefix=None)
            for node in graph.nodes
        ]
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def look(self, graph: GraphPlan) -> dict[str, NodeView]:
        """Every node as it is.

        Raises:
            LaunchError: the head has ended.
            SilentError: Ray does not tell, as when its Serve is started again.
        """
        import ray
        from ray.serve.context import _get_global_client

        self.check_alive()
        try:
            found = _get_global_client().get_serve_details()["applications"]
        except ray.exceptions.RayError as error:
            self.check_alive()
            raise SilentError(str(error).strip().splitlines()[-1]) from None
        return {
            node.name: read_view(node, found.get(node.name, {}).get("deployments", {}).get(node.name, {}))
            for node in graph.nodes
        }

    async def call(self, node: str, args: Sequence[Any], fields: Mapping[str, Any]) -> Any:
        """What `forward` of a node gives; being cancelled cancels the call.

        Raises:
            BusyError, ReplicaLostError: as they say.
            Exception: what `forward` raised.
        """
        from ray import serve
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError

        if node not in self._handles:
            self._handles[node] = serve.get_app_handle(node)
        response = self._handles[node].forward.remote(*args, **fields)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise BusyError(f"{MOST_WAITING} calls wait already") from None
        except RayActorError:
            raise ReplicaLostError("its replica ended while it computed") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def stop(self) -> None:
        """End the head and all that runs on it; returns when it has ended."""
        self.is_stopping = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _import_ray() -> Any:
    """
    Raises:
        LaunchError: Ray, or what its Serve needs, is not installed, or too old.
    """
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise LaunchError(f"Ray Serve is not here ({error}); expected `pip install 'flagscale[ray]'`") from None
    del serve
    version = str(ray.__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST:
        raise LaunchError(f"Ray is {version}; expected {OLDEST[0]}.{OLDEST[1]} or newer")
    return ray
