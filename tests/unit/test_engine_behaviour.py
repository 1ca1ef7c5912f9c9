"""What an engine does at its edges: ends of text, refusals, failures, sleep, and the asynchronous shell."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_models import make_model  # noqa: E402

from flagscale.errors import FlagScaleError, UserError  # noqa: E402
from flagscale.inference.engine import AsyncEngine, Delta, Engine, EngineConfig, SamplingParams  # noqa: E402

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GREEDY = SamplingParams(temperature=0, max_tokens=10)


class Letters:
    """A tokenizer whose tokens are the first letters of Unicode."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(chr(token + 0x100) for token in token_ids)


def make_engine(**sizes: Any) -> Engine:
    return Engine(make_model(), Letters(), EngineConfig(page_size=4, seed=3, **sizes))


def only(engine: Engine, params: SamplingParams, prompt: Any = None) -> Any:
    (told,) = engine.generate([PROMPT if prompt is None else prompt], params)
    return told.completions[0]


def test_an_end_token_ends_the_text_and_is_told() -> None:
    engine = make_engine()
    tokens = only(engine, GREEDY).token_ids
    ended = only(engine, SamplingParams(temperature=0, max_tokens=10, stop_token_ids=(tokens[4],)))
    at = tokens.index(tokens[4]) + 1
    assert (ended.token_ids, ended.finish_reason, ended.stop_match) == (tokens[:at], "stop", tokens[4])
    assert ended.text == Letters().decode(list(tokens[: at - 1]))
    with_it = only(engine, SamplingParams(temperature=0, max_tokens=10, stop_token_ids=(tokens[4],), include_stop=True))
    assert with_it.text == Letters().decode(list(tokens[:at]))


def test_the_models_own_end_token_ends_unless_ignored_or_too_early() -> None:
    tokens = only(make_engine(), GREEDY).token_ids
    model = make_model()
    model.generation_config.eos_token_id = [tokens[2]]
    engine = Engine(model)
    assert only(engine, GREEDY).finish_reason == "stop"
    assert only(engine, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)).token_ids == tokens
    late = only(engine, SamplingParams(temperature=0, max_tokens=10, min_tokens=6))
    assert len(late.token_ids) >= 6
    assert tokens[2] not in late.token_ids[:6]


def test_a_stop_text_ends_the_text() -> None:
    engine = make_engine()
    whole = only(engine, GREEDY)
    assert whole.finish_reason == "length"
    stop = whole.text[3:5]
    ended = only(engine, SamplingParams(temperature=0, max_tokens=10, stop=("never", stop)))
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert (ended.finish_reason, ended.stop_match) == ("stop", stop)


def test_a_text_is_a_prompt_where_there_is_a_tokenizer() -> None:
    engine = make_engine()
    assert only(engine, GREEDY, "abc") == only(engine, GREEDY, [97, 98, 99])
    with pytest.raises(UserError, match="this engine has no tokenizer; expected token ids"):
        Engine(make_model()).add_request("abc")


@pytest.mark.parametrize(
    ("prompt", "params", "told"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1, 128], {}, "the prompt has token 128; expected tokens from 0 to 127"),
        ([1] * 512, {}, "512 tokens of prompt and 1 of output do not fit: the engine holds 512 tokens"),
        ([1], {"max_tokens": 512}, "1 tokens of prompt and 512 of output do not fit"),
        ([1], {"stop_token_ids": (128,)}, "sampling.stop_token_ids: the model has no token 128; expected 0 to 127"),
        ([1], {"logit_bias": {-1: 1.0}}, "sampling.logit_bias: the model has no token -1"),
    ],
)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(prompt: list[int], params: Any, told: str) -> None:
    engine = make_engine()
    with pytest.raises(UserError, match=told):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_work
    assert engine.unfinished == ()


def test_a_prompt_that_cannot_be_answered_keeps_the_others_from_starting() -> None:
    engine = make_engine()
    with pytest.raises(UserError, match="no tokens"):
        engine.generate([PROMPT, []], GREEDY)
    with pytest.raises(UserError, match="1 sampling parameters for 2 prompts"):
        engine.generate([PROMPT, PROMPT], [GREEDY])
    assert engine.unfinished == ()


