"""The engine on a GPU: what it promises on a CPU, there.

It needs torch, transformers, safetensors, peft and pytest, and nothing of this toolkit but its files:

    PYTHONPATH=.:tests python3 -m pytest -c /dev/null --noconftest tests/gpu/test_engine_cuda.py
"""

import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU that CUDA knows", allow_module_level=True)

from engine_adapters import make_adapted, make_tensors, save_adapter  # noqa: E402
from engine_models import FAMILIES, VOCAB, make_model, true_greedy, true_logprobs  # noqa: E402

from flagscale.errors import ConfigError, UserError  # noqa: E402
from flagscale.inference.engine import Engine, EngineConfig, OutputSum, SamplingParams  # noqa: E402
from flagscale.inference.engine.sampler import SampleRow, choose  # noqa: E402

GPU = torch.device("cuda", 0)
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2)
SETTINGS = (
    SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=5, temperature=1.4),
    SamplingParams(top_p=0.6, logprobs=4, logprobs_of="sampled"), SamplingParams(min_p=0.1, logprobs=2),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.4), SamplingParams(frequency_penalty=0.7),
    SamplingParams(logit_bias={3: 4.0, 5: -100.0}, temperature=0, logprobs=0, logprobs_of="sampled"),
)  # fmt: skip


def make_engine(family: str = "qwen3", seed: int = 0, dtype: Any = torch.float32, **sizes: Any) -> Engine:
    return Engine(make_model(family, seed, dtype).to(GPU), config=EngineConfig(**{"page_size": 4, **sizes}))


def prompts_of(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def run_unevenly(engine: Engine, asked: Sequence[tuple[list[int], SamplingParams, str | None]], seed: int) -> Any:
    """The requests' tokens, of which some arrive between steps; others arrive too and are taken back."""
    draw = random.Random(seed)
    waiting, sums, strangers = list(enumerate(asked)), {}, 0
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.5:
            i, (prompt, params, adapter) = waiting.pop(draw.randrange(len(waiting)))
            sums[f"{i}"] = OutputSum(f"{i}", prompt, params.n)
            engine.add_request(prompt, params, f"{i}", adapter)
        if draw.random() < 0.2 and waiting:
            strangers += 1
            engine.add_request(prompts_of(1, strangers)[0], SamplingParams(max_tokens=30), f"stranger-{strangers}")
        if draw.random() < 0.2:
            engine.abort(f"stranger-{draw.randint(0, strangers)}")
        for delta in engine.step():
            if delta.request_id in sums:
                sums[delta.request_id].add(delta)
    assert engine.metrics.num_pages_used == 0
    return [[each.token_ids for each in sums[f"{i}"].total().completions] for i in range(len(asked))]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(family: str) -> None:
    engine, model = make_engine(family, max_tokens_per_step=48, max_running=8), make_model(family).to(GPU)
    prompts = prompts_of(6)
    together = engine.generate(prompts, GREEDY)
    for prompt, one in zip(prompts, together, strict=True):
        answer = one.completions[0]
        assert list(answer.token_ids) == true_greedy(model, prompt, 12)
        assert answer.token_ids == engine.generate([prompt], GREEDY)[0].completions[0].token_ids
        table = true_logprobs(model, [*prompt, *answer.token_ids])
        told = [*one.prompt_logprobs, *answer.logprobs]
        assert len(told) == len(prompt) + 11
        for i, entry in enumerate(told):
            assert entry.logprob == pytest.approx(float(table[i, entry.token]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(
                table[i].topk(len(entry.top)).values.tolist(), abs=1e-4
            )


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "sliding"])
def test_bfloat16_stays_close_to_transformers_in_a_batch(family: str) -> None:
    engine, model = make_engine(family, dtype=torch.bfloat16), make_model(family, dtype=torch.bfloat16).to(GPU)
    prompts = prompts_of(8, seed=4)
    errors = []
    for prompt, one in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        answer = one.completions[0]
        table = true_logprobs(model, [*prompt, *answer.token_ids])[len(prompt) - 1 :]
        errors.extend(abs(each.logprob - float(table[i, each.token])) for i, each in enumerate(answer.logprobs))
    # A router's choice between experts may flip by rounding: most, not all, have to be close.
    close = sorted(errors)[int(len(errors) * (0.8 if "moe" in family else 1.0)) - 1]
    assert close < 0.15


@pytest.mark.parametrize("seed", range(4))
def test_arrivals_cancellations_and_neighbours_change_no_tokens(seed: int) -> None:
    engine = make_engine(kv_cache_bytes=400_000, max_running=6, max_tokens_per_step=24)
    asked = []
    for i, prompt in enumerate(prompts_of(10, seed)):
        settings = SETTINGS[i % len(SETTINGS)]
        kept = {name: getattr(settings, name) for name in SamplingParams.__slots__}
        asked.append((prompt, SamplingParams(**{**kept, "max_tokens": 14, "seed": i, "n": 1 + i % 3}), None))
    fresh = make_engine(prefix_caching=False)
    alone = [
        [each.token_ids for each in fresh.generate([prompt], params)[0].completions] for prompt, params, _ in asked
    ]
    assert run_unevenly(engine, asked, seed) == alone


def test_the_sampler_chooses_as_it_does_on_a_cpu() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 3000) * 3
    logits[7] = torch.nan
    logits[9, 5] = torch.inf
    rows = [SampleRow(SETTINGS[i % len(SETTINGS)], i, 0, [1, 2, 3], [3, 3, 4], (8,)) for i in range(64)]
    there, here = choose(logits.clone().to(GPU), rows), choose(logits, rows)
    assert [each.token for each in there] == [each.token for each in here]
    assert there[7].token is None
    assert there[9].token is None
    for mine, true in zip(there, here, strict=True):
        assert (mine.logprob is None) == (true.logprob is None)
        if mine.logprob and true.logprob:
            assert mine.logprob.logprob == pytest.approx(true.logprob.logprob, abs=1e-4)


