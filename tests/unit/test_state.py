"""Judging a run by its events: here by events written by hand, with watchers that are this test or nobody."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.cli.rerun import describe_git_change
from flagscale.errors import LaunchError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import folder, procs
from flagscale.runner.launch.files import write_all
from flagscale.runner.launch.folder import RunRef, ref_of
from flagscale.runner.launch.journal import load_events
from flagscale.runner.launch.record import load_record, load_records
from flagscale.runner.launch.startup import check_alive, describe_start
from flagscale.runner.monitor.state import encode_state, query_run
from flagscale.runner.plan.job import HostPlan, JobPlan, LaunchName, ProcessSpec

RUN_ID = "20260101T000000-abcd"
LABEL = "host_0_localhost"
VALUES: dict[LaunchName, str] = {"master_port": "1", "run_id": RUN_ID}


def small_plan(exp_dir: Path, num_ranks: int) -> JobPlan:
    host = HostPlan(Host("localhost", 2), 0, (ProcessSpec("main", ("true",), "/", num_ranks=num_ranks),))
    return JobPlan("train", "megatron", "small", str(exp_dir), str(exp_dir / "logs"), (host,))


def write_run(base: Path, events: list[dict[str, Any]], num_ranks: int = 2) -> RunRef:
    plan = small_plan(base / "exp", num_ranks)
    files = folder.list_files(plan, RUN_ID, VALUES, folder.describe_job(plan, RUN_ID, VALUES, {}, []), 1.0)
    write_all([file for file in files if base in file.path.parents], folder.list_folders(plan, RUN_ID))
    run = ref_of(plan, RUN_ID)
    lines = [json.dumps({"time": 100.0 + n, "host": LABEL, **event}) + "\n" for n, event in enumerate(events)]
    Path(run.load_spec(LABEL).events).write_text("".join(lines))
    return run


def agent_started(is_alive: bool, machine: str | None = None) -> dict[str, Any]:
    proc = procs.find_proc(os.getpid())
    assert proc
    return {
        "event": "agent_started",
        "pid": proc.pid,
        "start_time": proc.start_time if is_alive else proc.start_time - 1,
        "guard": proc.pid,
        "guard_start_time": None,
        "machine": machine or procs.name_machine(),
        "hostname": "h",
        "output_start": 0,
    }


def rank_started(rank: int, is_alive: bool = True) -> dict[str, Any]:
    proc = procs.find_proc(os.getpid())
    assert proc
    start_time = proc.start_time if is_alive else -2
    return {"event": "rank_started", "rank": rank, "local_rank": rank, "pid": proc.pid, "start_time": start_time}


UP = [{"event": "rank_up", "rank": 0}, {"event": "rank_up", "rank": 1}]
ENDED = {"event": "job_ended", "exit_code": 0, "first_rank": None, "source": None, "reason": None, "output_end": 0}
STOPPING = {"event": "stopping", "outcome": "stopped", "by": "stopped by someone"}

CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "nothing": ([], "never_started"),
    "alive": ([agent_started(True)], "starting"),
    "one rank up": ([agent_started(True), UP[0]], "starting"),
    "all up": ([agent_started(True), *UP], "running"),
    "asked to stop": ([agent_started(True), *UP, STOPPING], "stopping"),
    "ended well": ([agent_started(True), *UP, {**ENDED, "outcome": "succeeded"}], "succeeded"),
    "failed": ([agent_started(False), {**ENDED, "outcome": "failed"}], "failed"),
    "killed": ([agent_started(False), *UP], "lost"),
    "killed while stopping": ([agent_started(False), *UP, STOPPING], "lost"),
    "another machine, no heartbeat": ([agent_started(True, "elsewhere"), *UP], "lost"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_state_by_events_and_life(tmp_path: Path, case: str) -> None:
    events, expected = CASES[case]
    state = query_run(write_run(tmp_path, events))
    assert state.state == expected
    encoded = encode_state(state)
    assert json.loads(json.dumps(encoded)) == encoded
    assert encoded["state"] == expected


def test_a_heartbeat_speaks_for_another_machine(tmp_path: Path) -> None:
    run = write_run(tmp_path, [agent_started(True, "elsewhere"), *UP])
    beat = Path(run.load_spec(LABEL).heartbeat)
    beat.touch()
    assert query_run(run).state == "running"
    os.utime(beat, (1.0, 1.0))
    assert query_run(run).state == "lost"
    assert "another machine" in str(query_run(run).reason)


def test_ranks_are_judged_one_by_one(tmp_path: Path) -> None:
    events = [agent_started(True), rank_started(0), rank_started(1, is_alive=False), UP[0]]
    ranks = query_run(write_run(tmp_path, events, num_ranks=3)).ranks
    assert [rank.state for rank in ranks] == ["up", "gone", "waiting"]
    exits = [
        {"event": "rank_exited", "rank": 0, "exit_code": None, "signal": "SIGTERM", "first": False},
        {"event": "rank_exited", "rank": 1, "exit_code": 3, "signal": None, "first": True},
        {**ENDED, "outcome": "failed", "exit_code": 1, "reason": "rank 1 ended with exit code 3"},
    ]
    state = query_run(write_run(tmp_path, [*events, *exits], num_ranks=3))
    assert [(rank.state, rank.exit_code) for rank in state.ranks] == [("ended", None), ("failed", 3), ("ended", None)]
    assert [rank.is_first_failure for rank in state.ranks] == [False, True, False]
    assert (state.exit_code, state.reason) == (1, "rank 1 ended with exit code 3")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_journal_cut_anywhere_is_read_and_never_says_more_than_it_holds(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as base:
        run = write_run(Path(base), [agent_started(False), *UP, {**ENDED, "outcome": "succeeded"}])
        path = Path(run.load_spec(LABEL).events)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        state = query_run(run).state
        assert state in {"never_started", "lost", "succeeded"}
        assert (state == "succeeded") is (cut >= len(whole) - 1)


def test_last_words_written_while_we_look_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, [agent_started(False), *UP])
    path = Path(run.load_spec(LABEL).events)
    real = procs.is_same_alive

    def end_meanwhile(pid: int, start_time: int) -> bool:
        with path.open("a") as file:
            file.write(json.dumps({"time": 1.0, "host": LABEL, **ENDED, "outcome": "succeeded"}) + "\n")
        return real(pid, start_time)

    monkeypatch.setattr(procs, "is_same_alive", end_meanwhile)
    assert query_run(run).state == "succeeded"


def test_what_a_record_says_of_its_output(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{**agent_started(True), "output_start": 7}])
    record = load_record(run, LABEL)
    assert (record.output, record.output_start) == (run.output_path(LABEL), 7)
    assert load_record(write_run(tmp_path / "other", []), LABEL).output_start == 0


def test_a_failed_start_quotes_what_failed_first(tmp_path: Path) -> None:
    log = tmp_path / "stderr.log"
    log.write_text("".join(f"line {number}\n" for number in range(30)))
    failed = {**ENDED, "outcome": "failed", "exit_code": 9, "reason": "rank 1 died", "source": str(log)}
    run = write_run(tmp_path, [agent_started(False), failed])
    for foreground, code in ((True, 9), (False, 1)):
        with pytest.raises(LaunchError) as caught:
            check_alive(run, load_records(run), foreground)
        head, source, *lines = str(caught.value).splitlines()
        assert head == f"run {RUN_ID} did not start: rank 1 died"
        assert source == f"last lines of {log}:"
        assert lines == [f"  line {number}" for number in range(10, 30)]
        assert caught.value.exit_code == code


def test_a_start_whose_watchers_are_gone_quotes_its_own_part_of_the_output(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{**agent_started(False), "output_start": 6}])
    run.output_path(LABEL).write_text("older\nmine\n")
    with pytest.raises(LaunchError, match="the agent and the guard of host_0_localhost were killed") as caught:
        check_alive(run, load_records(run), True)
    assert str(caught.value).splitlines()[2:] == ["  mine"]
    assert caught.value.exit_code == 1
    check_alive(run, load_records(write_run(tmp_path, [agent_started(True)])), True)
    check_alive(run, load_records(write_run(tmp_path, [agent_started(False), {**ENDED, "outcome": "succeeded"}])), True)


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_text('{"event": "a"}\nnonsense\n[1]\n{"b": 1}\n{"event": "c"}')
    assert [event["event"] for event in load_events(path)] == ["a", "c"]
    assert load_events(tmp_path / "missing") == ()


def test_how_far_a_start_is(tmp_path: Path) -> None:
    def describe(events: list[dict[str, Any]], num_ranks: int) -> tuple[str, bool]:
        run = write_run(tmp_path, events, num_ranks)
        return describe_start((load_record(run, LABEL),))

    assert describe([agent_started(True), rank_started(0)], 2) == ("0 of 2 ranks up, 1 started", False)
    assert describe([agent_started(True), *UP], 2) == ("2 of 2 ranks up", True)
    assert describe([agent_started(True)], 0) == ("0 of 1 programs up", False)
    assert describe([agent_started(True), {"event": "process_up", "name": "main"}], 0) == ("1 of 1 programs up", True)
    assert describe([agent_started(True), {**ENDED, "outcome": "succeeded"}], 2) == ("finished", True)


def test_how_a_checkout_differs() -> None:
    then = {"commit": "a" * 40, "is_dirty": False}
    assert describe_git_change(then, then) is None
    assert describe_git_change(None, then) is None
    assert "b" * 12 in str(describe_git_change(then, {"commit": "b" * 40, "is_dirty": False}))
    assert "changes beyond" in str(describe_git_change(then, {**then, "is_dirty": True}))
