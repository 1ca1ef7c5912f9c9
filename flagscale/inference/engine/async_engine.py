"""The engine for programs that wait for many things at once.

One thread of its own runs the synchronous engine, step after step. Everything else that touches the engine is a call
queued for that same thread, so it happens between two steps, in order, and the engine stays without locks. A stream
that its reader leaves, by `break`, cancellation or an exception, aborts its request.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from flagscale.errors import FlagScaleError
from flagscale.inference.engine.adapter_files import read_adapter
from flagscale.inference.engine.adapters import Adapter, AdapterSource
from flagscale.inference.engine.engine import Engine, Prompt
from flagscale.inference.engine.metrics import EngineMetrics
from flagscale.inference.engine.outputs import Delta
from flagscale.inference.engine.request import Version
from flagscale.inference.engine.sampling import SamplingParams
from flagscale.inference.engine.weights import Tensors

Result = TypeVar("Result")


class AsyncEngine:
    """An `Engine` in a thread; `async with AsyncEngine(engine) as running: ..`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._streams: dict[str, asyncio.Queue[Delta | BaseException]] = {}
        self._wanted = asyncio.Event()
        self._names = itertools.count()
        self._is_closed = False
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        self._loop.cancel()
        with suppress(asyncio.CancelledError):
            await self._loop
        self._is_closed = True
        await self._end_streams(FlagScaleError("the engine was closed before the request was finished"))
        await asyncio.to_thread(self._thread.shutdown)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one request as they come, ended by the last one of its last sample.

        Raises:
            UserError: the request cannot be right; nothing was queued.
            FlagScaleError: the engine was closed or has failed.
        """
        params = params or SamplingParams()
        name = f"stream-{next(self._names)}" if request_id is None else request_id
        stream: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        num_open = 0

        def add() -> None:
            nonlocal num_open
            self._engine.add_request(prompt, params, name, adapter)
            self._streams[name] = stream
            num_open = params.n

        try:
            await self._call(add)
            self._wanted.set()
            while num_open:
                delta = await stream.get()
                if isinstance(delta, BaseException):
                    raise delta
                num_open -= delta.finish_reason is not None
                yield delta
        finally:
            # Asked in the engine's thread: where this task was cancelled, the request may still be on its way in.
            # And shielded: whoever cancels a second time must not take the leaving out of the thread's queue.
            if not self._is_closed:
                await asyncio.shield(self._call(lambda: self._leave(name, stream)))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets its last deltas, with finish reason `abort`."""
        self._pass_on(await self._call(lambda: self._engine.abort(request_id)))

    async def update_weights(self, version: Version, tensors: Tensors) -> None:
        """As `Engine.update_weights`, between two steps."""
        await self._call(lambda: self._engine.update_weights(version, tensors))

    async def load_adapter(
        self,
        name: str,
        source: AdapterSource,
        config: Mapping[str, Any] | None = None,
        version: Version | None = None,
    ) -> Adapter:
        """As `Engine.load_adapter`, between two steps; a folder is read before they are kept waiting."""
        if isinstance(source, str | Path):
            source = await asyncio.to_thread(read_adapter, source)
        return await self._call(lambda: self._engine.load_adapter(name, source, config, version))

    async def drop_adapter(self, name: str) -> None:
        """As `Engine.drop_adapter`, between two steps."""
        await self._call(lambda: self._engine.drop_adapter(name))

    async def adapters(self) -> tuple[Adapter, ...]:
        return await self._call(self._engine.adapters)

    async def sleep(self) -> None:
        """As `Engine.sleep`: streams stay open and wait."""
        await self._call(self._engine.sleep)

    async def wake(self) -> None:
        await self._call(self._engine.wake)
        self._wanted.set()

    async def metrics(self) -> EngineMetrics:
        return await self._call(lambda: self._engine.metrics)

    async def _call(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _run(self) -> None:
        """Step while there is work; a step that fails ends every stream with its error."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while (deltas := await self._call(self._step)) is not None:
                    self._pass_on(deltas)
            except Exception as error:  # whatever it was, the readers have to know
                await self._end_streams(error)

    def _leave(self, request_id: str, stream: "asyncio.Queue[Delta | BaseException]") -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _step(self) -> list[Delta] | None:
        can_step = self._engine.has_work and not self._engine.is_asleep
        return self._engine.step() if can_step else None

    def _drop_all(self) -> list["asyncio.Queue[Delta | BaseException]"]:
        for request_id in self._engine.unfinished:
            self._engine.abort(request_id)
        streams = list(self._streams.values())
        self._streams.clear()
        return streams

    def _pass_on(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if stream := self._streams.get(delta.request_id):
                stream.put_nowait(delta)

    async def _end_streams(self, error: BaseException) -> None:
        for stream in await self._call(self._drop_all):
            stream.put_nowait(error)