def test_two_adapters_and_none_in_one_batch(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    engine, prompts = make_engine(), prompts_of(6, seed=2)
    for i, name in enumerate("ab"):
        engine.load_adapter(name, save_adapter(tmp_path / name, seed=i))
    models = {"a": make_adapted("qwen3", 0).to(GPU), "b": make_adapted("qwen3", 1).to(GPU), None: make_model().to(GPU)}
    names: list[str | None] = ["a", "b", None, "b", "a", None]
    told = run_unevenly(engine, [(p, GREEDY, name) for p, name in zip(prompts, names, strict=True)], 3)
    for prompt, name, (tokens,) in zip(prompts, names, told, strict=True):
        assert list(tokens) == true_greedy(models[name], prompt, 12)


def test_an_adapter_beyond_its_budget_is_refused() -> None:
    engine = make_engine(adapter_bytes=100)
    with pytest.raises(UserError, match="adapter_bytes"):
        engine.load_adapter("a", make_tensors(), {"r": 2, "lora_alpha": 4})


def test_new_weights_go_in_place_or_not_at_all() -> None:
    engine, fresh = make_engine(), make_engine(seed=1)
    prompt = list(range(20))
    old = engine.generate([prompt], GREEDY)[0].completions[0]
    places = {name: each.data_ptr() for name, each in engine.model.state_dict().items()}
    new = make_model(seed=1).state_dict()
    with pytest.raises(ConfigError, match="shape"):
        engine.update_weights(1, {**new, "model.norm.weight": torch.zeros(3)})
    assert engine.generate([prompt], GREEDY)[0].completions[0].token_ids == old.token_ids
    engine.update_weights(1, new)
    assert {name: each.data_ptr() for name, each in engine.model.state_dict().items()} == places
    told = engine.generate([prompt], GREEDY)[0].completions[0]
    assert told.token_ids == fresh.generate([prompt], GREEDY)[0].completions[0].token_ids != old.token_ids
    assert told.versions == ((0, 1),)


def test_sleep_gives_memory_back_and_requests_go_on_after_it() -> None:
    engine = make_engine(kv_cache_bytes=256 * 1024**2)
    true = engine.generate([list(range(30))], GREEDY)[0].completions[0].token_ids
    before = torch.cuda.memory_reserved(GPU)
    total = OutputSum("r", list(range(30)), 1)
    engine.add_request(list(range(30)), GREEDY, "r")
    for step in range(20):
        if step == 5:
            engine.sleep()
            assert before - torch.cuda.memory_reserved(GPU) > 200 * 1024**2
            engine.wake()
        for delta in engine.step():
            total.add(delta)
    assert total.total().completions[0].token_ids == true


def test_the_cache_keeps_its_budget_when_memory_is_short() -> None:
    budget = 100_000
    engine = make_engine(kv_cache_bytes=budget, max_running=16)
    cache = engine._runner.cache
    told = engine.generate(prompts_of(30, seed=5), SamplingParams(max_tokens=20, n=2, temperature=0))
    assert cache is not None
    assert 0.5 * budget < cache.num_bytes <= budget
    assert engine.metrics.num_preemptions > 0
    roomy = make_engine().generate(prompts_of(30, seed=5), SamplingParams(max_tokens=20, n=2, temperature=0))
    for one, other in zip(told, roomy, strict=True):
        assert [each.token_ids for each in one.completions] == [each.token_ids for each in other.completions]


def test_a_step_waits_for_the_device_only_to_read_its_tokens() -> None:
    engine = make_engine()
    for i, prompt in enumerate(prompts_of(8, seed=6)):
        engine.add_request(prompt, SamplingParams(max_tokens=20, temperature=i % 2, seed=i))
    for _ in range(5):
        engine.step()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(5):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{each.filename}:{each.lineno}" for each in told if "synchronizing" in str(each.message)]
    assert len(places) == 5, places
