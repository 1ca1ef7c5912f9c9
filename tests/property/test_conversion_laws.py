"""The laws of conversion: there and back is where one was, bit for bit, for any shape, on any number of ranks."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from flagscale.sync.canon import ModelShape, list_rules  # noqa: E402
from flagscale.sync.hf_config import read_config, write_config  # noqa: E402
from flagscale.sync.layout import cut, to_hf, to_megatron, uncut  # noqa: E402
from flagscale.sync.megatron_args import read_args, write_args  # noqa: E402


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Small models of every family, with everything divisible by four ranks where it must be."""
    groups = draw(st.sampled_from((1, 2, 4)))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((2, 4, 6)))
    family = draw(st.sampled_from(("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")))
    experts = draw(st.integers(2, 4)) if family in ("mixtral", "qwen3_moe") else 0
    vocab = draw(st.integers(5, 40))
    return ModelShape(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * head_dim if family == "qwen2" else 4 * draw(st.integers(1, 5)),
        ffn_size=(ffn := 4 * draw(st.integers(1, 4))),
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab,
        padded_vocab_size=vocab + draw(st.integers(0, 9)),
        max_len=draw(st.integers(8, 99)),
        tied=draw(st.booleans()),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
        rope_base=draw(st.sampled_from((10000.0, 1e6))),
        rope_scaling=draw(st.sampled_from((None, 8.0, 32.0))) if family == "llama" else None,
        num_experts=experts,
        experts_per_token=2 if experts else 0,
        expert_ffn_size=ffn if family == "mixtral" else 12 if experts else 0,
        renormalises=family != "qwen3_moe" or draw(st.booleans()),
    )


def random_bits(size: tuple[int, ...], dtype: Any) -> Any:
    """Any bits at all, infinities and not-a-numbers too: what is only moved is not looked at."""
    return torch.randint(-(2**15), 2**15, size, dtype=torch.int16).view(dtype)


def same_bits(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and torch.equal(one.view(torch.int16), other.contiguous().view(torch.int16)))


@given(shapes(), st.sampled_from((torch.bfloat16, torch.float16)))
@settings(deadline=None)
def test_to_megatron_and_back_keeps_every_bit(shape: ModelShape, dtype: Any) -> None:
    for rule in list_rules(shape):
        parts = [random_bits(size, dtype) for _, size in rule.hf]
        whole = to_megatron(rule, shape, parts)
        assert tuple(whole.shape) == rule.size
        assert all(map(same_bits, to_hf(rule, shape, whole), parts))


@given(shapes())
@settings(deadline=None)
def test_to_hf_and_back_keeps_every_bit_but_the_padding(shape: ModelShape) -> None:
    for rule in list_rules(shape):
        whole = random_bits(rule.size, torch.bfloat16)
        again = to_megatron(rule, shape, to_hf(rule, shape, whole))
        rows = shape.vocab_size if rule.row.join == "vocab" else rule.size[0]
        assert same_bits(again[:rows], whole[:rows])
        assert not again[rows:].any()


@given(shapes(), st.sampled_from((1, 2, 4)))
@settings(deadline=None)
def test_cutting_over_ranks_and_joining_keeps_every_bit(shape: ModelShape, num_ranks: int) -> None:
    for rule in list_rules(shape):
        if rule.row.axis is not None and rule.size[rule.row.axis] % (2 * num_ranks):
            continue
        whole = random_bits(rule.size, torch.bfloat16)
        pieces = cut(rule, whole, num_ranks)
        assert len(pieces) == num_ranks
        assert same_bits(uncut(rule, pieces), whole)


@given(shapes(), st.sampled_from((1, 2, 4)))
@settings(deadline=None)
def test_a_rank_holds_whole_groups_of_heads(shape: ModelShape, num_ranks: int) -> None:
    """A rank's queries, keys and values are those of a smaller model of which it has all."""
    if shape.num_groups % num_ranks:
        return
    (rule,) = [each for each in list_rules(shape) if each.row.hf[0] == "self_attn.q_proj.weight" and each.layer == 0]
    whole = random_bits(rule.size, torch.bfloat16)
    queries, keys, values = to_hf(rule, shape, whole)
    pieces = cut(rule, whole, num_ranks)
    for rank, piece in enumerate(pieces):
        groups = piece.reshape(shape.num_groups // num_ranks, -1, shape.head_dim, shape.hidden_size)
        per_group = shape.num_heads // shape.num_groups
        assert same_bits(groups[:, :per_group].reshape(-1, shape.hidden_size), queries.chunk(num_ranks)[rank])
        assert same_bits(groups[:, per_group].reshape(-1, shape.hidden_size), keys.chunk(num_ranks)[rank])
        assert same_bits(groups[:, per_group + 1].reshape(-1, shape.hidden_size), values.chunk(num_ranks)[rank])


@given(shapes())
@settings(deadline=None)
def test_dimensions_survive_both_configurations(shape: ModelShape) -> None:
    ffn: dict[str, Any] = {"ffn_size": shape.expert_ffn_size} if shape.family == "mixtral" else {}
    assert read_config(write_config(shape, "bfloat16"), "here", shape.padded_vocab_size) == replace(shape, **ffn)
    assert read_args(write_args(shape, "bfloat16"), "here") == shape