def test_an_id_belongs_to_one_unfinished_request() -> None:
    engine = make_engine()
    engine.add_request(PROMPT, GREEDY, "mine")
    with pytest.raises(UserError, match="`mine`: a request with this id is not finished yet"):
        engine.add_request(PROMPT, GREEDY, "mine")
    while engine.has_work:
        engine.step()
    engine.add_request(PROMPT, GREEDY, "mine")


def test_aborting_tells_the_end_of_every_sample_whenever_it_comes() -> None:
    for num_steps in (0, 1, 3):
        engine = make_engine(max_running=2)
        engine.add_request(PROMPT, SamplingParams(n=4, max_tokens=9), "mine")
        for _ in range(num_steps):
            engine.step()
        deltas = engine.abort("mine")
        assert sorted((delta.index, delta.finish_reason) for delta in deltas) == [(i, "abort") for i in range(4)]
        assert engine.abort("mine") == []
        assert not engine.has_work
        assert engine.metrics.num_pages_used == 0


def test_seeds_repeat_and_engines_with_a_seed_too() -> None:
    params = SamplingParams(max_tokens=8)
    assert only(make_engine(), params) == only(make_engine(), params)
    engine = make_engine()
    assert only(engine, params).token_ids != only(engine, params).token_ids
    fixed = SamplingParams(max_tokens=8, seed=11)
    assert only(engine, fixed) == only(make_engine(), fixed)


def test_a_step_that_fails_can_be_tried_again() -> None:
    engine = make_engine()
    true = only(make_engine(), GREEDY).token_ids
    engine.add_request(PROMPT, GREEDY)
    engine.add_request(PROMPT[:5], SamplingParams(max_tokens=3, n=2))
    told = engine.step()
    forward = engine._runner.forward

    def broken(*_: Any) -> Any:
        raise MemoryError("no room")

    engine._runner.forward = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        engine.step()
    assert engine.metrics.num_pages_used == 0
    engine._runner.forward = forward  # type: ignore[method-assign]
    while engine.has_work:
        told.extend(engine.step())
    assert tuple(token for delta in told if delta.request_id == "request-0" for token in delta.token_ids) == true


def test_weights_that_are_no_numbers_end_requests_with_an_error() -> None:
    model = make_model()
    engine = Engine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert only(engine, SamplingParams(n=2)).finish_reason == "error"
    assert engine.unfinished == ()


def test_asleep_it_holds_no_cache_and_awake_it_goes_on() -> None:
    engine = make_engine()
    true = only(make_engine(), GREEDY).token_ids
    engine.add_request(PROMPT, GREEDY)
    told = [*engine.step(), *engine.step()]
    engine.sleep()
    assert engine.is_asleep
    with pytest.raises(FlagScaleError, match="the engine is asleep"):
        engine.step()
    engine.wake()
    while engine.has_work:
        told.extend(engine.step())
    assert tuple(token for delta in told for token in delta.token_ids) == true


def test_a_budget_too_small_for_a_page_says_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"1000 bytes hold no page of 4 tokens; expected at least 6144"):
        make_engine(kv_cache_bytes=1000)


def test_a_model_of_another_kind_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"layers attend through transformers' attention interface"):
        Engine(transformers.AutoModelForCausalLM.from_config(config))
    scaled = make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="rope_type `dynamic` changes with the longest text in a batch"):
        Engine(scaled)


def test_metrics_count() -> None:
    engine = make_engine()
    assert engine.metrics.output_tokens_per_s == engine.metrics.prefix_hit_share == 0
    engine.generate([PROMPT, PROMPT], GREEDY)
    metrics = engine.metrics
    assert (metrics.num_requests, metrics.num_output_tokens) == (2, 20)
    assert metrics.num_steps == 10
    assert 0 < metrics.prefix_hit_share < 1
    assert metrics.output_tokens_per_s > 0
    assert metrics.num_pages_idle > 0


async def collect(stream: AsyncIterator[Delta]) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


def test_many_streams_at_once_give_what_each_gives_alone() -> None:
    async def run() -> list[list[int]]:
        async with AsyncEngine(make_engine()) as engine:
            return await asyncio.gather(*(collect(engine.generate(PROMPT[: i + 1], GREEDY)) for i in range(6)))

    told = asyncio.run(run())
    assert told == [list(only(make_engine(), GREEDY, PROMPT[: i + 1]).token_ids) for i in range(6)]


