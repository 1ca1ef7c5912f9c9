"""Evaluating a graph once: every node as soon as what it depends on is there, and none twice."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

Call = Callable[[str, Sequence[Any]], Awaitable[Any]]


class NodeError(Exception):
    """A node failed: `node` is its name, `__cause__` what it raised."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


async def evaluate_graph(depends: Mapping[str, Sequence[str]], sink: str, call: Call) -> Any:
    """The result of `sink`.

    depends: node -> the nodes whose results it takes, without circles
    call: computes a node from these results; nodes that do not wait for each other are computed at the same time

    Raises:
        NodeError: the node that failed first. All others have been cancelled and have ended then, as they have when
            the evaluation itself is cancelled.
    """
    tasks: dict[str, asyncio.Task[Any]] = {}

    async def compute(node: str) -> Any:
        # Asked for by shield: who is cancelled while it waits must not cancel the node for those that wait for it too.
        results = [await asyncio.shield(tasks[other]) for other in depends[node]]
        try:
            return await call(node, results)
        except Exception as error:  # whatever the user's code raises
            raise NodeError(node) from error

    for node in TopologicalSorter(depends).static_order():
        tasks[node] = asyncio.create_task(compute(node), name=node)
    try:
        done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
        # Those that waited for the one that failed raise its error after it: any of them names it.
        failed = next((task for task in done if task.exception() is not None), None)
        return (failed or tasks[sink]).result()
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
