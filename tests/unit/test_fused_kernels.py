"""Which kernels the arguments of Megatron ask for, and what is said where they are not installed."""

import re
from types import SimpleNamespace

import pytest

from flagscale.errors import UserError
from flagscale.train import fused_kernels

DEFAULTS = {
    "transformer_impl": "transformer_engine",
    "apply_rope_fusion": True,
    "no_persist_layer_norm": False,
    "gradient_accumulation_fusion": True,
    "masked_softmax_fusion": True,
    "fp16": False,
    "bf16": False,
}
"""of Megatron's parser"""
WITHOUT = {**DEFAULTS, **{row.field: row.without for row in fused_kernels.KERNELS}}
ENGINE, WEIGHTS, SOFTMAX = "transformer_engine", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda"
LAYERS = "transformer_impl: local, no_rope_fusion: true, no_persist_layer_norm: true"
GRADIENTS = "no_gradient_accumulation_fusion: true"
PROBABILITIES = "no_masked_softmax_fusion: true"


@pytest.mark.parametrize(
    ("there", "changes", "packages", "arguments"),
    [
        ((), {}, "Transformer Engine and Apex with its CUDA extensions", f"{LAYERS}, {GRADIENTS}"),
        (
            *((), {"bf16": True}, "Transformer Engine and Apex with its CUDA extensions"),
            f"{LAYERS}, {GRADIENTS}, {PROBABILITIES}",
        ),
        ((WEIGHTS,), {}, "Transformer Engine", LAYERS),
        ((ENGINE, SOFTMAX), {}, "Apex with its CUDA extensions", GRADIENTS),
        ((ENGINE,), {"fp16": True}, "Apex with its CUDA extensions", GRADIENTS),
        (
            *((ENGINE,), {"fp16": True, "transformer_impl": "local"}, "Apex with its CUDA extensions"),
            f"{GRADIENTS}, {PROBABILITIES}",
        ),
        ((), {**WITHOUT, "apply_rope_fusion": True}, "Transformer Engine", "no_rope_fusion: true"),
    ],
)
def test_all_that_is_not_there_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    changes: dict[str, object],
    packages: str,
    arguments: str,
) -> None:
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: name if name in there else None)
    said = f"not installed here: {packages}. Install it, or train without: `train.model: {{{arguments}}}`"
    with pytest.raises(UserError, match=re.escape(said)):
        fused_kernels.check_kernels(SimpleNamespace(**{**DEFAULTS, **changes}))


@pytest.mark.parametrize(
    ("there", "args"),
    [
        ((), WITHOUT),
        ((), {**WITHOUT, "bf16": True}),
        ((), {**WITHOUT, "masked_softmax_fusion": True}),
        ((ENGINE, WEIGHTS), {**DEFAULTS, "bf16": True}),
        ((ENGINE, WEIGHTS, SOFTMAX), {**DEFAULTS, "bf16": True, "transformer_impl": "local"}),
    ],
)
def test_what_asks_for_none_needs_none(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], args: dict[str, object]
) -> None:
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: name if name in there else None)
    fused_kernels.check_kernels(SimpleNamespace(**args))
