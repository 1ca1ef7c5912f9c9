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
