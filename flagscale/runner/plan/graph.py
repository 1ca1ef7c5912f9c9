"""A graph of models as a value: its nodes, what they take from each other, and what a request holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flagscale.runner.plan.scaling import Scaling


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node: a class whose `forward` is given the request, or the results of the nodes that it depends on.

    name: its serve_id; path: the absolute path of the file that holds `class_name`
    num_gpus, num_cpus: of one replica; gpu_name: the name under which Ray counts the chips
    """

    name: str
    path: str
    class_name: str
    depends: tuple[str, ...]
    scaling: Scaling
    num_gpus: float = 0.0
    num_cpus: float = 0.0
    gpu_name: str = "GPU"


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """A whole graph; exactly one node is no other's dependency, and its result is the answer.

    route: the path that requests come to; request: (field, type) in order
    working_dir: the folder that every node's process starts in a copy of; empty where there is none
    num_hosts: how many Ray nodes it waits for
    """

    nodes: tuple[NodePlan, ...]
    route: str
    request: tuple[tuple[str, str], ...]
    working_dir: str = ""
    num_hosts: int = 1

    @property
    def depends(self) -> dict[str, tuple[str, ...]]:
        return {node.name: node.depends for node in self.nodes}


def encode_graph(graph: GraphPlan) -> dict[str, Any]:
    """The graph as JSON values."""
    encoded = asdict(graph)
    encoded["nodes"] = [{**node, "depends": list(node["depends"])} for node in encoded["nodes"]]
    return {**encoded, "request": [list(field) for field in graph.request]}


def decode_graph(row: Mapping[str, Any]) -> GraphPlan:
    """The inverse of `encode_graph`."""
    nodes = tuple(
        NodePlan(**{**node, "depends": tuple(node["depends"]), "scaling": Scaling(**node["scaling"])})
        for node in row["nodes"]
    )
    return GraphPlan(**{**row, "nodes": nodes, "request": tuple((name, kind) for name, kind in row["request"])})


def describe_graph(graph: GraphPlan) -> list[str]:
    """What will run in Ray, a line for each node, and what is asked for and answered."""
    fields = ", ".join(f"{name}: {kind}" for name, kind in graph.request)
    lines = [f"POST {graph.route} ({fields})"]
    for node in graph.nodes:
        source = f"({', '.join(node.depends)})" if node.depends else "(request)"
        bounds = node.scaling
        count = f"{bounds.initial}" if bounds.lowest == bounds.highest else f"{bounds.lowest} to {bounds.highest}"
        needs = f", {node.num_gpus:g} {node.gpu_name}" * bool(node.num_gpus)
        needs += f", {node.num_cpus:g} CPU" * bool(node.num_cpus)
        lines.append(f"{node.name} = {node.class_name}{source}  # of {node.path}, replicas: {count}{needs}")
    return [*lines, *[f"in a copy of {graph.working_dir}"] * bool(graph.working_dir)]
