"""Is this server ready? Only an answer says so: one token of a real completion, with the key that requests will use.

A port that accepts and a `/health` that says 200 are true long before a model is loaded, and stay true when the engine
behind them is dead or wants another key.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp
from pydantic import SecretStr

_BODIES: tuple[tuple[str, dict[str, object]], ...] = (
    ("/v1/completions", {"prompt": "1", "max_tokens": 1, "temperature": 0}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1, "temperature": 0}),
    ("/v1/embeddings", {"input": "1"}),
)
"""what is asked, in turn, until the model answers one: an embedding model has no completions"""

LONGER_PROMPT = "1 2 3 4"
"""for engines that look their caches up by whole prompts, of which vLLM's ExampleConnector bears none of one token"""
_OTHER_KIND = (400, 404, 405, 422, 501)
_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether a server answered for a model, after how many seconds, and if not, why.

    is_reached: there was a connection
    """

    is_ok: bool
    seconds: float
    reason: str = ""
    has_timed_out: bool = False
    is_reached: bool = True


async def probe_completion(
    url: str,
    model: str,
    api_key: SecretStr | None = None,
    timeout_s: float = 30,
    connect_timeout_s: float = 5,
    extra: Mapping[str, object] | None = None,
) -> ProbeResult:
    """Ask the server at `url` (its root, without `/v1`) for one token of `model`. Never raises for what a server does.

    extra: further fields of the request
    """
    fields = {"model": model, **(extra or {})}
    return await _probe(lambda session: _ask(session, url.rstrip("/"), fields), api_key, timeout_s, connect_timeout_s)


async def probe_alive(
    url: str, model: str, api_key: SecretStr | None = None, timeout_s: float = 30, connect_timeout_s: float = 5
) -> ProbeResult:
    """As `probe_completion`, of a server that can answer nothing without a partner: whether its engine lives, and
    whether it has the model and takes the key. vLLM's `/health` is 503 once its engine is dead."""
    root = url.rstrip("/")
    return await _probe(lambda session: _look(session, root, model), api_key, timeout_s, connect_timeout_s)


async def _probe(
    ask: Callable[[aiohttp.ClientSession], Awaitable[str]],
    api_key: SecretStr | None,
    timeout_s: float,
    connect_timeout_s: float,
) -> ProbeResult:
    """It makes a connection of its own, so that one that was open before proves nothing."""
    started = time.monotonic()
    headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
    reason, has_timed_out, is_reached = "", False, True
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            reason = await ask(session)
    except aiohttp.ConnectionTimeoutError:
        reason, is_reached = f"no connection within {connect_timeout_s:g} s", False
    except TimeoutError:
        reason, has_timed_out = f"no token within {timeout_s:g} s", True
    except (aiohttp.ClientError, OSError, ValueError) as error:
        reason, is_reached = describe(error), not isinstance(error, aiohttp.ClientConnectorError)
    return ProbeResult(not reason, time.monotonic() - started, reason, has_timed_out, is_reached)


async def _ask(session: aiohttp.ClientSession, url: str, fields: Mapping[str, object]) -> str:
    """Empty if the model answered, else the first refusal: later ones only say that it is no model of that kind."""
    refusal = ""
    for path, body in _BODIES:
        async with session.post(url + path, json={**body, **fields}, allow_redirects=False) as answer:
            text = (await answer.content.read(64 * 1024)).decode("utf-8", "replace")
            if answer.status == 200:
                return ""
            refusal = refusal or f"{answer.status} of {path}: {' '.join(text.split())[:_REASON_CHARS]}"
            if answer.status not in _OTHER_KIND:
                return refusal
    return refusal


async def _look(session: aiohttp.ClientSession, url: str, model: str) -> str:
    for path in ("/v1/models", "/health"):
        async with session.get(url + path, allow_redirects=False) as answer:
            data = await answer.content.read(1024 * 1024)
            if answer.status != 200:
                text = data[:_REASON_CHARS].decode("utf-8", "replace")
                return f"{answer.status} of {path}: {' '.join(text.split())}"
            if path == "/v1/models" and model not in (names := _names_of(data)):
                return f"404 of {path}: it has {', '.join(names) or 'no model'}, not `{model}`"
    return ""


def _names_of(data: bytes) -> list[str]:
    tree = json.loads(data)
    rows = tree.get("data", []) if isinstance(tree, dict) else []
    return [str(row.get("id")) for row in rows if isinstance(row, dict)]


def describe(error: BaseException) -> str:
    """What happened to a connection, in a few words without addresses: the reader knows which replica is meant."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "its host name is unknown"
        case aiohttp.ServerDisconnectedError() | ConnectionResetError():
            return "it closed the connection"
        case aiohttp.ClientPayloadError():
            return "it broke off in the middle of an answer"
        case aiohttp.ServerTimeoutError() | asyncio.TimeoutError():
            return "no connection in time"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number).lower()
        case _:
            return f"{type(error).__name__}: {error}"
