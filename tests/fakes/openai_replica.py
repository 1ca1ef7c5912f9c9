"""An engine server for tests and benchmarks: it answers OpenAI's API with counted words, at an engine's pace, and fails
on demand.

In a test it is an object on the test's own loop, whose state can be looked at:

    async with FakeReplica("tiny") as fake:
        fake.faults.append(Fault("cut", after=3))       # the next request loses its connection after three pieces
        ...
        assert fake.num_cancelled == 1

As a process it is a server to measure against:

    python tests/fakes/openai_replica.py --port 8001 --model tiny --tokens-per-s 30

Its words are `w0 w1 w2 ..`, as many as `max_tokens` says, so every answer can be checked to the last byte. A fault hits
requests in the order in which they come, `times` of them; probes are hit too unless `spares_probes`.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from aiohttp import web

if __package__:
    from fakes.kv_exchange import KvExchange, ProtocolError
else:  # run as a program, or beside one
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from kv_exchange import KvExchange, ProtocolError

Kind = Literal["status", "disconnect", "hang", "cut", "stall", "half_event"]
"""
status      answer with `status` and an error of OpenAI's shape
disconnect  close the connection before any byte
hang        send nothing, for ever
cut         close the connection after `after` pieces
stall       send nothing more after `after` pieces
half_event  as `cut`, in the middle of a piece
"""

_PROMPTS = ("1", "1 2 3 4")
_PROBE = [{"role": "user", "content": "1"}]
DEFAULT_TOKENS = 8
_BREAKS = ("disconnect", "cut", "half_event")


@dataclass(slots=True)
class Fault:
    """What goes wrong, for the next `times` requests."""

    kind: Kind
    times: int = 1
    after: int = 2
    status: int = 500
    spares_probes: bool = True


@dataclass(slots=True, eq=False)
class FakeReplica:
    """One server for one model on a free port of loopback; `url` is known once it has started."""

    model: str = "tiny"
    api_key: str | None = None
    name: str = "fake"
    first_token_s: float = 0.0
    token_s: float = 0.0
    port: int = 0
    host: str = "127.0.0.1"
    faults: list[Fault] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """bodies of all requests but probes, with the path under `_path`"""
    headers: list[dict[str, str]] = field(default_factory=list)
    """their headers, names in lower case"""
    num_probes: int = 0
    num_in_flight: int = 0
    num_cancelled: int = 0
    """requests whose caller left before the end"""
    pad_chars: int = 0
    """how much longer than its word each piece of a stream is"""
    refused_paths: tuple[str, ...] = ()
    """what the model cannot do"""
    keeps_requests: bool = True
    kv: KvExchange | None = None
    """its part in a pair"""
    violations: list[str] = field(default_factory=list)
    """requests that a real half of a pair would have died of"""
    is_healthy: bool = True
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after a `stop` on the same port again."""
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        if self.kv is not None:
            await self.kv.start()
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
            app.router.add_post(path, self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As if it were killed: connections are lost, the port refuses."""
        if self._runner is not None:
            for connection in tuple(self._runner.server.connections if self._runner.server else ()):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None
            if self.kv is not None:
                await self.kv.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _health(self, _: web.Request) -> web.Response:
        self.num_probes += 1
        return web.Response(status=200 if self.is_healthy else 503)

    async def _models(self, asked: web.Request) -> web.Response:
        if self.api_key and asked.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "wrong key")
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _answer(self, asked: web.Request) -> web.StreamResponse:
        body = await asked.json()
        if self.api_key and asked.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "wrong key")
        if asked.path in self.refused_paths:
            return _error(400, f"{self.model} does not do that")
        if body.get("model") != self.model:
            return _error(404, f"no model {body.get('model')}")
        is_probe = body.get("max_tokens") == 1 and (body.get("prompt") in _PROMPTS or body.get("messages") == _PROBE)
        self.num_probes += is_probe
        if not is_probe and self.keeps_requests:
            self.requests.append({**body, "_path": asked.path_qs})
            self.headers.append({name.lower(): value for name, value in asked.headers.items()})
        fault = self._next_fault(is_probe)
        self.num_in_flight += 1
        try:
            if fault and (early := await _fail_early(asked, fault)):
                return early
            await asyncio.sleep(self.first_token_s)
            try:
                more = await self.kv.begin(asked.headers, body) if self.kv is not None else {}
            except ProtocolError as error:
                self.violations.append(str(error))
                return _error(500, str(error))
            if body.get("stream"):
                return await self._stream(asked, body, fault)
            return await self._whole(asked, body, fault, more)
        except (asyncio.CancelledError, ConnectionError):
            self.num_cancelled += not (fault and fault.kind in _BREAKS)
            raise
        finally:
            self.num_in_flight -= 1

    def _next_fault(self, is_probe: bool) -> Fault | None:
        fault = next((it for it in self.faults if not (is_probe and it.spares_probes)), None)
        if fault is not None:
            fault.times -= 1
            if not fault.times:
                self.faults.remove(fault)
        return fault

    async def _whole(
        self, asked: web.Request, body: dict[str, Any], fault: Fault | None, more: dict[str, Any]
    ) -> web.StreamResponse:
        if asked.path == "/v1/embeddings":
            answer: dict[str, Any] = {"object": "list", "data": [{"index": 0, "embedding": [0.0, 1.0]}]}
        else:
            text = " ".join(words_of(body))
            await asyncio.sleep(self.token_s * num_tokens(body))
            answer = self._shape(asked, {"text": text, "message": {"role": "assistant", "content": text}})
        answer |= {"usage": _usage(body), **more}
        data = json.dumps(answer).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
        await response.prepare(asked)
        if fault is not None:
            await response.write(data[: len(data) // 2])
            await _break(asked, fault)
        await response.write_eof(data)
        return response

    async def _stream(self, asked: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(asked)
        async for number, event in self._events(asked, body):
            if fault and number == fault.after:
                if fault.kind == "half_event":
                    await response.write(event[: len(event) // 2])
                    await asyncio.sleep(0.05)
                await _break(asked, fault)
            await response.write(event)
        await response.write_eof()
        return response

    async def _events(self, asked: web.Request, body: dict[str, Any]) -> AsyncIterator[tuple[int, bytes]]:
        number = 0
        for number, word in enumerate(words_of(body)):
            if number:
                await asyncio.sleep(self.token_s)
            text = word + " " * (1 + self.pad_chars)
            yield number, encode_event(self._shape(asked, {"text": text, "delta": {"content": text}}))
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            yield number + 1, encode_event({**self._shape(asked, None), "usage": _usage(body)})
        yield number + 2, b"data: [DONE]\n\n"

    def _shape(self, asked: web.Request, choice: dict[str, Any] | None) -> dict[str, Any]:
        is_chat = asked.path == "/v1/chat/completions"
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        return {"id": "fake-1", "object": kind, "created": 1, "model": self.model, "choices": choices}


def num_tokens(body: dict[str, Any]) -> int:
    given = body.get("max_tokens", DEFAULT_TOKENS)
    return given if isinstance(given, int) and 0 < given <= 100_000 else DEFAULT_TOKENS


def words_of(body: dict[str, Any]) -> Iterator[str]:
    return (f"w{number}" for number in range(num_tokens(body)))


def encode_event(tree: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(tree).encode() + b"\n\n"


def _usage(body: dict[str, Any]) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": num_tokens(body), "total_tokens": 5 + num_tokens(body)}


def _error(status: int, message: str) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": "fake", "param": None, "code": None}}, status=status
    )


async def _fail_early(asked: web.Request, fault: Fault) -> web.Response | None:
    match fault.kind:
        case "status":
            return _error(fault.status, "a fault on demand")
        case "disconnect":
            await _break(asked, fault)
        case "hang":
            await asyncio.sleep(3600)
    return None


async def _break(asked: web.Request, fault: Fault) -> NoReturn:
    """Lose the connection, unless the fault is silence; either way the server ends this handler then."""
    if fault.kind != "stall" and asked.transport is not None:
        asked.transport.abort()
    while True:
        await asyncio.sleep(3600)


async def serve_until_ended(fake: FakeReplica) -> None:
    """Print the address, serve until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with fake:
        print(fake.url, flush=True)
        await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: a free one, which is printed")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--api-key")
    parser.add_argument("--first-token-s", type=float, default=0.0, help="how long the first token takes")
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help="pace of a stream; 0: as fast as it can")
    args = parser.parse_args()
    token_s = 1 / args.tokens_per_s if args.tokens_per_s else 0.0
    fake = FakeReplica(
        args.model,
        args.api_key,
        first_token_s=args.first_token_s,
        token_s=token_s,
        port=args.port,
        keeps_requests=False,
    )
    asyncio.run(serve_until_ended(fake))


if __name__ == "__main__":
    main()
