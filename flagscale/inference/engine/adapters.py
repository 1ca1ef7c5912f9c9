"""LoRA adapters: small changes to a model, many of them in one run of it.

A layer computes all tokens of the step with the model's own weights; then each adapter adds its low-rank product to the
rows of its own tokens. Nothing is merged and nothing of the model is copied, so an adapter costs its own bytes, and a
request without one gets the same bits as if there were none. The price is two small matrix products for each adapter
and layer in every step.

Loading and dropping happen between two steps. A layer that no adapter changes is not touched at all.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import torch

from flagscale.errors import UserError, find_nearest
from flagscale.inference.engine.adapter_files import AdapterFiles, LowRank, plan_layers, read_adapter
from flagscale.inference.engine.attention import probe_layers
from flagscale.inference.engine.int8 import Int8Linear
from flagscale.inference.engine.staging import stage
from flagscale.inference.engine.weights import Tensors

AdapterSource: TypeAlias = "str | Path | AdapterFiles | Tensors"
Rows: TypeAlias = "slice | torch.Tensor"
NUM_PROBE_TOKENS = 7
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One loaded adapter.

    version: a label that its owner chooses, told with every output
    path: where it was read from; None: it was given as tensors
    root: what the keys of its pages begin with, different for every load
    """

    name: str
    version: int | str
    path: str | None
    root: bytes
    layers: Mapping[str, LowRank] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(each.down.nbytes + each.up.nbytes for each in self.layers.values())


@dataclass(frozen=True, slots=True)
class AdapterSpan:
    """Tokens of one sample in a step: where they begin in the flat list, and where their logits do in those wanted."""

    adapter: str | None
    row: int
    count: int
    logit_row: int
    num_logits: int


class AdapterTable:
    """Owns the adapters of one model, and what makes its layers add them.

    max_bytes: of all adapters together; while one is replaced, the new and the old are there for a moment
    """

    def __init__(self, model: Any, max_bytes: int) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._adapters: dict[str, Adapter] = {}
        self._hooks: dict[str, Any] = {}
        self._num_loads = 0
        self._rows: list[tuple[Adapter, Rows]] = []
        self._logit_rows: list[tuple[Adapter, Rows]] = []

    def values(self) -> tuple[Adapter, ...]:
        return tuple(self._adapters.values())

    def get(self, name: str) -> Adapter:
        """
        Raises:
            UserError: there is no such adapter.
        """
        if name not in self._adapters:
            near = find_nearest(name, self._adapters)
            hint = f"; did you mean `{near}`?" if near else ""
            raise UserError(f"adapter `{name}`: no adapter of this name is loaded{hint}")
        return self._adapters[name]

    def load(
        self, name: str, source: "AdapterSource", config: Mapping[str, Any] | None, version: int | str | None
    ) -> Adapter:
        """Take an adapter in, whole or not at all, in the place of the one that has its name.

        Raises:
            UserError: it cannot be read, does not fit the model, or does not fit the memory.
        """
        path: str | None = None
        tensors: Tensors
        files = read_adapter(source) if isinstance(source, str | Path) else source
        if isinstance(files, AdapterFiles):
            path, tensors, config = files.path, files.tensors, files.config
        else:
            tensors = files
        if config is None:
            raise UserError(
                f"adapter `{name}`: tensors without a configuration; expected `r` and `lora_alpha` at least"
            )
        planned = plan_layers(self._model, find_linears(self._model), tensors, config)
        dtype, device = self._model.dtype, self._model.device
        num_bytes = sum(down.numel() + up.numel() for down, up, _ in planned.values()) * dtype.itemsize
        others = sum(each.num_bytes for each in self._adapters.values() if each.name != name)
        if others + num_bytes > self._max_bytes:
            message = f"adapter `{name}`: {num_bytes} bytes do not fit beside the {others} of other adapters"
            raise UserError(f"{message}; the limit is {self._max_bytes} (engine.adapter_bytes)")
        layers = {
            layer: LowRank(
                down.detach().to(device, dtype, copy=True).t(), (up.detach().float() * scale).to(device, dtype).t()
            )
            for layer, (down, up, scale) in planned.items()
        }
        self._num_loads += 1
        root = blake2b(b"adapter %d" % self._num_loads, digest_size=16).digest()
        adapter = Adapter(name, self._num_loads if version is None else version, path, root, layers)
        self._adapters[name] = adapter
        self._update_hooks()
        return adapter

    def drop(self, name: str) -> None:
        """
        Raises:
            UserError: there is no such adapter.
        """
        del self._adapters[self.get(name).name]
        self._update_hooks()

    @contextmanager
    def step(self, spans: Sequence[AdapterSpan]) -> Iterator[None]:
        """While the model runs these tokens, each gets what its adapter adds."""
        for name in {span.adapter: None for span in spans if span.adapter is not None}:
            adapter, mine = self._adapters[name], [span for span in spans if span.adapter == name]
            self._rows.append((adapter, self._index([(span.row, span.count) for span in mine])))
            self._logit_rows.append((adapter, self._index([(span.logit_row, span.num_logits) for span in mine])))
        try:
            yield
        finally:
            self._rows.clear()
            self._logit_rows.clear()

    def _index(self, runs: Sequence[tuple[int, int]]) -> Rows:
        start, stop = runs[0][0], runs[-1][0] + runs[-1][1]
        if stop - start == sum(count for _, count in runs):
            return slice(start, stop)
        rows = [row for at, count in runs for row in range(at, at + count)]
        return stage(rows, self._model.device)

    def _update_hooks(self) -> None:
        wanted = {layer for adapter in self._adapters.values() for layer in adapter.layers}
        for layer in self._hooks.keys() - wanted:
            self._hooks.pop(layer).remove()
        head = self._model.get_output_embeddings()
        for layer in wanted - self._hooks.keys():
            module = self._model.get_submodule(layer)
            groups = self._logit_rows if module is head else self._rows
            self._hooks[layer] = module.register_forward_hook(partial(_add_products, groups, layer))


def _add_products(
    groups: Sequence[tuple[Adapter, Rows]], layer: str, _module: Any, given: tuple[torch.Tensor], out: torch.Tensor
) -> None:
    """Add to a layer's output, in place, what each adapter has for its rows."""
    for adapter, rows in groups:
        product = adapter.layers.get(layer)
        if product is None:
            continue
        x, y = given[0].flatten(0, -2), out.view(-1, out.shape[-1])
        if isinstance(rows, slice):
            y[rows].addmm_(x[rows] @ product.down, product.up)
        else:
            y.index_add_(0, rows, x[rows] @ product.down @ product.up)


def find_linears(model: Any) -> dict[str, Any]:
    """The layers that an adapter may change: linear ones through which each token goes once, and the output head.

    Seen in one tiny run, since what a part of the model gets is not to be read off its name; but experts are known by
    theirs, since one of them might be sent every token of that run.
    """
    linears = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear | Int8Linear)}
    linears = {name: each for name, each in linears.items() if not EXPERT.search(name)}
    seen: dict[str, int] = {}

    def note(name: str, module: Any, given: tuple[torch.Tensor], _out: torch.Tensor) -> None:
        seen[name] = seen.get(name, 0) + given[0].numel() // module.in_features

    hooks = [each.register_forward_hook(partial(note, name)) for name, each in linears.items()]
    try:
        probe_layers(model, NUM_PROBE_TOKENS)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    return {name: each for name, each in linears.items() if each is head or seen.get(name) == NUM_PROBE_TOKENS}
