"""The nodes of a graph as deployments of Ray Serve: what is asked for, and what Ray tells of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.runner.config.signature import UnreadableError, read_outline
from flagscale.runner.plan.graph import GraphPlan, NodePlan

MOST_CALLS = 100
"""of a coroutine `forward` at a time, in one replica"""
MOST_WAITING = 1024
"""calls of one node that wait for a replica with room; beyond, a request is refused"""
HEALTH_EVERY_S = 5.0
NUM_STARTS = 3
"""of replicas that end while they start, as on a busy machine; a class that cannot be made is not waited for"""
CAUSE = "NodeStartError: "
STATES = {"RUNNING": "ready", "STARTING": "starting", "STOPPING": "draining"}


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as Ray tells of it. since: seconds since the epoch"""

    id: str
    state: str
    host: str
    pid: int | None
    since: float | None


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as Ray tells of it. is_failed: it cannot be started, and message says why"""

    wanted: int
    replicas: tuple[ReplicaView, ...]
    is_healthy: bool
    is_failed: bool
    message: str

    @property
    def num_ready(self) -> int:
        return sum(replica.state == "ready" for replica in self.replicas)


def find_shortage(graph: GraphPlan, hosts: Sequence[Mapping[str, float]]) -> str | None:
    """Why the replicas that a graph begins with can never be placed; None where they may.

    hosts: what each host of the cluster has, by Ray's names
    """
    totals: dict[str, float] = {}
    for node in graph.nodes:
        for name, amount in ((node.gpu_name, node.num_gpus), ("CPU", node.num_cpus)):
            most = max((host.get(name, 0) for host in hosts), default=0)
            if amount > most:
                return f"{node.name} needs {amount:g} {name} in one place, and the largest host has {most:g}"
            totals[name] = totals.get(name, 0) + amount * node.scaling.initial
    for name, needed in totals.items():
        have = sum(host.get(name, 0) for host in hosts)
        if needed > have:
            return f"the replicas that the graph begins with need {needed:g} {name}, and the hosts have {have:g}"
    return None


def make_application(node: NodePlan, working_dir: str) -> Any:
    """One node as an application of Ray Serve."""
    from ray import serve

    from flagscale.serve.graph.node import Node

    path = node.path
    if working_dir and Path(path).is_relative_to(working_dir):
        path = str(Path(path).relative_to(working_dir))
    deployment = serve.deployment(Node, name=node.name, **make_options(node))
    return deployment.bind(path, node.class_name)


def is_serial(node: NodePlan) -> bool:
    """Whether a replica computes one call at a time: then others wait for whichever replica is free first."""
    try:
        outline = read_outline(Path(node.path))
    except UnreadableError:
        return False
    found = outline.classes.get(node.class_name)
    forward = found.methods.get("forward") if found else None
    return forward is not None and not forward.is_async


def make_options(node: NodePlan) -> dict[str, Any]:
    """A node's options as `ray.serve.deployment` takes them."""
    actor: dict[str, Any] = {"num_cpus": node.num_cpus}
    if node.num_gpus:
        actor |= (
            {"num_gpus": node.num_gpus} if node.gpu_name == "GPU" else {"resources": {node.gpu_name: node.num_gpus}}
        )
    if node.num_cpus >= 1:
        actor["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(int(node.num_cpus))}}
    scaling = node.scaling
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": 1 if is_serial(node) else MOST_CALLS,
        "max_queued_requests": MOST_WAITING,
        "health_check_period_s": HEALTH_EVERY_S,
        "max_constructor_retry_count": NUM_STARTS,
        "logging_config": {"enable_access_log": False},
    }
    if scaling.lowest == scaling.highest:
        return {**options, "num_replicas": scaling.initial}
    bounds = {
        "min_replicas": scaling.lowest,
        "initial_replicas": scaling.initial,
        "max_replicas": scaling.highest,
        "target_ongoing_requests": scaling.target,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }
    return {**options, "autoscaling_config": bounds}


def read_view(node: NodePlan, row: Mapping[str, Any]) -> NodeView:
    """A deployment's details; empty where Ray has none yet."""
    status, message = _name_of(row.get("status", "UPDATING")), str(row.get("message", ""))
    replicas = [
        ReplicaView(
            id=f"{node.name}-{found['replica_id']}",
            state=STATES.get(_name_of(found["state"]), "starting"),
            host=str(found.get("node_ip") or "-"),
            pid=found.get("pid"),
            since=found.get("start_time_s"),
        )
        for found in row.get("replicas", [])
    ]
    return NodeView(
        wanted=int(row.get("target_num_replicas", node.scaling.initial)),
        replicas=tuple(replicas),
        is_healthy=status in ("HEALTHY", "UPSCALING", "DOWNSCALING"),
        is_failed=status == "DEPLOY_FAILED" or CAUSE in message,
        message=find_cause(message),
    )


def _name_of(value: Any) -> str:
    return str(getattr(value, "value", value))


def find_cause(message: str) -> str:
    """Of what Ray says about a node: the line in which the node itself tells why, else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    marks = [line.partition(CAUSE)[2] for line in lines if CAUSE in line]
    return marks[-1] if marks else lines[0] if lines else ""
