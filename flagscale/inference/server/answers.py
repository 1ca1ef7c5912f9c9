"""Runs the prompts of one request and writes the answer, whole or as a stream of events."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from flagscale.inference.engine import Delta
from flagscale.inference.server.asking import Prompt
from flagscale.inference.server.bodies import SamplingBody
from flagscale.inference.server.faults import RequestError, error_body, error_of
from flagscale.inference.server.pieces import Piece, PieceReader
from flagscale.inference.server.service import ServedModel, Service
from flagscale.inference.server.shapes import Shape
from flagscale.inference.server.streams import EventStream, Merged, stay_with
from flagscale.inference.server.token_text import TokenTable

DONE = "data: [DONE]\n\n"
FAILURES = {
    "error": RequestError("the model's output is not a number", status=500),
    "abort": RequestError("the request was aborted: the server is ending", status=503),
}


@dataclass(slots=True)
class Answer:
    """One request on its way to its answer."""

    service: Service
    request: Request
    body: SamplingBody
    prompts: Sequence[Prompt]
    shape: Shape
    reader: PieceReader
    wants_logprobs: bool
    model: ServedModel
    id: str = ""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.id = f"{self.shape.prefix}-{secrets.token_hex(12)}"

    async def respond(self) -> Response:
        """
        Raises:
            RequestError: the engine could not answer.
            ClientDisconnect: nobody is left to answer.
        """
        running, adapter = self.service.running, self.model.adapter_name
        merged = Merged([running.generate(prompt.tokens, prompt.params, adapter=adapter) for prompt in self.prompts])
        deltas = merged.read()
        try:
            if not self.body.stream:
                return JSONResponse(await stay_with(self.request, self._collect(deltas)))
            # The first delta decides on the status: what the engine refuses is no stream.
            first = await stay_with(self.request, anext(deltas))
        except BaseException:
            merged.close()
            raise
        return EventStream(self._events(first, deltas), merged.close, {})

    def _read(self, number: int, delta: Delta) -> Piece:
        if delta.finish_reason in FAILURES:
            raise FAILURES[delta.finish_reason]
        if not self.reader.num_output_tokens:
            self._observe("first_token_s")
        return self.reader.read(number, delta)

    def _observe(self, name: str) -> None:
        histogram = getattr(self.service.meter, name)
        histogram.labels(self.request.url.path).observe(time.monotonic() - self.started)

    async def _collect(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> dict[str, Any]:
        count = sum(prompt.params.n for prompt in self.prompts)
        choices = [Piece(index) for index in range(count)]
        async with aclosing(deltas):
            async for number, delta in deltas:
                piece = self._read(number, delta)
                choices[piece.index].add(piece)
        self._observe("duration_s")
        written = [self.shape.write_whole(choice, self.wants_logprobs) for choice in choices]
        return {**self._head(self.shape.whole_object), "choices": written, "usage": self._usage()}

    async def _events(
        self, first: tuple[int, Delta], deltas: AsyncGenerator[tuple[int, Delta], None]
    ) -> AsyncGenerator[str, None]:
        try:
            count = sum(prompt.params.n for prompt in self.prompts)
            if self.shape.opening is not None:
                for index in range(count):
                    yield self._event([self.shape.opening(index)])
            if event := self._chunk(*first):
                yield event
            async with aclosing(deltas):
                async for number, delta in deltas:
                    if event := self._chunk(number, delta):
                        yield event
            self._observe("duration_s")
            if self._includes_usage:
                yield self._event([], self._usage())
        except Exception as error:  # the status is out: the stream itself has to tell
            found = error_of(error)
            yield _data(error_body(found.status, found.message, found.param, found.code))
        yield DONE

    def _chunk(self, number: int, delta: Delta) -> str | None:
        piece = self._read(number, delta)
        if not piece.says_something and not piece.token_ids:
            return None
        return self._event([self.shape.write_chunk(piece, self.wants_logprobs)])

    @property
    def _includes_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        event = {**self._head(self.shape.chunk_object), "choices": choices}
        if self._includes_usage:
            event["usage"] = usage
        return _data(event)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model.name,
            "system_fingerprint": self.reader.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        reader = self.reader
        return {
            "prompt_tokens": reader.num_prompt_tokens,
            "completion_tokens": reader.num_output_tokens,
            "total_tokens": reader.num_prompt_tokens + reader.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": reader.num_cached_tokens},
        }


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def make_reader(table: TokenTable, prompts: Sequence[Prompt], body: SamplingBody, **more: Any) -> PieceReader:
    return PieceReader(prompts, table, tells_tokens=bool(body.return_token_ids), **more)
