"""Random LoRA adapters for the tiny models, and what PEFT itself says of them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from engine_models import make_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapted(family: str, seed: int, **settings: Any) -> Any:
    """A model under PEFT with an adapter that changes its answers a lot."""
    import peft

    chosen = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), **settings}
    with warnings.catch_warnings():
        # PEFT asks transformers for names that are on their way out.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(make_model(family), peft.LoraConfig(**chosen)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.3, generator=generator)
    return adapted


def save_adapter(folder: Path, family: str = "qwen3", seed: int = 1, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapted(family, seed, **settings).save_pretrained(folder)
    return folder


def make_tensors(
    seed: int = 1, size: float = 0.3, projection: str = "q_proj", shape: tuple[int, int] = (64, 32)
) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 for a projection in the first layer, by default of the tiny Qwen3's queries."""
    generator = torch.Generator().manual_seed(seed)
    name = f"base_model.model.model.layers.0.self_attn.{projection}"
    return {
        f"{name}.lora_A.weight": torch.randn(2, shape[1], generator=generator) * size,
        f"{name}.lora_B.weight": torch.randn(shape[0], 2, generator=generator) * size,
    }
