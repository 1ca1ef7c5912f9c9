"""The document at /openapi.json: what a graph's request holds, and what may come of it."""

from typing import Any

from flagscale.runner.plan.graph import GraphPlan
from flagscale.serve.graph.body import TaskName, TaskStatus, make_request_model

Tree = dict[str, Any]

ERROR: Tree = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
REFUSALS = {
    "400": "No JSON object",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "422": "A field is missing or of another type",
}
OF_GRAPH = {"500": "A node failed; it is named", "503": "A node has no replica, or too many wait for it"}
OF_TASKS = {"404": "There is no such task"}


def _answer(description: str, schema: Tree) -> Tree:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _call(summary: str, body: Tree, answer: Tree, refusals: dict[str, str], wants_key: bool) -> Tree:
    told = {**refusals, **({"401": "No key, or not a valid one"} if wants_key else {})}
    answers = {"200": answer, **{status: _answer(text, ERROR) for status, text in told.items()}}
    request = {"required": True, "content": {"application/json": {"schema": body}}}
    return {"post": {"summary": summary, "requestBody": request, "responses": answers}}


def _view(summary: str, answers: Tree) -> Tree:
    return {"get": {"summary": summary, "responses": answers}}


def describe_api(graph: GraphPlan, wants_key: bool) -> Tree:
    """OpenAPI 3.1."""
    body = make_request_model(graph.request).model_json_schema(by_alias=True)
    name, status = TaskName.model_json_schema(), TaskStatus.model_json_schema()
    state = _answer("The task", status)
    any_object: Tree = {"type": "object"}
    summary = f"Evaluate {', '.join(node.name for node in graph.nodes)}"
    refused: Tree = {"401": _answer("No key, or not a valid one", ERROR)} if wants_key else {}
    paths: Tree = {
        graph.route: _call(summary, body, _answer("The result", {}), REFUSALS | OF_GRAPH, wants_key),
        "/manager/set_task_status": _call("Note a task's status", status, state, REFUSALS, wants_key),
        "/manager/get_task_status": _call("A task's status", name, state, REFUSALS | OF_TASKS, wants_key),
        "/manager/delete_task_status": _call("Forget a task", name, state, REFUSALS | OF_TASKS, wants_key),
        "/status": _view("Nodes and replicas", {"200": _answer("The state", any_object), **refused}),
        "/openapi.json": _view("This document", {"200": _answer("OpenAPI 3.1", any_object), **refused}),
        "/health": _view(
            "Whether every node has a replica",
            {"200": _answer("Yes", any_object), "503": _answer("No", any_object)},
        ),
    }
    document: Tree = {"openapi": "3.1.0", "info": {"title": "A graph of models", "version": "1"}, "paths": paths}
    if wants_key:
        paths["/health"]["get"]["security"] = []
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"key": []}]
    return document
