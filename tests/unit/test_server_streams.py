"""Many streams at once: in order, ended together, and closed by whoever leaves, however often it is cancelled."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from flagscale.inference.server.streams import EventStream, Merged, stay_with

SCOPE: Any = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "headers": []}


class Source:
    """A stream of numbers that waits for ever at its end unless told otherwise, and knows whether it was left."""

    def __init__(self, *items: int, end: BaseException | None = None, is_endless: bool = False) -> None:
        self.items, self.end, self.is_endless, self.was_left = items, end, is_endless, False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.end is not None:
                raise self.end
            if self.is_endless:
                await asyncio.Event().wait()
        finally:
            # Leaving takes a while, and must not be cut off.
            await asyncio.sleep(0.05)
            self.was_left = True


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(guarded())


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await asyncio.sleep(0.005)


def test_every_item_comes_once_with_its_streams_number() -> None:
    async def test() -> None:
        sources = [Source(1, 2, 3), Source(), Source(4)]
        merged = Merged([source.stream() for source in sources])
        found = [item async for item in merged.read()]
        assert sorted(found) == [(0, 1), (0, 2), (0, 3), (2, 4)]
        assert [item for number, item in found if number == 0] == [1, 2, 3]
        await until(lambda: all(source.was_left for source in sources))

    run(test)


def test_an_error_ends_the_others() -> None:
    async def test() -> None:
        endless = Source(1, is_endless=True)
        merged = Merged([endless.stream(), Source(2, end=KeyError("broken")).stream()])
        with pytest.raises(KeyError, match="broken"):
            async for _ in merged.read():
                pass
        await until(lambda: endless.was_left)

    run(test)


def test_closing_ends_what_was_begun_and_may_be_repeated() -> None:
    async def test() -> None:
        sources = [Source(1, is_endless=True) for _ in range(3)]
        merged = Merged([source.stream() for source in sources])
        reading = merged.read()
        await anext(reading)
        merged.close()
        await asyncio.sleep(0.01)
        merged.close()
        await until(lambda: all(source.was_left for source in sources))

    run(test)


def test_a_scope_that_cancels_again_and_again_does_not_cut_the_leaving_off() -> None:
    """A web framework cancels a response at every wait; what leaves the engine must still get through."""

    async def test() -> None:
        source = Source(1, is_endless=True)
        merged = Merged([source.stream()])
        async with anyio.create_task_group() as group:

            async def read() -> None:
                async for _ in merged.read():
                    group.cancel_scope.cancel()

            group.start_soon(read)
        await until(lambda: source.was_left)

    run(test)


def request_of(*messages: str) -> Request:
    """A request whose client sends these messages, then nothing."""
    waiting = list(messages)

    async def receive() -> Any:
        while not waiting:
            await asyncio.sleep(1)
        return {"type": waiting.pop(0)}

    return Request(SCOPE, receive)


def test_work_is_done_for_a_client_that_stays() -> None:
    async def test() -> None:
        assert await stay_with(request_of("http.request"), asyncio.sleep(0.01, "done")) == "done"
        with pytest.raises(KeyError):
            await stay_with(request_of(), fail())

    async def fail() -> None:
        raise KeyError

    run(test)


def test_work_ends_when_its_client_leaves() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def test() -> None:
        with pytest.raises(ClientDisconnect):
            await stay_with(request_of("http.request", "http.disconnect"), work())
        await until(lambda: ended == ["cancelled"])

    run(test)


@pytest.mark.parametrize("leaves_at_once", [True, False])
def test_a_stream_of_events_is_closed_whatever_becomes_of_the_connection(leaves_at_once: bool) -> None:
    closed: list[bool] = []
    sent: list[Any] = []

    async def events() -> AsyncGenerator[str, None]:
        yield "data: 1\n\n"
        await asyncio.Event().wait()

    async def receive() -> Any:
        if not leaves_at_once:
            await until(lambda: len(sent) >= 2)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def test() -> None:
        response = EventStream(events(), lambda: closed.append(True), {"X-More": "1"})
        await response(SCOPE, receive, send)
        assert closed == [True]
        if not leaves_at_once:
            headers = dict(sent[0]["headers"])
            assert headers[b"content-type"].startswith(b"text/event-stream")
            assert (headers[b"cache-control"], headers[b"x-more"]) == (b"no-cache", b"1")
            assert sent[1]["body"] == b"data: 1\n\n"

    run(test)
