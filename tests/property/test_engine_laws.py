"""Whatever arrives, in whatever order, under whatever shortage: the same answers, and every page accounted for."""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_adapters import make_tensors  # noqa: E402
from engine_load import check_books  # noqa: E402
from engine_models import VOCAB, make_model  # noqa: E402

from flagscale.inference.engine import Engine, EngineConfig, OutputSum, SamplingParams  # noqa: E402
from flagscale.inference.engine.attention import Span, plan_groups  # noqa: E402
from flagscale.inference.engine.text import TextStream  # noqa: E402

PAGE = 4
TOKEN_BYTES = (2 + 1) * 2 * (16 + 16) * 4
"""of the tiny Qwen3: two layers and the scratch of one, two heads, keys and values of 16 floats"""
LAWS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the step before which it is aborted, if it is."""

    at: int
    prompt: tuple[int, ...]
    params: SamplingParams
    abort_at: int | None
    adapter: str | None


def arrivals() -> st.SearchStrategy[list[Arrival]]:
    shared = st.sampled_from([(), tuple(range(8)), tuple(range(13))])
    prompt = st.tuples(shared, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)).map(
        lambda p: (*p[0], *p[1])
    )
    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 10),
        n=st.sampled_from([1, 1, 1, 3]),
        temperature=st.sampled_from([0.0, 1.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 2**40),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    abort_at = st.one_of(st.none(), st.none(), st.integers(0, 20))
    adapter = st.sampled_from([None, None, "a", "b"])
    return st.lists(st.builds(Arrival, st.integers(0, 12), prompt, params, abort_at, adapter), min_size=1, max_size=10)


def load_adapters(engine: Engine) -> None:
    for seed, name in enumerate("ab"):
        engine.load_adapter(name, make_tensors(seed, size=1.0), {"r": 2, "lora_alpha": 2})


def play(engine: Engine, script: list[Arrival]) -> dict[int, OutputSum]:
    sums: dict[int, OutputSum] = {}
    step = 0
    while engine.has_work or step <= max(each.at for each in script):
        for i, each in enumerate(script):
            if each.at == step:
                engine.add_request(each.prompt, each.params, str(i), each.adapter)
                sums[i] = OutputSum(str(i), each.prompt, each.params.n)
            if each.abort_at == step:
                for delta in engine.abort(str(i)):
                    sums[i].add(delta)
        for delta in engine.step():
            sums[int(delta.request_id)].add(delta)
        check_books(engine)
        step += 1
        assert step < 2000
    return sums


@settings(LAWS, max_examples=40)
@given(arrivals(), st.integers(11, 60), st.integers(1, 6), st.integers(6, 40), st.booleans())
def test_every_answer_is_what_it_would_be_alone(
    script: list[Arrival], num_pages: int, max_running: int, max_tokens: int, caching: bool
) -> None:
    config = EngineConfig(
        kv_cache_bytes=(num_pages + 1) * PAGE * TOKEN_BYTES, page_size=PAGE, max_running=max_running,
        max_tokens_per_step=max_tokens, max_prompt_logit_rows=7, prefix_caching=caching,
    )  # fmt: skip
    engine = Engine(make_model(), config=config)
    assert engine.metrics.num_pages == num_pages
    load_adapters(engine)
    sums = play(engine, script)
    assert engine.unfinished == ()
    assert engine._texts == {}
    assert engine.metrics.num_pages_used == 0
    lone = Engine(make_model(), config=EngineConfig(page_size=64, prefix_caching=False, max_tokens_per_step=2048))
    load_adapters(lone)
    for i, each in enumerate(script):
        assert sums[i].is_complete
        told, (alone,) = sums[i].total(), lone.generate([each.prompt], each.params, each.adapter)
        for mine, true in zip(told.completions, alone.completions, strict=True):
            if mine.finish_reason != "abort":
                assert mine.token_ids == true.token_ids
                assert mine.finish_reason == true.finish_reason
            assert true.token_ids[: len(mine.token_ids)] == mine.token_ids
            for entry, exact in zip(mine.logprobs, true.logprobs, strict=False):
                assert entry.logprob == pytest.approx(exact.logprob, abs=1e-4)
        if told.completions[0].finish_reason != "abort":
            close = [entry.logprob for entry in alone.prompt_logprobs]
            assert [entry.logprob for entry in told.prompt_logprobs] == pytest.approx(close, abs=1e-4)


@LAWS
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=30), st.integers(25, 200))
def test_groups_hold_every_span_once_and_fit_the_scratch(sizes: list[tuple[int, int]], max_pages: int) -> None:
    spans = [
        Span(i, start, count, tuple(range(7, 7 + 2 * -(-(start + count) // 16), 2)))
        for i, (start, count) in enumerate(sizes)
    ]
    groups = plan_groups(spans, max_pages, 16)
    assert sorted(span.row for group in groups for span in group) == list(range(len(spans)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(span.pages) for span in group) <= max_pages


class Bytes:
    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return bytes(token_ids).decode(errors="replace")


@LAWS
@given(st.text(), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_of_text_add_up_and_stop_where_the_whole_would(text: str, stops: list[str], data: st.DataObject) -> None:
    text = text + data.draw(st.text("ab€", max_size=8))
    stream, told = TextStream(Bytes(), tuple(stops)), []
    for token in text.encode():
        told.append(stream.add([token]))
        if stream.stop_match is not None:
            break
    told.append(stream.flush())
    ends = [text.find(stop) for stop in stops if stop in text]
    # With several stop texts, one that is complete earlier may hide one that began before it.
    if len(stops) <= 1:
        assert "".join(told) == (text[: min(ends)] if ends else text)
    assert (stream.stop_match is not None) == bool(ends)
    assert text.startswith("".join(told))
