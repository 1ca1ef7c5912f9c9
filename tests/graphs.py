"""Graphs of models for tests: a file of classes, and the configuration that makes a graph of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factories import Tree, serve_tree

from flagscale.runner.plan.graph import GraphPlan, NodePlan
from flagscale.runner.plan.scaling import Scaling

MODELS = '''"""Classes of every kind that a graph may have."""

import asyncio


class Upper:
    def forward(self, prompt: str) -> str:
        return prompt.upper()


class Length:
    async def forward(self, text: str) -> int:
        return len(text)


class Join:
    def forward(self, first, second):
        return {"text": first, "length": second}
'''


def node(name: str, class_name: str, *depends: str, **fields: Any) -> Tree:
    row = {"serve_id": name, "module": "models.py", "name": class_name, **fields}
    return {**row, "depends": list(depends)} if depends else row


NODES = (node("A", "Upper"), node("B", "Length", "A"), node("C", "Join", "A", "B"))


def graph_tree(*nodes: Tree, request: Any = None, **changes: Any) -> Tree:
    """The graph of `NODES`, or of other nodes, asked with a `prompt`."""
    deploy = {
        "enable_composition": True,
        "port": 6701,
        "name": "/generate",
        "request": request or {"args": ["prompt"], "types": ["str"]},
    }
    runner = {"device_type": "cpu", "deploy": deploy}
    return serve_tree(*(nodes or NODES), **{"experiment__runner": runner, **changes})


def write_models(folder: Path, text: str = MODELS) -> Path:
    path = folder / "models.py"
    path.write_text(text)
    return path


def make_graph(
    depends: Mapping[str, Sequence[str]], request: Sequence[tuple[str, str]] = (("prompt", "str"),), **fields: Any
) -> GraphPlan:
    """A graph as the planner gives it, of nodes that are asked for nothing but their name."""
    nodes = tuple(NodePlan(name, "/models.py", name, tuple(others), Scaling()) for name, others in depends.items())
    return GraphPlan(nodes, **{"route": "/generate", "request": tuple(request), **fields})