def test_a_stream_that_is_left_aborts_its_request() -> None:
    async def run() -> None:
        inner = make_engine()
        async with AsyncEngine(inner) as engine:
            stream = engine.generate(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()
            assert inner.unfinished == ()
            task = asyncio.create_task(collect(engine.generate(PROMPT, SamplingParams(max_tokens=300))))
            while not inner.unfinished:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await engine.metrics()).num_pages_used == 0
            assert inner.unfinished == ()

    asyncio.run(run())


def test_cancelling_again_does_not_cut_the_abort_off() -> None:
    async def run() -> None:
        inner, held = make_engine(), threading.Event()
        async with AsyncEngine(inner) as engine:
            task = asyncio.create_task(
                collect(engine.generate(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True)))
            )
            while not inner.unfinished:
                await asyncio.sleep(0)
            holding = asyncio.create_task(engine._call(held.wait))
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.01)
            held.set()
            await holding
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await engine.metrics()).num_pages_used == 0
            assert inner.unfinished == ()

    asyncio.run(run())


def test_a_wrong_request_is_refused_in_its_own_stream_only() -> None:
    async def run() -> list[int]:
        async with AsyncEngine(make_engine()) as engine:
            good = asyncio.create_task(collect(engine.generate(PROMPT, GREEDY, "same")))
            await asyncio.sleep(0)
            with pytest.raises(UserError):
                await collect(engine.generate([], GREEDY))
            with pytest.raises(UserError, match="not finished yet"):
                await collect(engine.generate(PROMPT, GREEDY, "same"))
            return await good

    assert len(asyncio.run(run())) == 10


def test_commands_happen_between_steps() -> None:
    async def run() -> list[int | str]:
        async with AsyncEngine(make_engine()) as engine:
            versions: list[int | str] = []
            async for delta in engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)):
                versions.append(delta.version)
                if len(versions) == 2:
                    await engine.sleep()
                    await engine.update_weights("next", make_model(seed=1).state_dict())
                    await engine.wake()
            return versions

    versions = asyncio.run(run())
    assert len(versions) == 30
    assert versions[0] == 0
    assert versions[-1] == "next"


def test_aborting_by_id_ends_the_stream() -> None:
    async def run() -> list[Delta]:
        async with AsyncEngine(make_engine()) as engine:
            told = []
            async for delta in engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), "mine"):
                told.append(delta)
                if len(told) == 1:
                    await engine.abort("mine")
            return told

    assert asyncio.run(run())[-1].finish_reason == "abort"


def test_a_failing_step_ends_every_stream_and_the_next_request_is_served() -> None:
    async def run() -> list[int]:
        inner = make_engine()
        forward = inner._runner.forward

        def broken(*_: Any) -> Any:
            raise MemoryError("no room")

        inner._runner.forward = broken  # type: ignore[method-assign]
        async with AsyncEngine(inner) as engine:
            ends = await asyncio.gather(*(collect(engine.generate(PROMPT)) for _ in range(2)), return_exceptions=True)
            assert [type(end) for end in ends] == [MemoryError] * 2
            inner._runner.forward = forward  # type: ignore[method-assign]
            return await collect(engine.generate(PROMPT, GREEDY))

    assert asyncio.run(run()) == list(only(make_engine(), GREEDY).token_ids)


def test_closing_ends_open_streams() -> None:
    async def run() -> None:
        async with AsyncEngine(make_engine()) as engine:
            stream = engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
            await anext(stream)
        with pytest.raises(FlagScaleError, match="closed before the request was finished"):
            async for _ in stream:
                pass

    asyncio.run(run())


def test_a_prompt_computed_again_halfway_is_told_once() -> None:
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    prompt = [*range(40)]
    (true,) = make_engine().generate([prompt], params)
    engine = make_engine(max_prompt_logit_rows=12)
    engine.add_request(prompt, params)
    assert [engine.step(), engine.step()] == [[], []]
    engine.update_weights("same", {})
    told = [delta for _ in range(5) for delta in engine.step()]
    assert len(told[0].prompt_logprobs) == 39
    for mine, other in zip(told[0].prompt_logprobs, true.prompt_logprobs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert told[1].prompt_logprobs == ()
