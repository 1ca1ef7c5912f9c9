"""Requests that wait because no replica of their model is ready: bounded in number, and each in time.

A restart of a replica then costs its callers seconds and not errors; beyond the bounds they are told to come back. Who
is woken looks again for a replica, so all are woken at once: a ready replica has a queue of its own.
"""

import asyncio
from collections import Counter

from flagscale.errors import FlagScaleError


class HoldRefusedError(FlagScaleError):
    """A request may not wait, or not any longer."""


class HoldQueue:
    """Who waits for which model. At most `limit` wait at any time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: Counter[str] = Counter()
        self._ready: dict[str, asyncio.Event] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return self._waiting.total()

    def count(self, model: str) -> int:
        return self._waiting[model]

    async def wait(self, model: str, until: float) -> None:
        """Return when `model` may have a ready replica.

        Raises HoldRefusedError where as many wait as may and after `close`, TimeoutError when the loop's clock
        reaches `until`.
        """
        if self._is_closed:
            raise HoldRefusedError("this router ends")
        if len(self) >= self._limit:
            raise HoldRefusedError(f"{len(self)} requests wait for one already")
        event = self._ready.setdefault(model, asyncio.Event())
        self._waiting[model] += 1
        try:
            async with asyncio.timeout_at(until):
                await event.wait()
        finally:
            self._waiting[model] -= 1

    def wake(self, model: str) -> None:
        """A replica of `model` is ready, or will never be: all who wait for it look again."""
        if event := self._ready.pop(model, None):
            event.set()

    def close(self) -> None:
        """Nobody waits any more, and nobody may."""
        self._is_closed = True
        for model in tuple(self._ready):
            self.wake(model)
