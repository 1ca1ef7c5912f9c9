"""How a state is shown to people."""

from pathlib import Path

import pytest

from flagscale.cli import list_runs, logs, rerun, status, stop
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.monitor.progress import Iteration
from flagscale.runner.monitor.state import HostState, RankState, RunState, State, encode_state

RUN = RunRef("20260101T000000-abcd", Path("/exp"), Path("/exp/logs"), "train", "small", ("host_0_localhost",))


def make_state(state: State = "running", ranks: tuple[RankState, ...] = (), **fields: object) -> RunState:
    host = HostState("host_0_localhost", state, 10, 9, 1.5, 100.0, None, None, None, 0)
    values: dict[str, object] = {"exit_code": None, "reason": None, "started": 100.0, "ended": None, "progress": None}
    return RunState(run=RUN, state=state, hosts=(host,), ranks=ranks, **{**values, **fields})  # type: ignore[arg-type]


def make_ranks(num_ranks: int, failed: int | None = None) -> tuple[RankState, ...]:
    return tuple(
        RankState(rank, "host_0_localhost", rank, "failed", 5, 3, None, True)
        if rank == failed
        else RankState(rank, "host_0_localhost", rank, "ended", 5, None, "SIGTERM")
        for rank in range(num_ranks)
    )


def test_what_is_known_is_shown_and_what_is_not_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    status.print_state(make_state(progress=Iteration(3, 10, lm_loss=2.0)), False)
    out = capsys.readouterr().out
    assert "progress  iteration 3/10 · loss 2.0000" in out
    assert "state     running\n" in out
    assert "why" not in out
    assert "ranks" not in out
    status.print_state(make_state("failed", make_ranks(2, 1), exit_code=3, reason="rank 1 died", ended=160.0), False)
    out = capsys.readouterr().out
    assert "state     failed, exit code 3\n" in out
    assert "why       rank 1 died\n" in out
    assert "took 1:00" in out
    assert "ranks     1 ended, 1 failed\n" in out
    assert "failed first" in out


def test_of_many_ranks_only_the_unusual_are_listed_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state("failed", make_ranks(512, 300))
    status.print_state(state, False)
    out = capsys.readouterr().out
    assert "511 ended, 1 failed" in out
    assert len(out.splitlines()) < 15
    assert "failed first" in out
    status.print_state(state, True)
    assert len(capsys.readouterr().out.splitlines()) > 512


def test_only_what_runs_has_time_left() -> None:
    progress = Iteration(3, 10, elapsed_ms=1000.0, lm_loss=2.0)
    assert (
        status.format_iteration(make_state(progress=progress)) == "iteration 3/10 · loss 2.0000 · 1000 ms · 0:07 left"
    )
    assert status.format_iteration(make_state("stopped", progress=progress)) == "iteration 3/10 · loss 2.0000 · 1000 ms"


def test_times_that_are_not_known_are_dashes() -> None:
    state = make_state("never_started", started=None)
    assert (status.format_time(None), status.format_took(state), status.format_iteration(state)) == ("-", "-", "-")
    assert status.format_took(make_state("lost", started=100.0)) == "-"


def test_the_keys_of_the_json_are_kept() -> None:
    encoded = encode_state(make_state(ranks=make_ranks(1)))
    assert {
        *("run_id", "state", "exit_code", "reason", "started", "ended", "num_leftovers", "task", "exp_name"),
        *("exp_dir", "log_dir", "folder", "outputs", "hosts", "ranks", "progress"),
    } <= set(encoded)
    assert set(encoded["hosts"][0]) >= {"label", "state", "agent_pid", "guard_pid", "heartbeat_age_s", "exit_code"}
    assert set(encoded["ranks"][0]) >= {"rank", "host", "local_rank", "state", "pid", "exit_code", "signal"}
    assert (encoded["folder"], encoded["outputs"]) == (
        "/exp/runs/20260101T000000-abcd",
        ["/exp/logs/host_0_localhost.output"],
    )


@pytest.mark.parametrize("verb", [list_runs, logs, rerun, status, stop])
def test_each_verb_has_a_summary_and_help(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.SUMMARY  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as caught:
        verb.main(["--help"])  # type: ignore[attr-defined]
    assert caught.value.code == 0
    assert "usage: flagscale " in capsys.readouterr().out


def test_a_count_below_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        logs.main(["-n", "-3"])
    assert caught.value.code == 2
    assert "expected 0 or more" in capsys.readouterr().err
