"""What is read of a request, what goes on to a replica, and what is refused."""

import asyncio
import json
from typing import Any

import pytest
from pydantic import SecretStr

from flagscale.serve.router.answers import Refusal
from flagscale.serve.router.forward import split_events
from flagscale.serve.router.metrics import read_usage
from flagscale.serve.router.request import (
    CallerLeftError,
    check_key,
    parse_body,
    read_request,
    returned_headers,
    routing_key,
)
from flagscale.serve.router.settings import RouterSettings


def scope(*headers: tuple[bytes, bytes], query: bytes = b"") -> dict[str, Any]:
    return {"path": "/v1/completions", "query_string": query, "headers": list(headers)}


async def read(given: dict[str, Any], *messages: dict[str, Any], **settings: Any) -> Any:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return await read_request(given, receive, RouterSettings.model_validate(settings))


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_a_body_in_pieces_is_passed_whole() -> None:
    request = asyncio.run(read(scope(query=b"a=b%20c"), body(b'{"model":', True), body(b' "m"}')))
    assert (request.body, request.model, request.target) == (b'{"model": "m"}', "m", "/v1/completions?a=b%20c")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"a": "\\ud800"}x',
        b"[" * 100_000,
        b"{'a':1}",
    ],
)
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(Refusal, match="the body is") as caught:
        parse_body(data)
    assert caught.value.status == 400
    assert json.loads(caught.value.body())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("model", "told"), [("{}", "is missing"), ('{"model": 3}', "'3'"), ('{"model": ""}', "is ''")])
def test_a_request_names_its_model(model: str, told: str) -> None:
    with pytest.raises(Refusal, match=told) as caught:
        asyncio.run(read(scope(), body(model.encode())))
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_a_declared_length_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(Refusal) as caught:
        asyncio.run(read(scope((b"content-length", b"101")), max_body_bytes=100))
    assert caught.value.status == 413
    assert caught.value.headers["Connection"] == "close"


def test_a_body_beyond_the_limit_is_refused_as_it_comes() -> None:
    with pytest.raises(Refusal) as caught:
        asyncio.run(read(scope(), body(b"x" * 60, True), body(b"x" * 60, True), max_body_bytes=100))
    assert caught.value.status == 413


def test_a_body_that_does_not_come() -> None:
    with pytest.raises(Refusal) as caught:
        asyncio.run(read(scope(), body(b"{", True), body_timeout_s=0.01))
    assert caught.value.status == 408


def test_a_caller_who_leaves() -> None:
    with pytest.raises(CallerLeftError):
        asyncio.run(read(scope(), body(b"{", True), {"type": "http.disconnect"}))


def test_which_headers_go_on() -> None:
    given = scope(
        (b"host", b"router"), (b"authorization", b"Bearer k"), (b"connection", b"keep-alive, X-Hop"), (b"x-hop", b"1"),
        (b"accept-encoding", b"gzip"), (b"x-request-id", b"7"), (b"content-type", b"text/plain"), (b"te", b"trailers"),
    )  # fmt: skip
    own = [("x-request-id", "7"), ("content-type", "application/json"), ("accept-encoding", "identity")]
    assert list(asyncio.run(read(given, body(b'{"model": "m"}'))).headers) == [("authorization", "Bearer k"), *own]
    assert list(asyncio.run(read(given, body(b'{"model": "m"}'), api_keys=["k"])).headers) == own


def test_which_headers_come_back() -> None:
    given = [(b"Content-Type", b"a"), (b"Transfer-Encoding", b"chunked"), (b"Date", b"x"), (b"X-A", b"B")]
    assert returned_headers(given) == [(b"content-type", b"a"), (b"x-a", b"B")]


def test_keys() -> None:
    keys = (SecretStr("eins"), SecretStr("zwei-ä"))
    for header in (b"Bearer eins", b"bearer eins ", "Bearer zwei-ä".encode()):
        check_key([(b"authorization", header)], keys)
    check_key([], ())
    for headers in (
        [],
        [(b"authorization", b"Bearer two")],
        [(b"authorization", b"Basic eins")],
        [(b"authorization", b"")],
    ):
        with pytest.raises(Refusal) as caught:
            check_key(headers, keys)
        assert caught.value.status == 401
        assert "eins" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"prompt": "abcdefghijkl"}, "abcdefgh"),
        ({"prompt": ["ab", "cdefghijk"]}, "ab\ncdefgh"),
        ({"prompt": [1, 23, 4567890]}, "1\n23\n45678"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}, "user\nhell"),
        ({"input": "x"}, "x"),
        ({"prompt": ""}, None),
        ({"prompt": {"a": 1}}, None),
        ({}, None),
    ],
)
def test_the_beginning_of_a_prompt(tree: dict[str, Any], key: str | None) -> None:
    assert routing_key(tree, [], RouterSettings(policy="prefix_aware", prefix_chars=8)) == key


def test_sessions() -> None:
    by_session = RouterSettings(policy="session", session_header="X-Who")
    assert routing_key({"user": "u"}, [(b"x-who", b"h")], by_session) == "h"
    assert routing_key({"user": "u"}, [], by_session) == "u"
    assert routing_key({"user": 3}, [], by_session) is None
    assert routing_key({"user": "u", "prompt": "p"}, [], RouterSettings()) is None


def test_an_absurdly_long_event_goes_on_in_parts() -> None:
    data = b"data: " + b"x" * 2_000_000
    assert split_events(data) == (data, b"")
    assert split_events(b"data: 1\n\ndata: 2") == (b"data: 1\n\n", b"data: 2")


def test_usage_is_read_and_a_quotation_of_it_is_not() -> None:
    quoted = json.dumps({"text": '"usage": {"prompt_tokens": 9}'}).encode()
    assert list(read_usage(quoted + b'"usage": {"prompt_tokens": 3, "completion_tokens":4}')) == [
        ("prompt", 3),
        ("completion", 4),
    ]
    assert list(read_usage(b'{"usage":null}')) == []
    assert list(read_usage(b"")) == []


def test_errors_have_the_shape_that_clients_read() -> None:
    refusal = Refusal(503, "no", "overloaded", headers={"Retry-After": "5"})
    assert json.loads(refusal.body()) == {
        "error": {"message": "no", "type": "server_error", "param": None, "code": "overloaded"}
    }
    assert refusal.event() == b"data: " + refusal.body() + b"\n\n"
