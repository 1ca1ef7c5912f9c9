"""Sampling follows the law: counts against the exact distribution, for each setting."""

import math
from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from flagscale.inference.engine.sampler import SampleRow, choose, prompt_logprobs, uniform  # noqa: E402
from flagscale.inference.engine.sampling import SamplingParams  # noqa: E402

LOGITS = [2.0, 1.5, 1.5, 0.3, -0.2, -1.0, -1.1, -4.0, 0.9, 1.9]
PROMPT, OUTPUT = [0, 3], [1, 1, 8]
DRAWS = 20000


def expected(params: SamplingParams) -> list[float]:
    """The distribution written out plainly, from the definition of each setting."""
    logits = list(LOGITS)
    for token in {*PROMPT, *OUTPUT}:
        value = logits[token]
        logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token, count in Counter(OUTPUT).items():
        logits[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    weights = [math.exp(value / params.temperature) for value in logits]
    if params.top_k:
        kth = sorted(weights, reverse=True)[params.top_k - 1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    mass, least = 0.0, 0.0
    for weight in sorted(weights, reverse=True):
        if mass < params.top_p * sum(weights) - 1e-9:
            mass, least = mass + weight, weight
    weights = [weight if weight >= least else 0.0 for weight in weights]
    weights = [weight if weight >= params.min_p * max(weights) else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def rows(params: SamplingParams, count: int) -> list[SampleRow]:
    return [SampleRow(params, seed, 0, PROMPT, OUTPUT) for seed in range(count)]


def chi_square(counts: Counter[int], law: list[float]) -> float:
    """The statistic in standard deviations from its mean; tokens that the law forbids must not occur."""
    assert all(law[token] > 0 for token in counts)
    total, cells = sum(counts.values()), [share for share in law if share > 0]
    statistic = sum((counts[i] - total * share) ** 2 / (total * share) for i, share in enumerate(law) if share > 0)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom) if freedom else 0.0


@pytest.mark.parametrize(
    "values",
    [
        {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_k": 2}, {"top_p": 0.7}, {"top_p": 0.05},
        {"min_p": 0.3}, {"repetition_penalty": 1.6}, {"presence_penalty": 0.8}, {"frequency_penalty": 0.7},
        {"logit_bias": {7: 5.0, 0: -math.inf}}, {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
        {"repetition_penalty": 0.7, "presence_penalty": -0.5, "frequency_penalty": 0.2, "top_p": 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_counts_follow_the_distribution(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    chosen = choose(torch.tensor([LOGITS]).repeat(DRAWS, 1), rows(params, DRAWS))
    counts = Counter(choice.token for choice in chosen if choice.token is not None)
    assert sum(counts.values()) == DRAWS
    assert chi_square(counts, expected(params)) < 5


@pytest.mark.parametrize("values", [{"top_k": 4}, {"top_p": 0.6}, {"temperature": 0.5, "min_p": 0.2}], ids=str)
def test_sampled_logprobs_are_of_the_distribution_drawn_from(values: dict[str, Any]) -> None:
    params = SamplingParams(logprobs=2, logprobs_of="sampled", **values)
    law = expected(params)
    for choice in choose(torch.tensor([LOGITS]).repeat(50, 1), rows(params, 50)):
        assert choice.token is not None
        assert choice.logprob is not None
        assert choice.logprob.logprob == pytest.approx(math.log(law[choice.token]), abs=1e-5)
        assert [value for _, value in choice.logprob.top] == pytest.approx(
            [math.log(share) for share in sorted(law, reverse=True)[:2]], abs=1e-5
        )


def test_raw_logprobs_know_no_settings() -> None:
    params = SamplingParams(logprobs=1, temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias={5: 3.0})
    (choice,) = choose(torch.tensor([LOGITS]), rows(params, 1))
    assert choice.logprob is not None
    exact = torch.log_softmax(torch.tensor(LOGITS), -1)
    assert choice.logprob.logprob == pytest.approx(float(exact[choice.token]), abs=1e-6)
    assert choice.logprob.top == ((0, pytest.approx(float(exact[0]), abs=1e-6)),)


def test_temperature_zero_takes_the_largest_and_is_certain_of_it() -> None:
    params = SamplingParams(temperature=0, logprobs=0, logprobs_of="sampled", logit_bias={0: -1.0})
    (choice,) = choose(torch.tensor([LOGITS]), rows(params, 1))
    assert choice.token == 9
    assert choice.logprob is not None
    assert choice.logprob.logprob == 0.0


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_give_tokens(temperature: float) -> None:
    chosen = choose(torch.tensor([LOGITS]).repeat(50, 1), rows(SamplingParams(temperature=temperature), 50))
    assert all(choice.token is not None for choice in chosen)
    if temperature < 1:
        assert {choice.token for choice in chosen} == {0}


def test_each_row_goes_by_its_own_settings_whatever_else_is_there() -> None:
    settings = [
        SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(top_p=0.5, temperature=2.0),
        SamplingParams(min_p=0.5), SamplingParams(logit_bias={4: 50.0}), SamplingParams(frequency_penalty=1.5),
    ]  # fmt: skip
    torch.manual_seed(0)
    logits = torch.randn(len(settings), 500) * 3
    asked = [SampleRow(params, 7, i, [1, 2], [3, 3]) for i, params in enumerate(settings)]
    together = choose(logits.clone(), asked)
    alone = [choose(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(asked)]
    assert together == alone


def test_a_flat_nucleus_is_found_beyond_the_first_candidates() -> None:
    logits = torch.linspace(0, 0.01, 5000)[None].repeat(300, 1)
    params = SamplingParams(top_p=0.5, logprobs=0, logprobs_of="sampled")
    chosen = choose(logits, [SampleRow(params, seed, 0, [0], []) for seed in range(300)])
    assert min(choice.token or 0 for choice in chosen) >= 2485
    assert all(
        choice.logprob and choice.logprob.logprob == pytest.approx(math.log(1 / 2490), abs=0.02) for choice in chosen
    )


def test_ties_at_a_threshold_stay_in() -> None:
    chosen = choose(torch.zeros(400, 4), [SampleRow(SamplingParams(top_k=1), seed, 0, [0], []) for seed in range(400)])
    assert {choice.token for choice in chosen} == {0, 1, 2, 3}


def test_forbidden_tokens_do_not_come() -> None:
    chosen = choose(torch.tensor([LOGITS]), [SampleRow(SamplingParams(temperature=0), 0, 0, [0], [], forbidden=(0, 9))])
    assert chosen[0].token == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_spoil_their_own_row_only(value: float) -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    logits[0, 3] = value
    first, second = choose(logits, rows(SamplingParams(temperature=0, logprobs=1), 2))
    assert first.token is None
    assert second.token == 9 or second.token == 0


def test_forbidding_everything_leaves_no_token() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(len(LOGITS)), -math.inf))
    assert choose(torch.tensor([LOGITS]), rows(params, 1))[0].token is None


def test_prompt_logprobs_are_those_of_the_given_tokens() -> None:
    told = prompt_logprobs(torch.tensor([LOGITS, LOGITS]), [4, 0], 2)
    exact = torch.log_softmax(torch.tensor(LOGITS), -1)
    assert [entry.token for entry in told] == [4, 0]
    assert told[0].logprob == pytest.approx(float(exact[4]))
    assert [token for token, _ in told[1].top] == [0, 9]


def test_the_numbers_of_different_tokens_are_independent_and_uniform() -> None:
    numbers = [uniform(seed, index, at) for seed in range(20) for index in range(10) for at in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(int(number * 50) for number in numbers)
    assert chi_square(counts, [1 / 50] * 50) < 5
    assert uniform(-3, 0, 0) == uniform(-3, 0, 0)
