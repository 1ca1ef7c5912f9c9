"""The scaler: bounds, patience, and the mildest of the wishes."""

from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.plan.scaling import Scaling
from flagscale.serve.scaling import NUM_LOOKS, Scaler


def scaler(**changes: float) -> Scaler:
    fields = {"initial": 1, "lowest": 1, "highest": 4, "target": 2.0, "upscale_delay_s": 10, "downscale_delay_s": 60}
    return Scaler(Scaling(**{**fields, **changes}), wanted=1)  # type: ignore[arg-type]


def steady(it: Scaler, now: float, load: int) -> int:
    """A decision at a load that has lasted long enough to be the average."""
    it.looks.extend([load] * NUM_LOOKS)
    return it.decide(now, load)


def test_a_wish_for_more_has_to_last() -> None:
    it = scaler()
    assert [steady(it, now, 6) for now in (0, 5, 9.9, 10)] == [1, 1, 1, 3]


def test_a_burst_starts_nothing() -> None:
    it = scaler()
    rows = ((0, 8), (5, 8), (6, 1), (11, 8), (20, 8), (21, 8))
    assert [steady(it, now, load) for now, load in rows] == [1] * 5 + [4]


def test_a_single_look_is_averaged_with_those_before() -> None:
    it = scaler()
    assert [steady(it, 0, 8), it.decide(5, 0), steady(it, 10, 8)] == [1, 1, 4]


def test_the_mildest_of_the_wishes_is_carried_out() -> None:
    it = scaler()
    assert [steady(it, now, load) for now, load in ((0, 8), (5, 3), (10, 8))] == [1, 1, 2]
    it = scaler()
    it.wanted = 4
    assert [steady(it, now, load) for now, load in ((0, 0), (30, 5), (60, 0))] == [4, 4, 3]


def test_turning_round_starts_the_clock_anew() -> None:
    it = scaler()
    it.wanted = 2
    rows = ((0, 8), (9, 0), (12, 8), (21, 8), (22, 8))
    assert [steady(it, now, load) for now, load in rows] == [2, 2, 2, 2, 4]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000)), max_size=50), st.integers(1, 3), st.integers(3, 9))
def test_bounds_hold_and_a_change_is_never_sooner_than_its_delay(
    steps: list[tuple[float, int]], lowest: int, highest: int
) -> None:
    it = Scaler(Scaling(lowest, lowest, highest, 2.0, 10.0, 60.0), lowest)
    now, changed = 0.0, 0.0
    for wait, load in steps:
        now += wait
        before = it.wanted
        after = it.decide(now, load)
        assert lowest <= after <= highest
        if after != before:
            assert now - changed >= (10.0 if after > before else 60.0)
            changed = now


@given(st.integers(0, 1000))
def test_a_steady_load_is_met_in_the_end(load: int) -> None:
    it = scaler(highest=9)
    for now in range(0, 300, 10):
        it.decide(float(now), load)
    assert it.wanted == min(max(-(-load // 2), 1), 9)
