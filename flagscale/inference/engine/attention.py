"""Attention over pages, put into the models of transformers through its attention interface.

A step's tokens go through the model as one flat list, so all matrix products are as large as they can be. Attention
alone has to know which tokens belong together: an `AttentionPlan`, made once a step, cuts the list into groups of
similar shape, each padded a little and computed in one call for a layer. Padding costs arithmetic, calls cost time:
`plan_groups` weighs one against the other.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from flagscale.errors import UserError
from flagscale.inference.engine.kv_cache import KVCache, LayerShape
from flagscale.inference.engine.pages import PADDING_PAGE
from flagscale.inference.engine.staging import stage

NAME = "flagscale_paged"


@dataclass(frozen=True, slots=True)
class Costs:
    """What decides how a step's attention is cut into calls, in scores (queries times keys) of a layer.

    call: of one more call
    read: of gathering a key
    long_enough: keys from which on a sequence on neighbouring pages is better read in place than gathered with others
    """

    call: int
    read: int
    long_enough: float


ON_CPU = Costs(call=2**11, read=8, long_enough=96)
"""measured"""
ON_GPU = Costs(call=2**18, read=16, long_enough=math.inf)
"""starting kernels costs more than they do"""


def find_costs(device: torch.device) -> Costs:
    return ON_CPU if device.type == "cpu" else ON_GPU


class Attend(Protocol):
    """What the attention function is given for a step."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Query, key and value are [tokens, heads, dim], the result is [tokens, query heads, value dim]."""
        ...


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 the interface's; a flat list of tokens has none
    scaling: float | None = None,
    sliding_window: int | None = None,
    paged: Attend | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls; all tensors are [1, heads, tokens, dim].

    Raises:
        UserError: the model asks for a kind of attention that is not this one.
    """
    if paged is None:
        raise UserError(f"a model with the attention `{NAME}` runs only inside the engine")
    strange = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if others.get(name) is not None]
    if strange:
        raise UserError(
            f"{type(module).__name__} asks for attention with {', '.join(strange)}, which the engine has not"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return paged.attend(module.layer_idx, q, k, v, scale, sliding_window).unsqueeze(0), None


def register() -> None:
    """Make the attention known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


class ShapeProbe:
    """Attention within one short text, which notes what each layer would keep."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,  # noqa: ARG002 the text is shorter than any window
    ) -> torch.Tensor:
        self.layers[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        q, k, v = (each.unsqueeze(0) for each in (query, key, value))
        return _attention(q, k, v, scale, None, is_causal=True)[0]


def probe_layers(model: Any, num_tokens: int = 2) -> dict[int, LayerShape]:
    """What each layer that attends by `paged_attention` would keep of a token, seen in a run of one short text."""
    probe = ShapeProbe()
    ids = torch.arange(num_tokens, device=model.device)[None]
    with torch.inference_mode():
        model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, paged=probe)
    return probe.layers


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a step: `rows` of the flat list, at `positions` of the sequence.

    pages: all pages of the sequence up to its last token here
    num_kept: tokens whose keys and values lie in pages already; those of them that are here again write nothing
    """

    row: int
    start: int
    count: int
    pages: tuple[int, ...]
    num_kept: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(slots=True)
class Group:
    """Spans that are computed in one call, padded to `num_queries` and `num_keys`."""

    spans: tuple[Span, ...]
    num_queries: int
    num_keys: int
    rows: "slice | torch.Tensor"
    """of the flat list: [spans * num_queries]; padding repeats a span's last row"""
    kept: torch.Tensor | None
    """which of the padded rows are no padding; None: all"""
    targets: "slice | torch.Tensor"
    """where the kept rows' results go in the flat list"""
    pages: "slice | torch.Tensor"
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = field(default_factory=dict)

    def is_causal(self, window: int | None) -> bool:
        """Whether the plain lower triangle is the mask: all texts begin here, and no window cuts them."""
        fits_window = window is None or self.num_keys <= window
        return fits_window and self.num_queries > 1 and all(span.start == 0 for span in self.spans)

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """What is added to the scores, [spans, 1, num_queries, num_keys]; None where nothing has to be hidden."""
        if self.is_causal(window):
            return None
        if (window, dtype) not in self.masks:
            self.masks[window, dtype] = _make_mask(self, window, dtype, device)
        return self.masks[window, dtype]


