"""What a request asks of its tokens, checked whole before anything runs.

The order in which the settings act is part of their meaning: penalties and bias change the model's logits, temperature
divides them, then top-k, top-p and min-p cut, each on what the one before left over.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flagscale.errors import ConfigError, Fault, UserError

MAX_TOP_LOGPROBS = 1024
LogprobsOf = Literal["raw", "sampled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Raises:
        ConfigError: values that mean nothing, all of them at once.
    """

    max_tokens: int | None = None
    """tokens to generate at most; None: as many as the model's length allows"""
    min_tokens: int = 0
    """no end-of-text or stop token before so many tokens"""
    n: int = 1
    """samples of the same prompt, which is computed once"""
    temperature: float = 1.0
    """0: always the most probable token"""
    top_k: int = 0
    """keep the k largest logits and what equals the k-th; 0: all"""
    top_p: float = 1.0
    """keep the largest, and what equals the smallest of them, until they hold this much probability"""
    min_p: float = 0.0
    """keep what has at least this share of the largest probability"""
    repetition_penalty: float = 1.0
    """divides the positive and multiplies the negative logits of tokens in the prompt or the output"""
    presence_penalty: float = 0.0
    """taken from the logit of every token in the output"""
    frequency_penalty: float = 0.0
    """taken from the logit of a token once for each time it is in the output"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token id to what is added to its logit; -inf forbids it"""
    seed: int | None = None
    """the same request with the same seed gives the same tokens, whatever else runs"""
    stop: tuple[str, ...] = ()
    """texts that end the output where they first appear"""
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    """leave the text that ended the output in it"""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities; k: of the chosen token and of the k most probable ones"""
    logprobs_of: LogprobsOf = "raw"
    """raw: of the model's own distribution; sampled: of the one that was drawn from, after all of the above"""
    prompt_logprobs: int | None = None
    """the same for each token of the prompt after its first, always raw"""

    def __post_init__(self) -> None:
        if faults := list(_find_faults(self)):
            raise ConfigError(faults)


def _find_faults(params: SamplingParams) -> Iterator[Fault]:
    bounds = {
        "max_tokens": (1, math.inf), "min_tokens": (0, math.inf), "n": (1, math.inf), "temperature": (0, 1e6),
        "top_k": (0, math.inf), "min_p": (0, 1), "top_p": (0, 1), "presence_penalty": (-1e6, 1e6),
        "frequency_penalty": (-1e6, 1e6), "repetition_penalty": (0, 1e6), "seed": (-(2**63), 2**63 - 1),
        "logprobs": (0, MAX_TOP_LOGPROBS), "prompt_logprobs": (0, MAX_TOP_LOGPROBS),
    }  # fmt: skip
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"from {low:g} to {high:g}"
            yield Fault(f"sampling.{name}", f"{value!r} is out of range", expected)
    for name in ("top_p", "repetition_penalty"):
        if getattr(params, name) == 0:
            yield Fault(f"sampling.{name}", "0 leaves nothing to choose from", "more than 0")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        message = f"{params.min_tokens} is more than max_tokens, {params.max_tokens}"
        yield Fault("sampling.min_tokens", message)
    if isinstance(params.stop, str):
        yield Fault("sampling.stop", f"{params.stop!r} is one text", "a tuple of texts")
    elif "" in params.stop:
        yield Fault("sampling.stop", "an empty text stops nothing", "texts of at least one character")
    if params.logprobs_of not in ("raw", "sampled"):
        yield Fault("sampling.logprobs_of", f"{params.logprobs_of!r} names no distribution", "raw or sampled")
    for token, bias in params.logit_bias.items():
        if math.isnan(bias) or bias == math.inf:
            yield Fault(f"sampling.logit_bias.{token}", f"{bias} is no bias", "a finite number, or -inf to forbid")


def check_tokens_exist(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        UserError: a setting names a token that the model does not have.
    """
    named = {"logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
    for name, tokens in named.items():
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(f"sampling.{name}: the model has no token {wrong}; expected 0 to {vocab_size - 1}")
