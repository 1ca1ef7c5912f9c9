"""Many streams of the engine as one, and clients that leave before it ends.

A stream of the engine aborts its request when its task is cancelled. So each has a task of its own, outside the scopes
in which a web framework cancels a response again and again: closing is one call that waits for nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

Item = TypeVar("Item")
Result = TypeVar("Result")


class Merged(Generic[Item]):
    """The items of several streams as they come, each with the number of its stream."""

    def __init__(self, streams: Sequence[AsyncGenerator[Item, None]]) -> None:
        self._items: asyncio.Queue[tuple[int, Item | None, Exception | None]] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]

    async def _pump(self, number: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    self._items.put_nowait((number, item, None))
        except Exception as error:  # whatever it was, the reader has to know
            self._items.put_nowait((number, None, error))
        else:
            self._items.put_nowait((number, None, None))

    async def read(self) -> AsyncGenerator[tuple[int, Item], None]:
        """
        Raises:
            Exception: the first that any of the streams raised; the others are ended.
        """
        num_open = len(self._tasks)
        try:
            while num_open:
                number, item, error = await self._items.get()
                if error is not None:
                    raise error
                if item is None:
                    num_open -= 1
                else:
                    yield number, item
        finally:
            self.close()

    def close(self) -> None:
        """End what still runs; it may be called more than once."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()


async def stay_with(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, for as long as the client of `request` is there to read it.

    Raises:
        ClientDisconnect: it left; the work was cancelled.
    """
    task, leaving = asyncio.create_task(work), asyncio.create_task(_wait_for_leaving(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        leaving.cancel()


async def _wait_for_leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `close` is called whatever becomes of the connection, also before the first event."""

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", **headers}, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