def _make_mask(group: Group, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    fits_window = window is None or group.num_keys <= window
    if group.num_queries == 1 and fits_window and all(span.stop == group.num_keys for span in group.spans):
        return None
    starts = stage([span.start for span in group.spans], device)
    query_at = starts[:, None] + torch.arange(group.num_queries, device=device)
    key_at = torch.arange(group.num_keys, device=device)
    hidden = key_at > query_at[:, :, None]
    if not fits_window:
        assert window is not None
        hidden |= key_at <= query_at[:, :, None] - window
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return zeros.masked_fill_(hidden, -torch.inf).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Lone:
    """One token of a text that is read in place: slots [first, first + num_keys) hold its keys."""

    row: int
    first: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, the same for every layer.

    slots: [tokens], where each token's key and value go
    lone: neighbours in the flat list; a call for each, with as little as possible around it
    """

    cache: KVCache
    slots: torch.Tensor
    groups: tuple[Group, ...]
    lone: tuple[Lone, ...] = ()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        self.cache.write(layer, self.slots, key, value)
        query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        if self.lone:
            first = self.lone[0].row
            out[first : first + len(self.lone)] = self._attend_lone(layer, query, key.shape[1], scale, window)
        for group in self.groups:
            keys, values = self.cache.read(layer, group.pages, len(group.spans))
            keys, values = keys[:, : group.num_keys], values[:, : group.num_keys]
            queries = query[group.rows].unflatten(0, (len(group.spans), group.num_queries))
            mask = group.mask(window, query.dtype, query.device)
            mixed = _attention(queries, keys, values, scale, mask, group.is_causal(window)).flatten(0, 1)
            out[group.targets] = mixed if group.kept is None else mixed[group.kept]
        return out

    def _attend_lone(
        self, layer: int, query: torch.Tensor, num_kv_heads: int, scale: float, window: int | None
    ) -> torch.Tensor:
        keys, values = self.cache.by_head(layer)
        folded = query.unflatten(1, (num_kv_heads, -1))
        mixed = []
        for one in self.lone:
            num_keys = one.num_keys if window is None else min(one.num_keys, window)
            start = one.first + one.num_keys - num_keys
            key, value = keys.narrow(2, start, num_keys), values.narrow(2, start, num_keys)
            mixed.append(scaled_dot_product_attention(folded.narrow(0, one.row, 1), key, value, scale=scale))
        return torch.cat(mixed).flatten(1, 2)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention of [batch, tokens, heads, dim]; several query heads may share one of the key's."""
    batch, num_queries, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    if num_queries == 1:
        # One position's heads that share a key become its queries: a matrix product instead of many vectors.
        folded = query.view(batch, num_kv_heads, num_heads // num_kv_heads, -1)
        mixed = scaled_dot_product_attention(folded, key.transpose(1, 2), value.transpose(1, 2), mask, scale=scale)
        return mixed.reshape(batch, 1, num_heads, -1)
    if mask is not None and query.device.type == "cuda":
        # With a mask, CUDA's fast kernels want as many heads of the key as of the query.
        key, value = (each.repeat_interleave(num_heads // num_kv_heads, 2) for each in (key, value))
        num_kv_heads = num_heads
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mixed = scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    return mixed.transpose(1, 2)


def sort_key(span: Span, costs: Costs) -> tuple[bool, int, int]:
    """The order in which spans should stand in the flat list: those of one group are then neighbours."""
    return (not _reads_in_place(span, costs), -span.count, -span.stop)


def _reads_in_place(span: Span, costs: Costs) -> bool:
    """Whether a call of its own, without gathering, is cheapest: its pages are neighbours, its text is not short."""
    first = span.pages[0]
    return span.stop >= costs.long_enough and span.pages == tuple(range(first, first + len(span.pages)))


def make_plan(spans: Sequence[Span], cache: KVCache, device: torch.device) -> Attend:
    """The attention of a step whose flat list is the spans one after the other, in the order of `sort_key`."""
    size = cache.page_size
    slots: list[int] = []
    for span in spans:
        # What is kept already goes where nobody looks: the padding page.
        slots.extend([PADDING_PAGE] * max(0, min(span.num_kept, span.stop) - span.start))
        written = range(max(span.start, span.num_kept), span.stop)
        slots.extend(span.pages[at // size] * size + at % size for at in written)
    places = stage(slots, device)
    if _has_fused_kernel(device):
        from flagscale.inference.engine.fused_attention import make_fused_plan

        return make_fused_plan(spans, places, cache, device)
    costs = find_costs(device)
    alone = {span.row: span for span in spans if span.count == 1 and _reads_in_place(span, costs)}
    planned = plan_groups([each for each in spans if each.row not in alone], cache.num_pages, size, costs)
    groups = tuple(_make_group(members, cache, device) for members in planned)
    lone = tuple(Lone(row, alone[row].pages[0] * size, alone[row].stop) for row in sorted(alone))
    return AttentionPlan(cache, places, groups, lone)


@functools.cache
def _has_fused_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def plan_groups(spans: Sequence[Span], max_pages: int, page_size: int, costs: Costs = ON_CPU) -> list[list[Span]]:
    """Cut the spans into groups of similar size, of at most `max_pages` pages when padded (a span alone may be it all).

    Greedy, longest first: a span joins the group while its padding costs less than a call of its own.
    """
    lone = [span for span in spans if _reads_in_place(span, costs)]
    groups: list[list[Span]] = []
    queries = keys = 0
    gathered = [span for span in spans if not _reads_in_place(span, costs)]
    for span in sorted(gathered, key=lambda each: sort_key(each, costs)):
        longest = max(keys, span.stop)
        if groups:
            members = len(groups[-1])
            padded = (queries + costs.read) * (longest + (longest - keys) * members)
            waste = padded - (span.count + costs.read) * span.stop
            if waste <= costs.call and -(-longest // page_size) * (members + 1) <= max_pages:
                groups[-1].append(span)
                keys = longest
                continue
        groups.append([span])
        queries, keys = span.count, span.stop
    return [[span] for span in lone] + groups


def _make_group(members: Sequence[Span], cache: KVCache, device: torch.device) -> Group:
    spans = tuple(sorted(members, key=lambda span: span.row))
    num_queries = max(span.count for span in spans)
    num_keys = max(span.stop for span in spans)
    pages = _page_index(spans, -(-num_keys // cache.page_size), device)
    first = spans[0].row
    if all(span.row == first + i * num_queries and span.count == num_queries for i, span in enumerate(spans)):
        whole = slice(first, first + len(spans) * num_queries)
        return Group(spans, num_queries, num_keys, whole, None, whole, pages)
    padded = [span.row + min(i, span.count - 1) for span in spans for i in range(num_queries)]
    kept = [i * num_queries + j for i, span in enumerate(spans) for j in range(span.count)]
    rows, chosen = stage(padded, device), stage(kept, device)
    return Group(spans, num_queries, num_keys, rows, chosen, rows[chosen], pages)


def _page_index(spans: tuple[Span, ...], num_pages: int, device: torch.device) -> "slice | torch.Tensor":
    first = spans[0].pages[0]
    if len(spans) == 1 and spans[0].pages[:num_pages] == tuple(range(first, first + num_pages)):
        return slice(first, first + num_pages)
    padding = (PADDING_PAGE,) * num_pages
    flat = [page for span in spans for page in (span.pages + padding)[:num_pages]]
    return stage(flat, device)
