"""Where keys and values lie: for each layer two tensors of pages, taken once within a budget of bytes.

A page of a layer is [page_size, heads, head_dim], tokens first, so that reading a sequence is copying whole pages into
one reused scratch tensor, which costs little beside the attention that follows and needs no kernel of our own. A
sequence on neighbouring pages is not copied at all. Keys and values may have different head sizes (DeepSeek's
attention).
"""

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from flagscale.errors import UserError
from flagscale.inference.engine.staging import stage


@dataclass(frozen=True)
class LayerShape:
    """What one token costs in one layer."""

    num_heads: int
    key_dim: int
    value_dim: int

    @cached_property
    def num_elements(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim)


def plan_num_pages(layers: Sequence[LayerShape], page_size: int, element_bytes: int, budget_bytes: int) -> int:
    """How many pages fit, beside the padding page and the scratch space for the widest layer.

    Raises:
        UserError: not even one page does.
    """
    token_bytes = (
        sum(each.num_elements for each in layers) + max(each.num_elements for each in layers)
    ) * element_bytes
    num_pages = budget_bytes // (page_size * token_bytes) - 1
    if num_pages < 1:
        message = f"engine.kv_cache_bytes: {budget_bytes} bytes hold no page of {page_size} tokens"
        raise UserError(f"{message}; expected at least {2 * page_size * token_bytes}")
    return num_pages


def _make_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: masked positions are multiplied by 0, and 0 times what lies about may be NaN.

    On a CPU they are pages of the system's that become memory when they are first written to.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


class KVCache:
    """The keys and values of all layers."""

    def __init__(
        self, layers: Sequence[LayerShape], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self._keys = []
        self._values = []
        for layer in layers:
            head = (num_pages + 1, page_size, layer.num_heads)
            self._keys.append(_make_zeros((*head, layer.key_dim), dtype, device))
            self._values.append(_make_zeros((*head, layer.value_dim), dtype, device))
        self._scratch = [torch.empty(0, dtype=dtype, device=device), torch.empty(0, dtype=dtype, device=device)]

    @property
    def num_bytes(self) -> int:
        """What is held now, scratch included."""
        tensors = [*self._keys, *self._values, *self._scratch]
        return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the keys and values [tokens, heads, dim] of new tokens into their slots (page * page_size + offset)."""
        self._keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self._values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def read(self, layer: int, pages: "torch.Tensor | slice", num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, tokens, heads, dim] of `num_rows` sequences with equally many pages each.

        What is returned is overwritten by the next read.
        """
        keys, values = self._gather(0, self._keys[layer], pages), self._gather(1, self._values[layer], pages)
        return keys.view(num_rows, -1, *keys.shape[2:]), values.view(num_rows, -1, *values.shape[2:])

    def pages_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [pages, page_size, heads, dim] of a layer, where they lie."""
        return self._keys[layer], self._values[layer]

    def by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as [1, heads, slots, dim]."""
        keys, values = (each.flatten(0, 1).transpose(0, 1).unsqueeze(0) for each in self.pages_of(layer))
        return keys, values

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) in every layer."""
        pairs = tuple(pairs)
        if pairs:
            device = self._keys[0].device
            src, dst = (stage([pair[side] for pair in pairs], device) for side in (0, 1))
            for tensor in (*self._keys, *self._values):
                tensor.index_copy_(0, dst, tensor.index_select(0, src))

    def _gather(self, which: int, source: torch.Tensor, pages: "torch.Tensor | slice") -> torch.Tensor:
        if isinstance(pages, slice):
            return source[pages]
        shape = (pages.numel(), *source.shape[1:])
        if self._scratch[which].numel() < prod(shape):
            self._scratch[which] = torch.empty(prod(shape), dtype=source.dtype, device=source.device)
        out = self._scratch[which][: prod(shape)].view(shape)
        torch.index_select(source, 0, pages, out=out)
        return out
