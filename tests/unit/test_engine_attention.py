"""Attention over pages against the plain definition, for groups of every kind."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from flagscale.errors import UserError  # noqa: E402
from flagscale.inference.engine.attention import (  # noqa: E402
    AttentionPlan,
    Group,
    Lone,
    ShapeProbe,
    Span,
    make_plan,
    paged_attention,
    plan_groups,
)
from flagscale.inference.engine.kv_cache import KVCache, LayerShape, plan_num_pages  # noqa: E402

PAGE = 4
CPU = torch.device("cpu")


def plain(query: Any, keys: Any, values: Any, start: int, window: int | None) -> Any:
    """Causal attention of [tokens, heads, dim] whose first query stands at `start`, written out."""
    share = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * 0.3
    at, key_at = torch.arange(len(query))[:, None] + start, torch.arange(len(keys))[None]
    hidden = key_at > at
    if window is not None:
        hidden |= key_at <= at - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def attend(sizes: Sequence[tuple[int, int]], window: int | None, in_runs: bool, value_dim: int = 8) -> None:
    """Sequences of (tokens before, tokens now), through pages and plainly."""
    draw = random.Random(0)
    torch.manual_seed(0)
    needed = [-(-(before + now) // PAGE) for before, now in sizes]
    pool = list(range(1, sum(needed) + 1))
    if not in_runs:
        draw.shuffle(pool)
    cache = KVCache([LayerShape(2, 8, value_dim)] * 2, len(pool), PAGE, torch.float32, CPU)
    spans, keys, values, row = [], [], [], 0
    for (before, now), count in zip(sizes, needed, strict=True):
        pages = tuple(pool[:count])
        del pool[:count]
        keys.append(torch.randn(before + now, 2, 8))
        values.append(torch.randn(before + now, 2, value_dim))
        if before:
            old = make_plan([Span(0, 0, before, pages)], cache, CPU)
            cache.write(1, old.slots, keys[-1][:before], values[-1][:before])
        spans.append(Span(row, before, now, pages))
        row += now
    query = torch.randn(row, 6, 8)
    key = torch.cat([each[span.start :] for each, span in zip(keys, spans, strict=True)])
    value = torch.cat([each[span.start :] for each, span in zip(values, spans, strict=True)])
    told = make_plan(spans, cache, CPU).attend(1, query, key, value, 0.3, window)
    for span, k, v in zip(spans, keys, values, strict=True):
        mine = told[span.row : span.row + span.count]
        torch.testing.assert_close(mine, plain(query[span.row : span.row + span.count], k, v, span.start, window))


SHAPES = {
    "one prompt": [(0, 9)],
    "one token": [(9, 1)],
    "first token": [(0, 1)],
    "equal tokens": [(6, 1)] * 3,
    "unequal tokens": [(3, 1), (14, 1), (7, 1)],
    "long tokens": [(130, 1), (100, 1), (5, 1)],
    "chunks": [(4, 5), (9, 3)],
    "everything": [(0, 20), (3, 1), (16, 4), (110, 1), (0, 1), (99, 30), (7, 2), (12, 1)],
}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("in_runs", [True, False], ids=["runs", "scattered"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_give_what_the_definition_gives(shape: str, in_runs: bool, window: int | None) -> None:
    attend(SHAPES[shape], window, in_runs)


@pytest.mark.parametrize("in_runs", [True, False], ids=["runs", "scattered"])
def test_values_may_have_another_size_than_keys(in_runs: bool) -> None:
    attend(SHAPES["everything"], None, in_runs, value_dim=5)


def test_what_is_kept_already_is_not_written_again() -> None:
    cache = KVCache([LayerShape(1, 2, 2)], 2, PAGE, torch.float32, CPU)
    cache.write(0, torch.arange(4, 8), torch.ones(4, 1, 2), torch.ones(4, 1, 2))
    plan = make_plan([Span(0, 3, 2, (1, 2), num_kept=4)], cache, CPU)
    assert plan.slots.tolist() == [0, 8]
    plan.attend(0, torch.zeros(2, 1, 2), torch.full((2, 1, 2), 7.0), torch.full((2, 1, 2), 7.0), 1.0, None)
    keys, _ = cache.read(0, slice(1, 3), 1)
    assert keys[0, :, 0, 0].tolist() == [1, 1, 1, 1, 7, 0, 0, 0]


def test_decoding_of_similar_lengths_is_one_call_and_of_very_different_ones_is_not() -> None:
    def span(row: int, stop: int) -> Span:
        return Span(row, stop - 1, 1, tuple(range(1 + 100 * row, 1 + 100 * row + 2 * -(-stop // 16), 2)))

    assert len(plan_groups([span(i, 300 + i) for i in range(8)], 1000, 16)) == 1
    assert len(plan_groups([span(0, 1500), span(1, 20), span(2, 25)], 1000, 16)) == 2
    assert [len(group) for group in plan_groups([span(i, 90) for i in range(8)], 12, 16)] == [2] * 4


def test_a_long_sequence_on_neighbouring_pages_is_read_in_place() -> None:
    cache = KVCache([LayerShape(1, 2, 2)], 40, PAGE, torch.float32, CPU)
    run = tuple(range(3, 34))
    plan = make_plan([Span(0, 120, 2, run), Span(2, 120, 1, run), Span(3, 8, 1, (2, 36, 1))], cache, CPU)
    assert isinstance(plan, AttentionPlan)
    lone, rest = plan.groups
    assert lone.pages == slice(3, 34)
    assert isinstance(rest.pages, torch.Tensor)
    keys, _ = cache.read(0, lone.pages, 1)
    assert keys.data_ptr() == cache._keys[0][3].data_ptr()
    assert plan.lone == (Lone(2, 3 * PAGE, 121),)
    assert cache.by_head(0)[0][:, :, 3 * PAGE].data_ptr() == cache._keys[0][3].data_ptr()


def test_the_lower_triangle_is_no_mask_in_memory() -> None:
    def group(spans: tuple[Span, ...], queries: int) -> Group:
        whole = slice(0, len(spans) * queries)
        return Group(spans, queries, max(span.stop for span in spans), whole, None, whole, slice(1, 4))

    begins = group((Span(0, 0, 5, (1, 2)), Span(5, 0, 3, (3,))), 5)
    assert begins.is_causal(None)
    assert begins.mask(None, torch.float32, CPU) is None
    assert not begins.is_causal(4)
    assert begins.mask(4, torch.float32, CPU) is not None
    assert not group((Span(0, 4, 5, (1, 2, 3)),), 5).is_causal(None)
    assert not group((Span(0, 0, 1, (1,)),), 1).is_causal(None)


def test_nothing_is_masked_where_nothing_has_to_be() -> None:
    def mask(spans: tuple[Span, ...], window: int | None = None) -> Any:
        whole = slice(0, len(spans))
        group = Group(spans, 1, max(span.stop for span in spans), whole, None, whole, slice(1, 4))
        return group.mask(window, torch.float32, CPU)

    assert mask((Span(0, 7, 1, (1, 2)), Span(1, 7, 1, (3, 4)))) is None
    assert mask((Span(0, 7, 1, (1, 2)),), window=8) is None
    assert mask((Span(0, 7, 1, (1, 2)),), window=7).isinf().tolist() == [[[[True] + [False] * 7]]]
    assert mask((Span(0, 7, 1, (1, 2)), Span(1, 6, 1, (3, 4)))).isinf().sum() == 1


def test_pages_are_counted_within_the_budget() -> None:
    layers = [LayerShape(2, 8, 4), LayerShape(1, 8, 8)]
    token = (24 + 16 + 24) * 2
    assert plan_num_pages(layers, 16, 2, 11 * 16 * token) == 10
    assert plan_num_pages(layers, 16, 2, 11 * 16 * token - 1) == 9
    with pytest.raises(UserError, match=rf"hold no page of 16 tokens; expected at least {2 * 16 * token}"):
        plan_num_pages(layers, 16, 2, 16 * token)


def test_the_scratch_space_is_reused() -> None:
    cache = KVCache([LayerShape(1, 2, 2)], 10, PAGE, torch.float32, CPU)
    first, _ = cache.read(0, torch.tensor([1, 2, 3, 4]), 2)
    before = cache.num_bytes
    second, _ = cache.read(0, torch.tensor([5, 6]), 1)
    assert first.data_ptr() == second.data_ptr()
    assert cache.num_bytes == before
    assert first.shape == (2, 8, 1, 2)


def test_pages_are_copied_in_every_layer() -> None:
    cache = KVCache([LayerShape(1, 2, 3)] * 2, 4, PAGE, torch.float32, CPU)
    for layer in range(2):
        cache.write(layer, torch.tensor([4, 9]), torch.full((2, 1, 2), 1.0 + layer), torch.full((2, 1, 3), 5.0 + layer))
    cache.copy_pages([(1, 3), (2, 4)])
    cache.copy_pages([])
    for layer in range(2):
        keys, values = cache.read(layer, torch.tensor([3, 4]), 2)
        assert keys[0, 0].tolist() == [[1.0 + layer] * 2]
        assert values[1, 1].tolist() == [[5.0 + layer] * 3]


def test_attention_of_another_kind_is_refused_by_name() -> None:
    tensor = torch.zeros(1, 1, 2, 4)
    module = torch.nn.Module()
    module.layer_idx = 0
    with pytest.raises(UserError, match="runs only inside the engine"):
        paged_attention(module, tensor, tensor, tensor, None)
    with pytest.raises(UserError, match="Module asks for attention with softcap, which the engine has not"):
        paged_attention(module, tensor, tensor, tensor, None, paged=ShapeProbe(), softcap=30.0, s_aux=None)


def test_the_probe_notes_what_a_layer_keeps() -> None:
    module = torch.nn.Module()
    module.layer_idx = 3
    probe = ShapeProbe()
    query, key, value = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 6)
    out, weights = paged_attention(module, query, key, value, None, paged=probe)
    assert (out.shape, weights) == ((1, 2, 4, 6), None)
    assert probe.layers == {3: LayerShape(2, 8, 6)}
