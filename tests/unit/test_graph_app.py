"""The interface of a graph of models over a backend that computes here: answers, refusals, callers that leave, keys."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import schemathesis
from graphs import make_graph
from hypothesis import HealthCheck, settings
from pydantic import SecretStr
from starlette.applications import Starlette

from flagscale.serve.graph import board
from flagscale.serve.graph.app import build_app
from flagscale.serve.graph.cluster import BusyError
from flagscale.serve.router.settings import RouterSettings

DIAMOND = {"A": (), "B": ("A",), "C": ("A",), "D": ("B", "C")}


@dataclass
class Here:
    """Computes in this loop: a root gives its fields, others a list of their name and what they were given."""

    missing: list[str] = field(default_factory=list)
    faults: dict[str, Exception] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def call(self, node: str, args: Sequence[Any], fields: Mapping[str, Any]) -> Any:
        self.calls.append(node)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(node)
                raise
        if node in self.faults:
            raise self.faults[node]
        return self.results.get(node, [node, *args] if args else dict(fields))

    def find_missing(self) -> list[str]:
        return self.missing

    def describe(self) -> dict[str, Any]:
        return {"state": "ready", "models": [], "replicas": [], "why": "not shown"}


def make_app(here: Here, request: Sequence[tuple[str, str]] = (("prompt", "str"),), **changes: Any) -> Starlette:
    return build_app(make_graph(DIAMOND, request), RouterSettings(**changes), here)[0]


async def send(app: Starlette, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://graph") as client:
        return await client.request(method, path, **more)


def ask(app: Starlette, body: Any = None, path: str = "/generate", **more: Any) -> httpx.Response:
    sent = {"content": body} if isinstance(body, bytes) else {"json": {"prompt": "hi"} if body is None else body}
    return asyncio.run(send(app, "POST", path, **sent, **more))


def test_the_answer_is_the_result_of_the_last_node_and_each_is_computed_once() -> None:
    here = Here()
    answer = ask(make_app(here))
    root = {"prompt": "hi"}
    assert answer.json() == ["D", ["B", root], ["C", root]]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert sorted(here.calls) == ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({}, 422, "prompt", "`prompt`: is missing; `n`: is missing"),
        ({"prompt": 3, "n": 1}, 422, "prompt", "`prompt`: Input should be a valid string"),
        ({"prompt": "x", "n": "1"}, 422, "n", "`n`: Input should be a valid integer"),
        ({"prompt": "x", "n": True}, 422, "n", "`n`: Input should be a valid integer"),
        ({"prompt": None, "n": 1}, 422, "prompt", "`prompt`: Input should be a valid string"),
        ([1], 400, None, "the body is a JSON list; expected an object"),
        (b"{", 400, None, "the body is not valid JSON"),
        (b"\xff", 400, None, "the body is not valid JSON"),
        (b"[" * 100_000, 400, None, "the body is not valid JSON"),
        (b'{"prompt": "' + b"x" * 2000 + b'"}', 413, None, "the body is larger than 1000 bytes"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_by_field(body: Any, status: int, param: str | None, told: str) -> None:
    here = Here()
    answer = ask(
        make_app(here, [("prompt", "str"), ("n", "int")], max_body_bytes=100_000 if status < 413 else 1000), body
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert told in error["message"]
    assert here.calls == []


def test_fields_of_all_types_pass_and_others_are_passed_over() -> None:
    request = [
        ("json", "str"),
        ("x", "float"),
        ("b", "bool"),
        ("items", "list"),
        ("model_config", "dict"),
        ("n", "int"),
    ]
    body = {"json": "s", "x": 1, "b": False, "items": [1, "a", None], "model_config": {"k": {}}, "n": 2**70}
    app = make_app(Here(results={"D": "done"}), request)
    assert ask(app, {**body, "more": 1}).json() == "done"
    here = Here()
    assert ask(make_app(here, request), body).json()[1][1] == body
    properties = asyncio.run(send(app, "GET", "/openapi.json")).json()["paths"]["/generate"]["post"]["requestBody"]
    assert list(properties["content"]["application/json"]["schema"]["properties"]) == [name for name, _ in request]


def test_a_node_that_fails_is_named_and_its_traceback_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(make_app(Here(faults={"B": ValueError("no such word\n  second line")})))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "node `B` failed: ValueError: no such word"
    assert "Traceback" not in answer.text
    assert "Traceback" in caplog.text


def test_a_node_that_is_busy_and_a_graph_that_is_not_ready_say_to_come_again() -> None:
    busy = ask(make_app(Here(faults={"A": BusyError("9 calls wait already")})))
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert busy.json()["error"]["message"] == "node `A` is busy: 9 calls wait already"
    app = make_app(Here(missing=["B", "C"]))
    assert ask(app).json()["error"]["message"] == "the graph is not ready: no replica of B, C"
    health = asyncio.run(send(app, "GET", "/health"))
    assert (health.status_code, health.json()) == (503, {"status": "no replica of B, C"})
    assert asyncio.run(send(make_app(Here()), "GET", "/health")).status_code == 200


@pytest.mark.parametrize("result", [object(), float, {1: object()}])
def test_a_result_that_is_no_json_is_the_last_nodes_fault(result: Any) -> None:
    answer = ask(make_app(Here(results={"D": result})))
    assert answer.status_code == 500
    assert (
        f"node `D` gave a {type(result).__name__} that cannot be written as JSON" in answer.json()["error"]["message"]
    )


def test_when_the_caller_leaves_the_evaluation_ends() -> None:
    async def run() -> None:
        here = Here(gate=asyncio.Event())
        app, endpoint = build_app(make_graph(DIAMOND), RouterSettings(), here)
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": b'{"prompt": "x"}', "more_body": False}]
        left = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def note(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        work = asyncio.create_task(app(scope, receive, note))
        while not here.calls:
            await asyncio.sleep(0)
        assert endpoint.num_in_flight == 1
        left.set()
        await work
        assert (here.calls, here.cancelled, sent, endpoint.num_in_flight) == (["A"], ["A"], [], 0)

    asyncio.run(run())


def test_statuses_of_tasks_are_kept_within_bounds() -> None:
    app = make_app(Here())

    def act(verb: str, **body: Any) -> tuple[int, Any]:
        answer = ask(app, body, f"/manager/{verb}_task_status")
        return answer.status_code, answer.json()

    kept = {"task_id": "t", "status": {"step": 1}}
    assert act("set", **kept) == (200, kept)
    assert act("get", task_id="t") == (200, kept)
    assert act("set", task_id="t", status=None)[1]["status"] is None
    assert act("delete", task_id="t")[0] == 200
    status, told = act("get", task_id="t")
    assert (status, told["error"]["message"], told["error"]["param"]) == (404, "there is no task `t`", "task_id")
    assert act("delete", task_id="t")[0] == 404
    assert act("set", task_id="t")[1]["error"]["message"] == "`status`: is missing"
    assert act("set", task_id="", status=1)[0] == act("set", task_id="t" * 300, status=1)[0] == 422
    assert act("set", task_id="t", status="x" * board.MOST_BYTES)[0] == 422


def test_all_but_the_health_wants_the_key() -> None:
    app = make_app(Here(), api_keys=(SecretStr("sk-1"),))
    good = {"authorization": "Bearer sk-1"}
    paths = ("/generate", "/manager/get_task_status", "/manager/set_task_status", "/manager/delete_task_status")
    assert {ask(app, path=path).status_code for path in paths} == {401}
    assert {asyncio.run(send(app, "GET", path)).status_code for path in ("/status", "/openapi.json")} == {401}
    assert asyncio.run(send(app, "GET", "/health")).status_code == 200
    assert ask(app, headers={"authorization": "Bearer sk-2"}).status_code == 401
    assert ask(app, headers=good).status_code == 200
    shown = asyncio.run(send(app, "GET", "/status", headers=good)).json()
    assert shown == {"state": "ready", "models": [], "replicas": []}


def test_what_is_no_call_is_answered_in_the_same_shape() -> None:
    app = make_app(Here())
    missing = asyncio.run(send(app, "GET", "/nothing"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_call")
    assert asyncio.run(send(app, "GET", "/generate")).status_code == 405


schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(Here(), [("prompt", "str"), ("n", "int")]))


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_interface_keeps_to_its_description(case: schemathesis.Case) -> None:
    case.call_and_validate()
