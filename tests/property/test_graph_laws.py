"""Laws of graphs of models: what is computed, in which order, how often; and that no circle is missed."""

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from graphs import make_graph
from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.config.graph import find_circles, list_sinks
from flagscale.runner.plan.graph import decode_graph, encode_graph
from flagscale.serve.graph.board import TaskBoard
from flagscale.serve.graph.evaluate import NodeError, evaluate_graph

Graph = dict[str, list[str]]


@st.composite
def graphs(draw: st.DrawFn, has_one_sink: bool = True) -> Graph:
    """A graph without circles, its nodes in any order; each takes results of others, one of them perhaps twice."""
    count = draw(st.integers(1, 9))
    names = [f"n{index}" for index in range(count)]
    graph: Graph = {}
    for index, name in enumerate(names):
        graph[name] = draw(st.lists(st.sampled_from(names[:index]), max_size=3)) if index else []
    if has_one_sink:
        last = names[-1]
        graph[last] += [name for name in list_sinks(graph) if name != last]
    order = draw(st.permutations(names))
    return {name: graph[name] for name in order}


def compute(node: str, results: Sequence[Any]) -> str:
    return f"{node}({','.join(results)})"


def compute_directly(graph: Graph, node: str) -> str:
    return compute(node, [compute_directly(graph, other) for other in graph[node]])


@given(graphs(), st.data())
def test_every_node_is_computed_once_after_what_it_takes(graph: Graph, data: st.DataObject) -> None:
    pauses = {name: data.draw(st.integers(0, 3)) for name in graph}
    begun: list[str] = []
    ended: list[str] = []

    async def call(node: str, results: Sequence[Any]) -> str:
        assert set(graph[node]) <= set(ended)
        begun.append(node)
        for _ in range(pauses[node]):
            await asyncio.sleep(0)
        ended.append(node)
        return compute(node, results)

    (sink,) = list_sinks(graph)
    assert asyncio.run(evaluate_graph(graph, sink, call)) == compute_directly(graph, sink)
    assert sorted(begun) == sorted(graph)


@given(graphs())
def test_what_does_not_wait_for_each_other_is_computed_at_the_same_time(graph: Graph) -> None:
    """A node begins as soon as all that it takes is there: with calls that all take one step, at its depth."""
    depth: dict[str, int] = {}

    def find_depth(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((find_depth(other) for other in graph[node]), default=0)
        return depth[node]

    running: set[str] = set()
    most = {"running": 0}

    async def run() -> None:
        gates = {name: asyncio.Event() for name in graph}

        async def call(node: str, _: Sequence[Any]) -> None:
            running.add(node)
            most["running"] = max(most["running"], len(running))
            await gates[node].wait()
            running.remove(node)

        (sink,) = list_sinks(graph)
        work = asyncio.create_task(evaluate_graph(graph, sink, call))
        for level in range(1, max(map(find_depth, graph)) + 1):
            for _ in range(20 * len(graph)):
                await asyncio.sleep(0)
            expected = {name for name in graph if depth[name] == level}
            assert running == expected
            for name in expected:
                gates[name].set()
        await work

    asyncio.run(run())
    assert most["running"] == max(list(depth.values()).count(level) for level in depth.values())


@given(graphs(), st.data())
def test_a_node_that_fails_is_named_and_nothing_runs_on(graph: Graph, data: st.DataObject) -> None:
    bad = data.draw(st.sampled_from(sorted(graph)))
    running: set[str] = set()

    async def call(node: str, _: Sequence[Any]) -> None:
        running.add(node)
        try:
            await asyncio.sleep(0)
            if node == bad:
                raise ValueError("no")
        finally:
            running.remove(node)

    async def run() -> None:
        (sink,) = list_sinks(graph)
        with pytest.raises(NodeError) as caught:
            await evaluate_graph(graph, sink, call)
        assert caught.value.node == bad
        assert isinstance(caught.value.__cause__, ValueError)
        assert running == set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@given(graphs())
def test_a_cancelled_evaluation_cancels_its_calls(graph: Graph) -> None:
    async def run() -> None:
        cancelled: list[str] = []
        begun = asyncio.Event()

        async def call(node: str, _: Sequence[Any]) -> None:
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(node)
                raise

        (sink,) = list_sinks(graph)
        work = asyncio.create_task(evaluate_graph(graph, sink, call))
        await begun.wait()
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert work.cancelled()
        assert sorted(cancelled) == sorted(name for name in graph if not graph[name])

    asyncio.run(run())


@given(graphs(has_one_sink=False))
def test_a_graph_without_circles_has_no_fault(graph: Graph) -> None:
    assert list(find_circles(graph, list(graph))) == []


@given(graphs(has_one_sink=False), st.data())
def test_a_circle_is_always_found_and_shown(graph: Graph, data: st.DataObject) -> None:
    ring = data.draw(st.lists(st.sampled_from(sorted(graph)), min_size=1, unique=True))
    closed = {name: list(others) for name, others in graph.items()}
    for name, other in zip(ring, [*ring[1:], ring[0]], strict=True):
        closed[name].append(other)
    faults = list(find_circles(closed, list(closed)))
    assert faults
    for fault in faults:
        shown = fault.message.removeprefix("goes round in a circle: ").split(" -> ")
        assert shown[0] == shown[-1]
        assert all(other in closed[name] for name, other in pairwise(shown))
        assert fault.path == f"serve.{list(closed).index(shown[0])}.depends"


@given(graphs(), st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["str", "int"])), unique=True))
def test_a_graph_survives_its_way_through_json(graph: Graph, request: list[tuple[str, str]]) -> None:
    made = make_graph(graph, request, working_dir="/w", num_hosts=2)
    assert decode_graph(json.loads(json.dumps(encode_graph(made)))) == made


@given(st.lists(st.tuples(st.sampled_from(["set", "delete"]), st.integers(0, 9)), max_size=60), st.integers(1, 5))
def test_a_board_is_a_dictionary_of_the_newest(acts: list[tuple[str, int]], most: int) -> None:
    board, model = TaskBoard(most), dict[str, int]()
    for number, (act, key) in enumerate(acts):
        name = str(key)
        if act == "set":
            board.set(name, number)
            model.pop(name, None)
            model[name] = number
            while len(model) > most:
                del model[next(iter(model))]
        elif name in model:
            assert board.delete(name) == model.pop(name)
        else:
            with pytest.raises(KeyError):
                board.delete(name)
        assert len(board) == len(model)
    assert {name: board.get(name) for name in model} == model
