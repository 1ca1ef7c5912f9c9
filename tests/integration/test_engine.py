"""The engine against transformers itself: the same tokens and probabilities, alone and in any batch."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_models import FAMILIES, VOCAB, make_model, reference, true_greedy, true_logprobs  # noqa: E402

from flagscale.inference.engine import Engine, EngineConfig, SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2)


def prompts_of(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(family: str) -> None:
    engine = Engine(make_model(family), config=EngineConfig(max_tokens_per_step=48, max_running=8, page_size=4))
    model = reference(family)
    prompts = prompts_of(6)
    together = engine.generate(prompts, GREEDY)
    alone = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        answer = one.completions[0]
        assert list(answer.token_ids) == true_greedy(model, prompt, 12)
        assert answer.token_ids == other.completions[0].token_ids
        table = true_logprobs(model, [*prompt, *answer.token_ids])
        told = [*one.prompt_logprobs, *answer.logprobs]
        assert len(told) == len(prompt) + 11
        for i, entry in enumerate(told):
            assert entry.logprob == pytest.approx(float(table[i, entry.token]), abs=2e-5)
            best = table[i].topk(len(entry.top))
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-5)


def test_bfloat16_stays_close_to_transformers() -> None:
    engine = Engine(make_model(dtype=torch.bfloat16))
    model = make_model(dtype=torch.bfloat16)
    for prompt in prompts_of(3, seed=4):
        (told,) = engine.generate([prompt], GREEDY)
        answer = told.completions[0]
        table = true_logprobs(model, [*prompt, *answer.token_ids])
        at = len(prompt) - 1
        for i, entry in enumerate(answer.logprobs):
            assert entry.logprob == pytest.approx(float(table[at + i, entry.token]), abs=0.15)


def test_a_prompt_shared_by_many_is_computed_once() -> None:
    engine = Engine(make_model(), config=EngineConfig(page_size=8))
    engine.generate([list(range(64))] * 16, SamplingParams(max_tokens=1, temperature=0))
    assert engine.metrics.num_computed_tokens == 64 + 15
    engine.generate([[*range(64), 7, 7]], SamplingParams(max_tokens=1))
    assert engine.metrics.num_computed_tokens == 64 + 15 + 2


def test_a_prefix_that_takes_several_steps_is_waited_for() -> None:
    engine = Engine(make_model(), config=EngineConfig(page_size=8, max_tokens_per_step=24, max_running=8))
    told = engine.generate([[*range(80), i] for i in range(6)], SamplingParams(max_tokens=2, temperature=0))
    assert engine.metrics.num_computed_tokens == 80 + 6 + 6
    alone = Engine(make_model(), config=EngineConfig(prefix_caching=False))
    for i, one in enumerate(told):
        (true,) = alone.generate([[*range(80), i]], SamplingParams(max_tokens=2, temperature=0))
        assert one.completions[0].token_ids == true.completions[0].token_ids


def test_samples_share_their_prompt_and_differ_in_their_tokens() -> None:
    engine = Engine(make_model(), config=EngineConfig(page_size=8))
    (told,) = engine.generate([list(range(45))], SamplingParams(n=8, max_tokens=6, seed=1, temperature=1.5))
    assert engine.metrics.num_computed_tokens == 45 + 8 * 5
    answers = [each.token_ids for each in told.completions]
    assert len(set(answers)) > 1
    singles = [
        Engine(make_model()).generate([list(range(45))], SamplingParams(n=n, max_tokens=6, seed=1, temperature=1.5))[0]
        for n in (1, 3)
    ]
    assert singles[0].completions[0].token_ids == answers[0]
    assert [each.token_ids for each in singles[1].completions] == answers[:3]


def test_a_turn_of_a_conversation_finds_the_one_before() -> None:
    engine = Engine(make_model(), config=EngineConfig(page_size=4))
    (first,) = engine.generate([list(range(20))], SamplingParams(max_tokens=9, temperature=0))
    (second,) = engine.generate([[*range(20), *first.completions[0].token_ids, 5, 5]], SamplingParams(max_tokens=1))
    assert second.num_cached_tokens == 28


def test_shortage_preempts_and_everyone_is_served() -> None:
    config = EngineConfig(kv_cache_bytes=14 * 4 * 768, page_size=4, max_running=8)
    engine = Engine(make_model(), config=config)
    prompts = prompts_of(8, seed=3, longest=12)
    params = SamplingParams(max_tokens=30, temperature=0)
    told = engine.generate(prompts, params)
    assert engine.metrics.num_preemptions > 0
    roomy = Engine(make_model()).generate(prompts, params)
    assert [one.completions[0].token_ids for one in told] == [one.completions[0].token_ids for one in roomy]


def test_the_cache_keeps_its_budget() -> None:
    budget = 100_000
    engine = Engine(make_model(), config=EngineConfig(kv_cache_bytes=budget, page_size=4, max_running=16))
    engine.generate(prompts_of(30, seed=5), SamplingParams(max_tokens=20, n=2))
    assert engine._runner.cache is not None
    assert 0.5 * budget < engine._runner.cache.num_bytes <= budget
    assert engine.metrics.num_pages_used == 0
