"""The state of one server: loading, ready, asleep or draining, and the engine once there is one.

Encoding a prompt happens in a thread of its own, one at a time: a long prompt then delays other prompts, never the
engine's steps or the answers under way.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from flagscale.errors import UserError
from flagscale.inference.engine import Adapter, AsyncEngine, Engine
from flagscale.inference.server.disk_weights import read_weights
from flagscale.inference.server.faults import RequestError, refusal_of
from flagscale.inference.server.metrics import RequestMeter
from flagscale.inference.server.token_text import TokenTable

State = Literal["loading", "ready", "asleep", "draining"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a name in a request stands for: the model, or one of its adapters."""

    name: str
    adapter: Adapter | None = None

    @property
    def adapter_name(self) -> str | None:
        return None if self.adapter is None else self.adapter.name


class Service:
    """What all routes share.

    max_text_len: characters of a prompt that certainly does not fit any more, so that nobody has to encode it
    num_in_flight: requests that an engine is needed for and that are not answered yet
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.created = int(time.time())
        self.is_draining = False
        self.num_in_flight = 0
        self.meter = RequestMeter()
        self.defaults: Mapping[str, Any] = {}
        self.table = TokenTable(None)
        self.max_text_len = 0
        self._engine: Engine | None = None
        self._running: AsyncEngine | None = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def open(self, engine: Engine, running: AsyncEngine) -> None:
        """Serve with this engine from here on."""
        self._engine, self._running = engine, running
        self.defaults = find_defaults(engine.model)
        self.table = TokenTable(engine.tokenizer)
        longest = max(map(len, engine.tokenizer.get_vocab())) if engine.tokenizer is not None else 1
        self.max_text_len = engine.max_model_len * longest

    @property
    def state(self) -> State:
        if self.is_draining:
            return "draining"
        if self._engine is None:
            return "loading"
        return "asleep" if self._engine.is_asleep else "ready"

    @property
    def engine(self) -> Engine:
        """For what never changes: its tokenizer, its sizes. What a step may change is asked of `running`."""
        assert self._engine is not None
        return self._engine

    @property
    def running(self) -> AsyncEngine:
        assert self._running is not None
        return self._running

    @property
    def is_open(self) -> bool:
        return self._running is not None

    async def find_model(self, name: str | None) -> ServedModel:
        """What a request by this name gets; without a name, the model itself.

        Raises:
            RequestError: 404, another model was asked for.
        """
        if name is None or name in self.names:
            return ServedModel(name or self.names[0])
        served = await self.list_models()
        for each in served:
            if each.name == name:
                return each
        message = f"there is no model `{name}` here; there is {', '.join(f'`{each.name}`' for each in served)}"
        raise RequestError(message, param="model", code="model_not_found", status=404)

    async def list_models(self) -> list[ServedModel]:
        """The model by all its names, then its adapters."""
        adapters = await self.running.adapters()
        return [ServedModel(name) for name in self.names] + [ServedModel(each.name, each) for each in adapters]

    async def load_adapter(self, name: str, folder: str, replaces: bool) -> Adapter:
        """Serve the adapter in a folder by this name.

        Raises:
            RequestError: the name belongs to something else.
            UserError: it cannot be read, or does not fit the model or the memory.
        """
        if name in self.names:
            raise RequestError(f"lora_name: `{name}` is the model itself; expected another name", param="lora_name")
        loaded = [each.name for each in await self.running.adapters()]
        if name in loaded and not replaces:
            message = f"lora_name: an adapter `{name}` is loaded; expected load_inplace: true to replace it"
            raise RequestError(message, param="lora_name")
        return await self.running.load_adapter(name, folder)

    async def call_encoder(self, work: Callable[[], Result], param: str) -> Result:
        """Work of a tokenizer or a template, off the event loop.

        Raises:
            RequestError: what it was given cannot be right; `param` is where it came from.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, work)
        except UserError as error:
            raise refusal_of(error, param) from error

    async def update_weights(self, folder: Path, version: int | str) -> None:
        """Replace all weights by those in a folder, or none; requests go on under the new ones.

        Raises:
            UserError: the folder does not hold this model's tensors.
        """
        tensors = await asyncio.to_thread(read_weights, folder, self.engine.model)
        await self.running.update_weights(version, tensors)

    async def abort_all(self) -> None:
        for request_id in self.engine.unfinished:
            await self.running.abort(request_id)

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)


def find_defaults(model: Any) -> dict[str, Any]:
    """What the model's own `generation_config.json` recommends for sampling, by our names."""
    config = getattr(model, "generation_config", None)
    told = config.to_diff_dict() if config is not None else {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: told[name] for name in names if told.get(name) is not None}
