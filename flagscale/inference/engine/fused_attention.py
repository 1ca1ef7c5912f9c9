# ruff: noqa: N803  what a kernel is compiled for is written in capitals
"""Attention over pages in one kernel, for chips that Triton compiles for.

`attention.AttentionPlan` gathers pages and pads groups of sequences, which costs a CPU little. A GPU pays for every
launch, so here all sequences of a step, long prompts and single tokens alike, are one launch a layer: a program takes a
tile of one sequence's queries, together with all query heads that share a key's head, and walks over that sequence's
pages with the running maximum and sum of Dao et al. 2022 (arXiv 2205.14135). Pages are read where they lie (Kwon et al.
2023, arXiv 2309.06180).

`TRITON_INTERPRET=1` runs the same kernel on a CPU, in fp32, for tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from flagscale.inference.engine.attention import Span
from flagscale.inference.engine.kv_cache import KVCache
from flagscale.inference.engine.staging import stage

NUM_FIELDS = 3
"""of a row of `FusedPlan.spans`, before its pages: start, count, first row of the flat list"""
LEAST_ROWS = 16
"""of a matrix product in Triton"""
MOST_ROWS = 64
NUM_KEYS = 64
"""that a program looks at in one turn; half of it where an element has 4 bytes"""


@triton.jit(do_not_specialize=["span_stride"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, out, spans, tiles,
    query_row, query_head, key_page, key_token, key_head, value_page, value_token, value_head, out_row, out_head,
    span_stride, scale,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    NUM_ROWS: tl.constexpr, NUM_KEYS: tl.constexpr, NUM_FIELDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against the keys of one head; WINDOW 0: no window."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    span = spans + tl.load(tiles + 2 * tile) * span_stride
    first = tl.load(tiles + 2 * tile + 1)
    start, count, top = tl.load(span), tl.load(span + 1), tl.load(span + 2)

    row = tl.arange(0, NUM_ROWS)
    number = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < NUM_ROWS // GROUP * GROUP) & (number < count)
    at = start + number
    dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    place = query + (top + number).to(tl.int64)[:, None] * query_row + head[:, None] * query_head + dim[None, :]
    queries = tl.load(place, mask=is_row[:, None] & (dim < KEY_DIM)[None, :], other=0.0)

    best = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([NUM_ROWS], tl.float32)
    mixed = tl.zeros([NUM_ROWS, VALUE_PAD], tl.float32)
    stop = start + tl.minimum(first + NUM_ROWS // GROUP, count)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start + first - WINDOW + 1, 0) // NUM_KEYS * NUM_KEYS
    for turn in range(begin, stop, NUM_KEYS):
        token = turn + tl.arange(0, NUM_KEYS)
        is_key = token < stop
        page = tl.load(span + NUM_FIELDS + token // PAGE, mask=is_key, other=0).to(tl.int64)
        slot = token % PAGE
        place = keys + page * key_page + slot * key_token + kv_head * key_head
        found = tl.load(place[:, None] + dim[None, :], mask=is_key[:, None] & (dim < KEY_DIM)[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(found), input_precision=PRECISION) * scale
        seen = is_key[None, :] & (token[None, :] <= at[:, None])
        if WINDOW > 0:
            seen = seen & (token[None, :] > at[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))

        highest = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(best - base)
        total = total * fade + tl.sum(weights, 1)
        place = values + page * value_page + slot * value_token + kv_head * value_head
        is_value = is_key[:, None] & (value_dim < VALUE_DIM)[None, :]
        found = tl.load(place[:, None] + value_dim[None, :], mask=is_value, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(found.dtype), found, input_precision=PRECISION)
        best = highest

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (top + number).to(tl.int64)[:, None] * out_row + head[:, None] * out_head + value_dim[None, :]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=is_row[:, None] & (value_dim < VALUE_DIM)[None, :])


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """One step's attention, the same for every layer.

    slots: [tokens], where each token's key and value go
    spans: [spans, NUM_FIELDS + pages] int32, a row for each sequence
    counts: of the queries of each sequence
    """

    cache: KVCache
    slots: torch.Tensor
    spans: torch.Tensor
    counts: tuple[int, ...]
    tiles: dict[int, torch.Tensor] = field(default_factory=dict)
    """queries a tile -> [tiles, 2] int32: its sequence, its first query there"""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        self.cache.write(layer, self.slots, key, value)
        keys, values = self.cache.pages_of(layer)
        num_heads, num_kv_heads, value_dim = query.shape[1], keys.shape[2], values.shape[3]
        if query.stride(2) != 1:
            query = query.contiguous()
        out = query.new_empty(query.shape[0], num_heads, value_dim)
        group = num_heads // num_kv_heads
        wanted = group * max(self.counts)
        num_rows = max(triton.next_power_of_2(min(wanted, MOST_ROWS)), triton.next_power_of_2(group), LEAST_ROWS)
        tiles = self._tiles(num_rows // group)
        is_wide = query.dtype.itemsize > 2
        _attend[len(tiles), num_kv_heads](
            query, keys, values, out, self.spans, tiles,
            query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3], out.stride(0), out.stride(1),
            self.spans.stride(0), scale,
            WINDOW=window or 0, GROUP=group, PAGE=self.cache.page_size,
            KEY_DIM=keys.shape[3], KEY_PAD=_pad(keys.shape[3]), VALUE_DIM=value_dim, VALUE_PAD=_pad(value_dim),
            NUM_ROWS=num_rows, NUM_KEYS=NUM_KEYS // 2 if is_wide else NUM_KEYS, NUM_FIELDS=NUM_FIELDS,
            PRECISION="ieee" if is_wide else "tf32",
        )  # fmt: skip
        return out

    def _tiles(self, num_queries: int) -> torch.Tensor:
        if num_queries not in self.tiles:
            tiles = [(i, at) for i, count in enumerate(self.counts) for at in range(0, count, num_queries)]
            flat = [number for tile in tiles for number in tile]
            self.tiles[num_queries] = stage(flat, self.spans.device, torch.int32).view(-1, 2)
        return self.tiles[num_queries]


def _pad(dim: int) -> int:
    padded: int = triton.next_power_of_2(max(dim, LEAST_ROWS))
    return padded


def make_fused_plan(spans: Sequence[Span], slots: torch.Tensor, cache: KVCache, device: torch.device) -> FusedPlan:
    """The attention of a step whose flat list is the spans one after the other."""
    most = max(len(span.pages) for span in spans)
    rows = ((span.start, span.count, span.row, *span.pages, *[0] * (most - len(span.pages))) for span in spans)
    table = stage([number for row in rows for number in row], device, torch.int32).view(len(spans), -1)
    return FusedPlan(cache, slots, table, tuple(span.count for span in spans))
