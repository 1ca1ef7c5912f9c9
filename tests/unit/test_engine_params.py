"""Sizes and sampling parameters: every fault at once, in words."""

import math
from typing import Any

import pytest

from flagscale.errors import ConfigError
from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.sampling import SamplingParams


def faults(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    return [str(fault) for fault in caught.value.faults]


def test_the_defaults_are_right() -> None:
    assert SamplingParams().temperature == 1.0
    assert EngineConfig().page_size == 16


def test_all_faults_are_told_at_once() -> None:
    told = faults(temperature=-1, top_p=0, n=0, seed=2**64)
    assert [fault.split(":")[0] for fault in told] == [
        "sampling.n", "sampling.temperature", "sampling.seed", "sampling.top_p",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"temperature": -0.5}, "sampling.temperature: -0.5 is out of range; expected from 0 to 1e+06"),
        ({"temperature": math.nan}, "sampling.temperature: nan is out of range; expected from 0 to 1e+06"),
        ({"top_k": -1}, "sampling.top_k: -1 is out of range; expected at least 0"),
        ({"min_tokens": 3, "max_tokens": 2}, "sampling.min_tokens: 3 is more than max_tokens, 2"),
        ({"stop": "end"}, "sampling.stop: 'end' is one text; expected a tuple of texts"),
        ({"stop": ("",)}, "sampling.stop: an empty text stops nothing; expected texts of at least one character"),
        ({"logprobs_of": "cooked"}, "sampling.logprobs_of: 'cooked' names no distribution; expected raw or sampled"),
        (
            {"logit_bias": {5: math.inf}},
            "sampling.logit_bias.5: inf is no bias; expected a finite number, or -inf to forbid",
        ),
    ],
)
def test_a_fault_says_what_was_expected(values: dict[str, Any], told: str) -> None:
    assert faults(**values) == [told]


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"engine.page_size: 0 is too small; expected a whole number of at least 1"):
        EngineConfig(page_size=0)
    with pytest.raises(ConfigError, match=r"engine.max_running: 9 running samples do not fit a step of 8 tokens"):
        EngineConfig(max_running=9, max_tokens_per_step=8)
