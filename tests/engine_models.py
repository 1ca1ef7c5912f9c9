"""Tiny random models, one for each shape of network that the engine is held to, and what transformers says of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

VOCAB = 128
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "llama": ("LlamaConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", {**EXPERTS, **LATENT}),
    "sliding": (
        "Qwen3Config",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}
FAMILIES = tuple(SETTINGS)


def make_model(family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A new model, the same for the same arguments."""
    import transformers

    name, settings = SETTINGS[family]
    config = getattr(transformers, name)(**{**SMALL, **settings, **changes})
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@lru_cache
def reference(family: str = "qwen3", seed: int = 0) -> Any:
    """A model that stays with transformers' own attention."""
    return make_model(family, seed)


@torch.inference_mode()
def true_logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after each position [tokens, vocabulary], by one plain run of the model."""
    logits = model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def true_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers generates, greedily."""
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
