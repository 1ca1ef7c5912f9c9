"""A model's dimensions in the `config.json` of transformers, both ways, without transformers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flagscale.errors import ConfigError, Fault, find_nearest
from flagscale.sync.canon import Family, ModelShape
from flagscale.sync.megatron_args import check_shape

CLASSES: Mapping[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False, None),
    "decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "partial_rotary_factor": (1.0, None),
}  # fmt: skip
"""what must be one of these where it is there"""

LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
"""Llama 3.1's scaling of positions, whose factor alone is an argument of Megatron"""


def read_config(config: Mapping[str, Any], where: str, padded_vocab_size: int | None = None) -> ModelShape:
    """
    padded_vocab_size: rows of the embedding in Megatron; None: the next multiple of 128

    Raises:
        ConfigError: the architecture is not known here, or differs from it.
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        near = find_nearest(str(kind), CLASSES)
        fault = Fault("model_type", f"`{kind}` cannot be converted", f"one of {', '.join(CLASSES)}", near)
        raise ConfigError([fault.at(where)])
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    faults = [Fault(name, "is missing", "a number") for name in needed if not isinstance(config.get(name), int)]
    faults += [
        Fault(name, f"{config[name]!r} cannot be converted", " or ".join(map(repr, values)))
        for name, values in NEUTRAL.items()
        if name in config and config[name] not in values
    ]
    if kind == "mixtral" and config.get("sliding_window") is not None:
        faults.append(Fault("sliding_window", f"{config['sliding_window']} cannot be converted", "null"))
    if faults:
        raise ConfigError([fault.at(where) for fault in faults])
    shape = _read_experts(_read_dense(config, where), config)
    padded = padded_vocab_size or -(-shape.vocab_size // 128) * 128
    if padded < shape.vocab_size:
        message = f"{padded} rows do not hold {shape.vocab_size} tokens"
        raise ConfigError([Fault("padded_vocab_size", message, "at least as many").at(where)])
    shape = replace(shape, padded_vocab_size=padded)
    check_shape(shape, where)
    return shape


def _read_dense(config: Mapping[str, Any], where: str) -> ModelShape:
    kind, heads = config["model_type"], config["num_attention_heads"]
    base, scaling = _read_rope(config, where)
    end = config.get("eos_token_id")
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=heads,
        num_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        padded_vocab_size=config["vocab_size"],
        max_len=config.get("max_position_embeddings", 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        qkv_bias=kind == "qwen2",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        end_token=end[0] if isinstance(end, list) and end else end if isinstance(end, int) else None,
    )


def _read_experts(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    if shape.qkv_bias or config["model_type"] not in ("mixtral", "qwen3_moe"):
        return shape
    return replace(
        shape,
        num_experts=config.get("num_local_experts") or config.get("num_experts") or 0,
        experts_per_token=config.get("num_experts_per_tok", 2),
        expert_ffn_size=config.get("moe_intermediate_size") or config["intermediate_size"],
        renormalises=config["model_type"] == "mixtral" or bool(config.get("norm_topk_prob", False)),
    )


def _read_rope(config: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """(base, Llama 3.1's factor); transformers 5 keeps both in `rope_parameters`, before it in two keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if any(rope.get(name) != value for name, value in LLAMA3.items()):
        expected = f"default, or llama3 with {', '.join(f'{k} {v}' for k, v in LLAMA3.items() if k != 'rope_type')}"
        raise ConfigError([Fault("rope_parameters", f"{dict(rope)} cannot be converted", expected).at(where)])
    return base, float(rope["factor"])


def write_config(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """The content of `config.json`; dtype: as torch calls it, without `torch.`"""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_base}
    if shape.rope_scaling is not None:
        rope.update(LLAMA3, factor=shape.rope_scaling)
    config: dict[str, Any] = {
        "architectures": [CLASSES[shape.family]],
        "model_type": shape.family,
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_len,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": shape.end_token,
        "use_cache": True,
    }
    if shape.family == "qwen2":
        del config["head_dim"]
    if shape.family == "mixtral":
        config.update(num_local_experts=shape.num_experts, num_experts_per_tok=shape.experts_per_token)
        config.update(intermediate_size=shape.expert_ffn_size, sliding_window=None)
    if shape.family == "qwen3_moe":
        config.update(num_experts=shape.num_experts, num_experts_per_tok=shape.experts_per_token)
        config.update(moe_intermediate_size=shape.expert_ffn_size, norm_topk_prob=shape.renormalises)
        config.update(decoder_sparse_step=1, mlp_only_layers=[])
    return config
