"""Random load in miniature: requests, aborts, adapters, updates, sleeps; memory stays, answers are exact."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_load import Load, resident_bytes  # noqa: E402

SLACK_BYTES = 24 * 2**20
"""what the interpreter and its allocator may keep"""


def run(family: str, seed: int, num_requests: int) -> Load:
    """A third of the load warms up; the rest must not grow the process."""
    load = Load(family, seed)
    load.run(num_requests // 3)
    before = resident_bytes()
    load.run(num_requests - num_requests // 3)
    assert resident_bytes() - before < SLACK_BYTES
    load.check_end(num_exact=8)
    return load


def test_a_short_random_load_leaves_nothing_behind() -> None:
    load = run("qwen3", 0, 200)
    metrics = load.engine.metrics
    assert metrics.num_preemptions > 0
    assert metrics.prefix_hit_share > 0
    assert min(load.counts.values()) > 0
    assert set(load.counts) >= {"abort", "replace", "update", "sleep", "wrong"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "mixtral", "deepseek_v3"])
def test_a_long_random_load_leaves_nothing_behind(family: str) -> None:
    load = run(family, 1, 1000)
    assert load.engine.metrics.num_preemptions > 10
    assert len(load.counts) == 9
    assert min(load.counts.values()) > 5
