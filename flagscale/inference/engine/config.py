"""What an engine is given before it starts: sizes, and nothing that depends on a request.

All limits are hard. The memory for keys and values is taken once, at the start, and never grows; what does not fit
waits.
"""

from dataclasses import dataclass, fields
from typing import Literal

from flagscale.errors import ConfigError, Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine.

    Raises:
        ConfigError: a size is impossible, or two of them exclude each other.
    """

    kv_cache_bytes: int = 512 * 1024**2
    """memory for keys and values of all layers, the scratch space of one layer included"""
    page_size: int = 16
    """tokens in a page: what is shared between requests is always whole pages"""
    max_running: int = 64
    """samples that are computed at the same time; the others wait"""
    max_tokens_per_step: int = 512
    """tokens that go through the model in one step; longer prompts are cut into chunks"""
    max_prompt_logit_rows: int = 256
    """prompt positions whose logits are computed in one step; each costs a whole vocabulary of floats"""
    max_model_len: int | None = None
    """prompt and output together; None: what the model's configuration says"""
    prefix_caching: bool = True
    adapter_bytes: int = 256 * 1024**2
    """memory for all LoRA adapters that are loaded at the same time"""
    quantization: Literal["int8"] | None = None
    """int8: weights of linear layers, and what goes into them; None: as the model has them"""
    seed: int | None = None
    """requests without a seed of their own draw it from this one; None: from the system"""

    def __post_init__(self) -> None:
        faults = [
            Fault(f"engine.{field.name}", f"{value!r} is too small", "a whole number of at least 1")
            for field in fields(self)
            if field.name not in ("seed", "prefix_caching", "quantization")
            and (value := getattr(self, field.name)) is not None
            and value < 1
        ]
        if self.quantization not in (None, "int8"):
            faults.append(Fault("engine.quantization", f"`{self.quantization}`", "int8"))
        if self.max_running > self.max_tokens_per_step:
            message = f"{self.max_running} running samples do not fit a step of {self.max_tokens_per_step} tokens"
            faults.append(Fault("engine.max_running", message, "at most max_tokens_per_step"))
        if faults:
            raise ConfigError(faults)
