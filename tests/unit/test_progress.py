"""Reading iterations out of output, and what is computed of them."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.monitor.plot import smooth
from flagscale.runner.monitor.progress import (
    Iteration,
    estimate_eta_s,
    find_last_iteration,
    find_seq_length,
    find_setting,
    format_duration,
    format_progress,
    load_iterations,
    parse_iteration,
    split_segments,
)

LINE = (
    " [2026-11-20 12:00:00.123456] iteration        6/      10 | consumed samples:           48 | "
    "elapsed time per iteration (ms): 123.4 | throughput per GPU (TFLOP/s/GPU): 0.1 | "
    "learning rate: 1.000000E-04 | global batch size:     8 | lm loss: 6.234567E+00 | loss scale: 1.0 | "
    "grad norm: 1.234 | number of skipped iterations:   0 | number of nan iterations:   2 |"
)
EXPECTED = Iteration(6, 10, 123.4, 48, 8, 6.234567, 1e-4, 1.234, 0, 2)


@pytest.mark.parametrize("prefix", ["", "[default3]:", "host_1_b | [default0]:"])
def test_every_field_is_read_behind_any_prefix(prefix: str) -> None:
    assert parse_iteration(prefix + LINE) == EXPECTED


@pytest.mark.parametrize(
    "line",
    [
        "",
        "training ...",
        " validation loss at iteration 10 | lm loss value: 6.1E+00 | lm loss PPL: 4.5E+02 |",
        "  successfully saved checkpoint from iteration      10 to /tmp/checkpoints",
        "saving checkpoint at iteration      10",
    ],
)
def test_other_lines_tell_of_no_iteration(line: str) -> None:
    assert parse_iteration(line) is None


def test_fields_that_are_missing_or_odd_are_none() -> None:
    assert parse_iteration("iteration 1/ 2 | lm loss: oops | consumed samples: x |") == Iteration(1, 2)
    nan = parse_iteration("iteration 1/ 2 | lm loss: NAN |")
    assert nan is not None
    assert nan.lm_loss != nan.lm_loss


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.floats(1e-6, 1e6), st.floats(0.1, 1e7), st.integers(1, 10**5))
def test_what_was_printed_is_what_is_read(step: int, total: int, loss: float, elapsed: float, batch: int) -> None:
    line = f" [t] iteration {step:8d}/{total:8d} | elapsed time per iteration (ms): {elapsed:.1f} |"
    line += f" global batch size: {batch:5d} | lm loss: {loss:.6E} |"
    found = parse_iteration(line)
    assert found is not None
    assert (found.iteration, found.num_iterations, found.global_batch_size) == (step, total, batch)
    assert found.lm_loss == pytest.approx(loss, rel=1e-6)
    assert found.elapsed_ms == pytest.approx(elapsed, abs=0.051)


def test_throughput_and_time_left() -> None:
    items = [
        Iteration(step, 100, elapsed_ms=time, global_batch_size=8)
        for step, time in ((1, 9000.0), (2, 500.0), (3, 500.0))
    ]
    assert items[-1].tokens_per_s(64) == pytest.approx(1024.0)
    assert items[-1].tokens_per_s(None) is None
    assert estimate_eta_s(items) == pytest.approx(97 * 0.5)
    assert estimate_eta_s([Iteration(1, 2)]) is None
    assert format_progress(items, 64) == "iteration 3/100 · 500 ms · 1,024 tokens/s · 0:48 left"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (44.6, "0:45"), (723, "12:03"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_sequence_length_is_found_in_either_spelling() -> None:
    assert find_seq_length({"train": {"system": {}, "model": {"seq-length": 128}}}) == 128
    assert find_seq_length({"train": {"model": {"seq_length": 64}}}) == 64
    assert find_seq_length({"serve": {}}) is None
    assert find_setting({"a": 1, "b": {"c": {"train-iters": 5}}}, "train_iters") == ("b.c.train-iters", 5)


@given(st.lists(st.integers(1, 20)))
def test_segments_put_together_are_the_whole_and_each_one_rises(steps: list[int]) -> None:
    items = [Iteration(step, 20) for step in steps]
    segments = split_segments(items)
    assert [item for segment in segments for item in segment] == items
    for segment in segments:
        assert all(a.iteration < b.iteration for a, b in pairwise(segment))
    for before, after in pairwise(segments):
        assert after[0].iteration <= before[-1].iteration


@given(st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_smoothing_stays_within_what_it_smooths(values: list[float]) -> None:
    smoothed = smooth(values)
    assert smoothed[0] == pytest.approx(values[0])
    assert min(values) - 1e-6 <= min(smoothed)
    assert max(smoothed) <= max(values) + 1e-6
    assert smooth([2.5] * len(values)) == pytest.approx([2.5] * len(values))


def test_iterations_of_files(tmp_path: Path) -> None:
    empty, full = tmp_path / "a", tmp_path / "b"
    empty.write_text("no losses here\n")
    full.write_text(f"{LINE}\nnoise\n{LINE.replace('  6/', '  7/')}\n")
    first, size = len(LINE) + 1, full.stat().st_size
    assert (load_iterations(tmp_path / "missing"), load_iterations(empty)) == ([], [])
    assert [item.iteration for item in load_iterations(full)] == [6, 7]
    assert [item.iteration for item in load_iterations(full, start=first)] == [7]
    assert [item.iteration for item in load_iterations(full, end=first)] == [6]
    assert load_iterations(full, end=first - 1) == []
    before_last = find_last_iteration(full, end=size - first)
    assert before_last is not None
    assert before_last.iteration == 6
    last = find_last_iteration(full)
    assert last is not None
    assert last.iteration == 7
    assert find_last_iteration(full, start=full.stat().st_size) is None
    assert find_last_iteration(tmp_path / "missing") is None
