"""Slurm: its settings, its words, and what they make of a run's state; no Slurm needed."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_hosts import choose
from test_state import ENDED, LABEL, RUN_ID, UP, agent_started, small_plan, write_run

from flagscale.errors import LaunchError
from flagscale.runner.config.experiment import Experiment
from flagscale.runner.config.idle import find_idle
from flagscale.runner.config.slurm import Slurm
from flagscale.runner.launch import slurm_queue
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.local import refuse_living
from flagscale.runner.launch.notice import Notice, write_notice
from flagscale.runner.launch.slurm import check_accepted
from flagscale.runner.launch.slurm_queue import Queue, find_queue
from flagscale.runner.launch.slurm_script import render_sbatch
from flagscale.runner.monitor.queued import judge_queued
from flagscale.runner.monitor.state import query_run
from flagscale.runner.render.script import from_environment, quote_word

# --- settings --------------------------------------------------------------------------------------------------------


def test_options_under_the_names_that_sbatch_has() -> None:
    section = Slurm.model_validate(
        {"partition": "gpu", "time": "30", "options": {"cpus_per_task": 8, "exclusive": True, "reboot": False}}
    )
    assert section.list_options() == (
        ("partition", "gpu"),
        ("time", "30"),
        ("cpus-per-task", "8"),
        ("exclusive", ""),
    )


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"time": 5400}, "a time in quotes"),
        ({"time": "soon"}, "a time in quotes"),
        ({"partition": "a\nb"}, "on one line"),
        ({"account": 'a"b'}, "without quotes"),
        ({"options": {"nodes": 3}}, "`nodes` is one that it does"),
        ({"options": {"job_name": "x"}}, "`job-name` is one that it does"),
        ({"options": {"--gres": "gpu:1"}}, "`--gres` is none"),
        ({"options": {"qos": "x"}}, "experiment.runner.slurm.qos"),
        ({"partitions": "x"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_asked_of_slurm(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text.replace("[", "\\[")):
        Slurm.model_validate(section)


def test_the_nodes_are_slurms_to_choose() -> None:
    assert choose(None, type="slurm", nnodes=3, nproc_per_node=4) == (
        [("node0", 4), ("node1", 4), ("node2", 4)],
        [],
        [],
    )
    assert "it is Slurm that chooses" in choose((), type="slurm", hostfile="h")[1][0]


def test_settings_of_another_launcher_are_told() -> None:
    runner = {"slurm": {"qos": "x"}, "ray_address": "a:1"}
    found = [str(fault) for fault in find_idle(Experiment.model_validate({"exp_dir": "x", "runner": runner}))]
    assert found == [
        "experiment.runner.slurm: has no effect: experiment.runner.type is ssh, not slurm",
        "experiment.runner.ray_address: has no effect: experiment.runner.type is ssh, not ray",
    ]


# --- quoting ---------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)


@given(TEXT, TEXT, TEXT)
def test_a_value_from_the_environment_arrives_whatever_it_holds(before: str, value: str, after: str) -> None:
    word = before + from_environment("FROM_SLURM") + after
    done = subprocess.run(
        ["bash", "-c", f"printf %s {quote_word(word)}"],
        env={"FROM_SLURM": value or "-", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == os.fsencode(before + (value or "-") + after)


def test_words_without_a_mark_are_quoted_as_ever() -> None:
    assert [quote_word(word) for word in ("a", "a b", "$x")] == [shlex.quote(word) for word in ("a", "a b", "$x")]


def test_a_variable_that_is_not_set_ends_the_script() -> None:
    script = f"printf %s {quote_word(from_environment('NOT_SET'))}; echo reached"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "NOT_SET" in done.stderr
    assert "reached" not in done.stdout


def test_the_directives_end_before_the_first_command(tmp_path: Path) -> None:
    lines = render_sbatch(small_plan(tmp_path / 'a "b" #c', 2), RUN_ID, "python").splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives
    assert any(line.startswith('#SBATCH --output="') and '\\"b\\" #c' in line for line in directives)


# --- what Slurm says -------------------------------------------------------------------------------------------------

SHOWN = "JobId=7 JobName=x JobState={state} Reason={reason} Dependency=(null) ExitCode=0:0 StdOut=/a JobState b\n"


def make_run(base: Path, events: list[dict[str, Any]], job: str | None = "7") -> RunRef:
    run = write_run(base, events)
    path = run.job_path
    path.write_text(json.dumps({**json.loads(path.read_text()), "launcher": "slurm"}))
    if job is not None:
        (run.folder / slurm_queue.JOB_FILE).write_text(job + "\n")
    return RunRef(run.run_id, run.exp_dir, run.log_dir, run.task, run.exp_name, run.labels, (), "slurm")


class FakeSlurm:
    """Answers in place of the commands: command -> (output, fault)."""

    def __init__(self, **answers: tuple[str | None, str]) -> None:
        self.answers = answers
        self.calls: list[list[str]] = []

    def __call__(self, argv: list[str], env: Any = None, text: Any = None) -> tuple[str | None, str]:
        del env, text
        self.calls.append(argv)
        return self.answers.get(argv[0], (None, f"`{argv[0]}` is not on the PATH"))


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**answers: tuple[str | None, str]) -> FakeSlurm:
        fake = FakeSlurm(**answers)
        monkeypatch.setattr(slurm_queue, "call_slurm", fake)
        monkeypatch.setattr("flagscale.runner.launch.slurm.call_slurm", fake)
        return fake

    return install


INVALID = (None, "slurm_load_jobs error: Invalid job id specified")


@pytest.mark.parametrize(
    ("state", "reason", "phase", "told"),
    [
        ("PENDING", "Resources", "pending", "Slurm job 7 is PENDING (Resources)"),
        ("RUNNING", "None", "running", "Slurm job 7 is RUNNING"),
        ("TIMEOUT", "TimeLimit", "ended", "Slurm job 7 is TIMEOUT (TimeLimit)"),
        ("NODE_FAIL", "None", "ended", "Slurm job 7 is NODE_FAIL"),
    ],
)
def test_words_of_slurm(tmp_path: Path, answer: Any, state: str, reason: str, phase: str, told: str) -> None:
    answer(scontrol=(SHOWN.format(state=state, reason=reason), ""))
    queue = find_queue(make_run(tmp_path, []))
    assert queue is not None
    assert (queue.phase, str(queue)) == (phase, told)


def test_a_job_that_slurm_has_forgotten(tmp_path: Path, answer: Any) -> None:
    run = make_run(tmp_path, [])
    answer(scontrol=INVALID)
    assert find_queue(run) == Queue("7", "forgotten", detail="Slurm does not know it any more")
    (run.folder / "slurm.end").write_text(SHOWN.format(state="COMPLETING", reason="TimeLimit"))
    assert find_queue(run) == Queue("7", "ended", "TIMEOUT", "TimeLimit", "has ended")
    answer(scontrol=INVALID, sacct=("CANCELLED by 0\n", ""))
    assert find_queue(run) == Queue("7", "ended", "CANCELLED")


def test_a_slurm_that_does_not_answer_is_no_end(tmp_path: Path, answer: Any) -> None:
    run = make_run(tmp_path, [])
    answer(scontrol=(None, "Unable to contact slurm controller"))
    state = query_run(run)
    assert (state.state, state.has_ended) == ("unreachable", False)
    assert "Unable to contact" in str(state.reason)
    assert find_queue(write_run(tmp_path / "other", [])) is None


def test_a_job_whose_number_was_never_written_is_found_by_its_name(tmp_path: Path, answer: Any) -> None:
    run = make_run(tmp_path, [], job=None)
    fake = answer(squeue=("12\n", ""), scontrol=(SHOWN.format(state="PENDING", reason="Priority"), ""))
    queue = find_queue(run)
    assert queue is not None
    assert queue.job_id == "12"
    assert f"--name=flagscale-{RUN_ID}" in fake.calls[0]
    assert (run.folder / slurm_queue.JOB_FILE).read_text() == "12\n"
    with pytest.raises(LaunchError, match=r"PENDING \(Priority\)"):
        refuse_living(run, [])


def test_only_a_job_that_may_run_is_cancelled(tmp_path: Path, answer: Any) -> None:
    run = make_run(tmp_path, [])
    fake = answer(scontrol=(SHOWN.format(state="COMPLETED", reason="None"), ""))
    slurm_queue.cancel_job(run)
    assert [call[0] for call in fake.calls] == ["scontrol"]
    fake = answer(scontrol=(SHOWN.format(state="RUNNING", reason="None"), ""), scancel=("", ""))
    slurm_queue.cancel_job(run)
    assert fake.calls[-1] == ["scancel", "7"]


def test_without_a_slurm_nothing_is_submitted(answer: Any) -> None:
    answer(sinfo=(None, "`sinfo` is not on the PATH"))
    with pytest.raises(LaunchError, match="Slurm cannot be asked: `sinfo` is not on the PATH"):
        check_accepted("script", {})


# --- what that makes of a run ----------------------------------------------------------------------------------------

STOPPED = {**ENDED, "outcome": "stopped", "exit_code": 143, "reason": "stopped by SIGTERM from process 9"}
STARTED = agent_started(False)
JUDGED: dict[str, tuple[list[dict[str, Any]], Queue, str, str]] = {
    "waits": ([], Queue("7", "pending", "PENDING", "Resources"), "pending", "PENDING (Resources)"),
    "begins": ([], Queue("7", "running", "RUNNING"), "starting", "its agent has not started yet"),
    "cancelled early": ([], Queue("7", "ended", "CANCELLED"), "stopped", "it was cancelled in Slurm"),
    "never ran": ([], Queue("7", "ended", "FAILED"), "never_started", "it did not start"),
    "no node": ([], Queue("7", "ended", "NODE_FAIL"), "lost", "a node of it failed"),
    "too long": ([STARTED, STOPPED], Queue("7", "ended", "TIMEOUT", "TimeLimit"), "failed", "at its time limit"),
    "preempted": ([STARTED, STOPPED], Queue("7", "ended", "PREEMPTED"), "stopped", "to another job"),
    "out of memory": ([STARTED], Queue("7", "ended", "OUT_OF_MEMORY"), "failed", "more memory"),
    "not seen": ([STARTED], Queue("7", "running", "RUNNING"), "unreachable", "RUNNING"),
    "well": ([STARTED, *UP, {**ENDED, "outcome": "succeeded"}], Queue("7", "ended", "COMPLETED"), "succeeded", ""),
    "alive": ([agent_started(True), *UP], Queue("7", "running", "RUNNING"), "running", ""),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_run_in_the_light_of_its_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    events, queue, state, reason = JUDGED[name]
    monkeypatch.setattr("flagscale.runner.monitor.state.find_queue", lambda _run: queue)
    found = query_run(make_run(tmp_path, events))
    assert found.state == state
    assert reason in str(found.reason)


def test_a_stop_by_us_stays_ours(tmp_path: Path) -> None:
    run = make_run(tmp_path, [STARTED, STOPPED])
    write_notice(run.notice_path, Notice("", "stopped by me"))
    host = query_run(write_run(tmp_path, [STARTED, STOPPED])).hosts[0]
    assert host.label == LABEL
    assert judge_queued(host, Queue("7", "ended", "CANCELLED"), run) == host
    unstarted = query_run(write_run(tmp_path, [])).hosts[0]
    judged = judge_queued(unstarted, Queue("7", "ended", "CANCELLED"), run)
    assert (judged.state, judged.reason) == ("stopped", "stopped by me, before it had started")
