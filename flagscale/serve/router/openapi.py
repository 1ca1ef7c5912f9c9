"""The router's API in OpenAPI's words: what it itself promises about requests and answers.

What an engine does with a request's other fields is the engine's to describe, so they are allowed and not listed.
"""

from typing import Any, get_args

from flagscale.serve.router.settings import Handover, Role

PASSED_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
"""what goes to a replica"""

_Tree = dict[str, Any]

_NUMBER, _TEXT, _BOOL = {"type": "number"}, {"type": "string"}, {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}


def _object(required: dict[str, _Tree], **more: Any) -> _Tree:
    return {"type": "object", "properties": required, "required": list(required), **more}


def _array(items: _Tree) -> _Tree:
    return {"type": "array", "items": items}


def _nullable(kind: str) -> _Tree:
    return {"type": [kind, "null"]}


_SCHEMAS: dict[str, _Tree] = {
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _nullable("string"), "code": _nullable("string")})}
    ),
    "Passed": _object(
        {"model": {"type": "string", "minLength": 1, "description": "which model; see /v1/models"}},
        additionalProperties=True,
    ),
    "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT}),
    "Health": _object({"status": _TEXT, "ready": _COUNT, "replicas": _COUNT}),
    "Status": _object(
        {
            "uptime_s": _NUMBER,
            "policy": _TEXT,
            "pair_policy": _TEXT,
            "sample_every_s": _NUMBER,
            "held": {"type": "object", "additionalProperties": _COUNT},
            "replicas": _array({"$ref": "#/components/schemas/Replica"}),
        }
    ),
    "Replica": _object(
        {
            **dict.fromkeys(("id", "url", "model", "version", "reason", "kv_address"), _TEXT),
            "role": {"enum": list(get_args(Role))},
            "is_registered": _BOOL,
            "weight": _NUMBER,
            "phase": {"enum": ["starting", "ready", "failing", "draining"]},
            "breaker": {"enum": ["closed", "open", "half_open"]},
            **dict.fromkeys(("in_flight", "requests", "failures"), _COUNT),
            "first_byte_s": _nullable("number"),
            "history": _array(
                _object(
                    {"is_ready": _BOOL, "in_flight": _COUNT, "requests": _COUNT, "first_byte_s": _nullable("number")}
                )
            ),
        }
    ),
}


def _answer(description: str, schema: _Tree | None = None, media_type: str = "application/json") -> _Tree:
    return {"description": description, "content": {media_type: {"schema": schema or {}}}}


def _ref(name: str) -> _Tree:
    return {"$ref": f"#/components/schemas/{name}"}


def _error(description: str) -> _Tree:
    return _answer(description, _ref("Error"))


def _get(summary: str, answers: _Tree, is_open: bool = False) -> _Tree:
    refused: _Tree = {} if is_open else {"401": _error("No key, or not a valid one")}
    return {"get": {"summary": summary, "responses": {**answers, **refused}, **({"security": []} if is_open else {})}}


def _passed(path: str) -> _Tree:
    whole_or_stream = {
        "description": "A replica's answer as it came, whole or as a stream of events",
        "content": {"application/json": {"schema": {}}, "text/event-stream": {"schema": _TEXT}},
    }
    answers = {
        "200": whole_or_stream,
        "400": _error("No JSON object, or no model"),
        "401": _error("No key, or not a valid one"),
        "404": _error("No replica has this model"),
        "408": _error("The body did not come in time"),
        "413": _error("The body is too large"),
        "502": _error("No replica could answer"),
        "503": _error("No replica is ready; come again after Retry-After seconds"),
        "504": _error("No first byte in time"),
        "default": {"description": "A replica's refusal as it came"},
    }
    body = {"required": True, "content": {"application/json": {"schema": _ref("Passed")}}}
    return {"post": {"summary": f"OpenAI's {path}", "requestBody": body, "responses": answers}}


_HALVES: tuple[tuple[tuple[Role, ...], tuple[Handover | None, ...], bool], ...] = (
    (("whole",), (None,), False),
    (("prefill", "decode"), ("nixl", "store"), False),
    (("decode",), ("bootstrap",), False),
    (("prefill",), ("bootstrap",), True),
    (("prefill", "decode"), ("p2p",), True),
)
"""which words of a replica go together: roles, ways of handing over, whether its caches must have an address"""


