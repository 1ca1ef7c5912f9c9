"""A caller's request: read within bounds of time and size, and understood as far as routing needs it.

Only `model`, and what the policy asks for, is looked at; everything else in the body is between caller and engine, so
that an engine's own parameters pass.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import SecretStr
from pydantic_core import from_json

from flagscale.serve.router.answers import Refusal
from flagscale.serve.router.settings import RouterSettings

Receive = Callable[[], Awaitable[dict[str, Any]]]
Scope = dict[str, Any]
Headers = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip
_NOT_PASSED = _HOP_BY_HOP | {b"host", b"content-length", b"content-type", b"accept-encoding", b"expect"}
_NOT_RETURNED = _HOP_BY_HOP | {b"date"}


BYTES_OF_TOKEN = 4
USUAL_OUTPUT = 256
"""tokens that a request which names no limit is taken to be answered with"""


class CallerLeftError(Exception):
    """The caller closed the connection before the request was complete."""


@dataclass(frozen=True, slots=True)
class Size:
    """About how many tokens a request's prompt has, and how many it may be answered with."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Request:
    """A request as it goes to a replica; `target` is path with query, `key` is what the policy hashes."""

    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    model: str
    key: str | None

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The body, read once more: most requests never need it."""
        return parse_body(self.body)

    @cached_property
    def size(self) -> Size:
        """Without a tokenizer: four bytes of text are a token, a token id is one."""
        source = next((self.tree[name] for name in ("messages", "prompt", "input") if self.tree.get(name)), None)
        limits = (self.tree.get(name) for name in ("max_completion_tokens", "max_tokens"))
        given = next((limit for limit in limits if isinstance(limit, int) and limit > 0), USUAL_OUTPUT)
        return Size(_count_tokens(source), given)


async def read_request(scope: Scope, receive: Receive, settings: RouterSettings) -> Request:
    """Raises Refusal for what cannot be passed on, CallerLeftError when there is nobody to answer."""
    headers: Headers = scope["headers"]
    body = await read_body(headers, receive, settings)
    tree = parse_body(body)
    model = tree.get("model")
    if not isinstance(model, str) or not model:
        found = "is missing" if model is None else f"is {str(model)[:100]!r}"
        raise Refusal(400, f"`model` {found}; expected the name of a model, see /v1/models", "invalid_model", "model")
    query = scope["query_string"].decode("latin-1")
    return Request(
        target=scope["path"] + (f"?{query}" if query else ""),
        headers=_passed_headers(headers, bool(settings.api_keys)),
        body=body,
        model=model,
        key=routing_key(tree, headers, settings),
    )


async def read_body(headers: Headers, receive: Receive, settings: RouterSettings) -> bytes:
    """Raises Refusal where it is too large or too slow, CallerLeftError when there is nobody to answer."""
    limit = settings.max_body_bytes
    # A connection whose request was not read to its end is of no more use: what follows is no request.
    close = {"Connection": "close"}
    too_large = Refusal(413, f"the body is larger than {limit} bytes", "request_too_large", headers=close)
    declared = find_header(headers, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerLeftError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        told = f"the body did not come within {settings.body_timeout_s:g} s"
        raise Refusal(408, told, "request_timeout", headers=close) from None
    return b"".join(parts)


def parse_body(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises Refusal."""
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(tree, dict):
        raise Refusal(400, f"the body is a JSON {type(tree).__name__}; expected an object", "invalid_json")
    return tree


def routing_key(tree: dict[str, Any], headers: Headers, settings: RouterSettings) -> str | None:
    """What requests that should meet the same replica have in common; None where the policy asks for nothing, or the
    request has nothing of the kind."""
    if settings.policy == "session":
        header = find_header(headers, settings.session_header.lower().encode())
        user = tree.get("user")
        return header.decode("latin-1") if header else (user if isinstance(user, str) and user else None)
    if settings.policy == "prefix_aware":
        return _prompt_beginning(tree, settings.prefix_chars) or None
    return None


def _prompt_beginning(tree: dict[str, Any], num_chars: int) -> str:
    source = next((tree[name] for name in ("messages", "prompt", "input") if tree.get(name)), None)
    pieces: list[str] = []
    length = 0
    for text in _texts(source):
        pieces.append(text[: num_chars - length])
        length += len(pieces[-1])
        if length >= num_chars:
            break
    return "\n".join(pieces)


def _count_tokens(value: object) -> int:
    match value:
        case str():
            return len(value.encode("utf-8", "replace")) // BYTES_OF_TOKEN + 1
        case int():
            return 1
        case list():
            return sum(map(_count_tokens, value))
        case dict():
            return sum(_count_tokens(value.get(name)) for name in ("role", "content", "text"))
    return 0


def _texts(value: object) -> Iterator[str]:
    """All text in a prompt or a list of messages, in order; token ids as their digits."""
    match value:
        case str():
            yield value
        case int():
            yield str(value)
        case list():
            for item in value:
                yield from _texts(item)
        case dict():
            for name in ("role", "content", "text"):
                yield from _texts(value.get(name))


def find_header(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


def check_key(headers: Headers, api_keys: Sequence[SecretStr]) -> None:
    """Raises Refusal unless a caller's key is one of `api_keys`. All are compared, each in constant time."""
    if not api_keys:
        return
    scheme, _, given = (find_header(headers, b"authorization") or b"").partition(b" ")
    fits = [hmac.compare_digest(given.strip(), key.get_secret_value().encode()) for key in api_keys]
    if scheme.lower() != b"bearer" or not any(fits):
        raise Refusal(
            401,
            "this service wants a key: `Authorization: Bearer <key>`" if not given else "the key is not a valid one",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _passed_headers(headers: Headers, is_key_ours: bool) -> tuple[tuple[str, str], ...]:
    """What a replica gets: no compression, so that events can be seen, and no key that was meant for the router."""
    dropped = _NOT_PASSED | _named_by_connection(headers) | ({b"authorization"} if is_key_ours else set())
    passed = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name not in dropped]
    return (*passed, ("content-type", "application/json"), ("accept-encoding", "identity"))


def returned_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What a caller gets of a replica's headers; names in lower case."""
    return [(name.lower(), value) for name, value in headers if name.lower() not in _NOT_RETURNED]


def _named_by_connection(headers: Headers) -> set[bytes]:
    """Headers that the caller declared to be for this connection only."""
    values = b",".join(value for name, value in headers if name == b"connection")
    return {name.strip().lower() for name in values.split(b",")}
