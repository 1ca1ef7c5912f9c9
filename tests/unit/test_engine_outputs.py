"""Deltas add up to the whole; numbers of an engine are what they say."""

from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.metrics import EngineMetrics, Meter
from flagscale.inference.engine.outputs import Completion, Delta, OutputSum, TokenLogprob
from flagscale.inference.engine.pages import PagePool
from flagscale.inference.engine.scheduler import Scheduler


def test_deltas_of_several_samples_add_up() -> None:
    total = OutputSum("id", [1, 2, 3], 2)
    prompt = (TokenLogprob(2, -0.5), TokenLogprob(3, -1.5))
    total.add(Delta("id", 1, (7,), "", 0, (TokenLogprob(7, -1.0),), num_cached_tokens=9))
    total.add(Delta("id", 0, (5,), "a", 0, num_cached_tokens=2, prompt_logprobs=prompt))
    total.add(Delta("id", 0, (6,), "b", "new", finish_reason="length"))
    assert not total.is_complete
    total.add(Delta("id", 1, (), "c", "new", finish_reason="abort"))
    assert total.is_complete
    whole = total.total()
    assert (whole.request_id, whole.prompt_token_ids, whole.num_cached_tokens) == ("id", (1, 2, 3), 2)
    assert whole.prompt_logprobs == prompt
    assert whole.completions == (
        Completion(0, (5, 6), "ab", (), "length", None, ((0, 0), (1, "new"))),
        Completion(1, (7,), "c", (TokenLogprob(7, -1.0),), "abort", None, ((0, 0),)),
    )


def test_an_engine_that_did_nothing_has_no_rates() -> None:
    pool = PagePool(8)
    metrics = Meter().read(Scheduler(EngineConfig(), pool), pool)
    assert isinstance(metrics, EngineMetrics)
    assert (metrics.num_pages, metrics.num_pages_used, metrics.num_pages_idle) == (8, 0, 0)
    assert (metrics.output_tokens_per_s, metrics.prefix_hit_share) == (0.0, 0.0)


def test_a_meter_counts_steps_that_fail_too() -> None:
    meter = Meter()
    for error in (None, ValueError):
        try:
            with meter.step():
                if error:
                    raise error
        except ValueError:
            pass
    assert meter.num_steps == 2
    assert meter.busy_s > 0