def _replica(roles: tuple[Role, ...], handovers: tuple[Handover | None, ...], needs_address: bool) -> _Tree:
    fields = {
        "url": {"type": "string", "pattern": r"^https?://[A-Za-z0-9][A-Za-z0-9.-]{0,60}(:[0-9]{1,5})?$"},
        "model": {"type": "string", "minLength": 1},
        "role": {"enum": list(roles)},
        "handover": {"enum": list(handovers)},
        "kv_address": {"type": "string", "pattern": f"^([A-Za-z0-9.-]+:[0-9]{{1,5}}){'?' * (not needs_address)}$"},
        **{name: _nullable("string") for name in ("api_key", "version")},
        "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 1_000_000},
    }
    needed = ["url", "model"] + ["role", "handover"] * (handovers != (None,)) + ["kv_address"] * needs_address
    return {"type": "object", "properties": fields, "required": needed, "additionalProperties": False}


def _registration() -> _Tree:
    """Replicas from outside. Their callers show a token of their own, which nobody else's key is."""
    body = {"oneOf": [_replica(*half) for half in _HALVES]}
    refusals = {"401": _error("No token, or not the right one"), "403": _error("This router takes no replicas")}
    named = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[\\w.-]{1,100}$"}}
    put = {
        "summary": "Add a replica; to repeat it changes nothing",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": _answer("It is there already", _object({"id": _TEXT, "version": _TEXT})),
            "201": _answer("It is probed from now on", _object({"id": _TEXT, "version": _TEXT})),
            "400": _error("It cannot be right"),
            "408": _error("The body did not come in time"),
            "409": _error("The id is another's, or its role does not go with the model's other replicas"),
            "413": _error("The body is too large"),
            **refusals,
        },
    }
    delete = {
        "summary": "Let its requests finish, then forget it",
        "responses": {
            "200": _answer("It is gone; how many requests had to be cut", _object({"id": _TEXT, "cut": _COUNT})),
            "404": _error("There is none"),
            "409": _error("It was not registered, so it is not removed here"),
            **refusals,
        },
    }
    security: list[_Tree] = [{"admin": []}]
    return {"put": {**put, "security": security}, "delete": {**delete, "security": security}, "parameters": [named]}


def describe_api(wants_key: bool) -> _Tree:
    """The document at /openapi.json."""
    models = _object({"object": {"const": "list"}, "data": _array(_ref("Model"))})
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    no_model = {"200": _answer("The model", _ref("Model")), "404": _error("No replica has this model")}
    paths: _Tree = {path: _passed(path) for path in PASSED_PATHS}
    paths |= {
        "/v1/models": _get("Every model that has a replica", {"200": _answer("All models", models)}),
        "/v1/models/{model}": {**_get("One model", no_model), "parameters": [name]},
        "/status": _get("Replicas, load and latency", {"200": _answer("The state", _ref("Status"))}),
        "/metrics": _get("For Prometheus", {"200": _answer("All series", _TEXT, "text/plain")}),
        "/openapi.json": _get("This document", {"200": _answer("OpenAPI 3.1", {"type": "object"})}),
        "/": _get("The status page", {"200": _answer("A page", _TEXT, "text/html")}, is_open=True),
        "/health": _get(
            "Whether any replica is ready",
            {"200": _answer("Yes", _ref("Health")), "503": _answer("No", _ref("Health"))},
            is_open=True,
        ),
    }
    paths["/replicas/{id}"] = _registration()
    components: _Tree = {"schemas": _SCHEMAS, "securitySchemes": {"admin": {"type": "http", "scheme": "bearer"}}}
    document: _Tree = {"openapi": "3.1.0", "info": {"title": "FlagScale router", "version": "1"}, "paths": paths}
    if wants_key:
        components["securitySchemes"]["key"] = {"type": "http", "scheme": "bearer"}
        document["security"] = [{"key": []}]
    return {**document, "components": components}
