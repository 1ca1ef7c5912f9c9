"""Staying with jobs: what is shown of them, hosts side by side, stopping from several sides at once."""

import io
import os
import pty
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from local_jobs import list_left, plan_program, start, submit, wait_for

from flagscale.cli import logs, status, stop
from flagscale.errors import LaunchError, RunError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import local
from flagscale.runner.launch.ending import catch_interrupts
from flagscale.runner.launch.files import hold_lock
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.startup import show_progress
from flagscale.runner.monitor import follow
from flagscale.runner.monitor.follow import wait_job
from flagscale.runner.monitor.logs import find_rank_tails
from flagscale.runner.monitor.plot import plot_loss
from flagscale.runner.monitor.runs import list_runs, load_run
from flagscale.runner.monitor.state import query_run
from flagscale.runner.monitor.stop import stop_run
from flagscale.runner.plan.job import JobPlan

ITERATION = "iteration        {}/      {} | elapsed time per iteration (ms): 100.0 | lm loss: {:.6E} |"


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))


def plan_two_hosts(exp_dir: Path, first: str, second: str) -> JobPlan:
    """This machine under both of its names."""
    one = plan_program(exp_dir, "bash", "-c", first)
    other = plan_program(exp_dir, "bash", "-c", second).hosts[0]
    return replace(one, hosts=(*one.hosts, replace(other, host=Host("127.0.0.1", 1), node_rank=1)))


def run_to_end(plan: JobPlan) -> RunRef:
    run = submit(plan)
    wait_job(run)
    return run


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_two_hosts_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_to_end(plan_two_hosts(tmp_path / "exp", "echo one", "echo two"))
    assert sorted(capsys.readouterr().out.splitlines()) == ["host_0_localhost | one", "host_1_127.0.0.1 | two"]
    assert logs.main([run.run_id]) == 0
    assert capsys.readouterr().out == "host_0_localhost | one\nhost_1_127.0.0.1 | two\n"
    state = query_run(run)
    assert (state.state, [host.label for host in state.hosts]) == ("succeeded", list(run.labels))
    assert status.main([run.run_id]) == 0
    assert "host_1_127.0.0.1  succeeded" in capsys.readouterr().out


def test_the_worst_of_two_hosts_speaks_for_the_run(tmp_path: Path) -> None:
    run = run_to_end(plan_two_hosts(tmp_path / "exp", "true", "exit 6"))
    state = query_run(run)
    assert (state.state, state.exit_code, state.reason) == (
        "failed",
        6,
        f"{run.labels[1]}: main ended with exit code 6",
    )
    assert [host.state for host in state.hosts] == ["succeeded", "failed"]


def test_stop_ends_both_hosts(tmp_path: Path) -> None:
    run = submit(plan_two_hosts(tmp_path / "exp", "sleep 600", "sleep 600"))
    assert stop_run(run).was_alive
    assert [host.state for host in query_run(run).hosts] == ["stopped", "stopped"]
    assert [list_left(run) for _ in run.labels] == [[], []]


def test_progress_elsewhere_than_on_a_terminal_is_a_line_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as show:
        for text in ("a", "a", "b", "a"):
            show(text)
    assert capsys.readouterr().err == "a\nb\na\n"


def read_terminal(argv: list[str]) -> tuple[int, str]:
    """The exit code of a program on a terminal of its own, and all that it wrote there."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as program:
        os.close(theirs)
        parts: list[bytes] = []
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # how Linux says that nobody has the other end open any more
            pass
        os.close(ours)
    return program.returncode, b"".join(parts).decode(errors="replace")


def test_on_a_terminal_a_bar_tells_how_far_it_is(tmp_path: Path) -> None:
    line = ITERATION.format("$i", "30", 5.0)
    code = f'for i in $(seq 1 30); do echo "{line}"; sleep 0.05; done; echo "my own words"; sleep 0.5'
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", code))
    argv = [sys.executable, "-c", "import sys; from flagscale.cli import main; sys.exit(main())", "logs", "-f"]
    exit_code, shown = read_terminal([*argv, run.run_id])
    assert exit_code == 0
    assert "━" in shown
    assert "iteration 30/30 · loss 5.0000 · 100 ms · 0:00 left" in shown
    assert "my own words" in shown
    kept = [line for line in shown.replace("\r", "\n").splitlines() if "iteration 3/30 " in line and "━" not in line]
    assert kept, "every tenth of the way stays as a line"
    assert not any("iteration 4/30 " in line and "━" not in line for line in shown.replace("\r", "\n").splitlines())


def test_following_shows_what_a_person_wants_and_all_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["[default0]:done with setup ...", ITERATION.format(1, 2, 5.0), "[default0]:my own words"]
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", "\n".join(f"echo '{line}'" for line in lines)))
    assert logs.main(["-f", run.run_id]) == 0
    assert capsys.readouterr().out.splitlines() == ["iteration 1/2 · loss 5.0000 · 100 ms · 0:00 left", lines[2]]
    assert logs.main(["-f", "-n", "1", run.run_id]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[2]]
    for words in ([], ["-f", "--all"]):
        assert logs.main([*words, run.run_id]) == 0
        assert capsys.readouterr().out.splitlines() == lines
    assert run.output_path(run.labels[0]).read_text().splitlines() == lines


def test_another_backend_s_lines_are_all_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = replace(plan_program(tmp_path / "exp", "echo", "-" * 40), backend="vllm")
    run_to_end(plan)
    assert capsys.readouterr().out == "-" * 40 + "\n"


def test_a_start_says_what_it_starts_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(plan_program(tmp_path / "exp", "sleep", "600"))
    shown = capsys.readouterr()
    assert shown.err.startswith(
        f"run {run.run_id}: small, train with megatron on localhost\n  outputs   {tmp_path}/exp\n"
    )
    assert f"  stop      flagscale stop {run.run_id}\n" in shown.err
    assert shown.out == f"run {run.run_id}: 1 of 1 programs up; follow it with `flagscale logs -f {run.run_id}`\n"
    stop_run(run, force=True)
    start(plan_program(tmp_path / "other", "true", foreground=True))
    shown = capsys.readouterr()
    assert "  stop      Ctrl-C, or elsewhere flagscale stop " in shown.err
    assert shown.out == ""


def test_a_job_in_the_foreground_that_fails_at_the_start_gives_its_own_exit_code(tmp_path: Path) -> None:
    for foreground, code in ((True, 7), (False, 1)):
        with pytest.raises(LaunchError, match="main ended with exit code 7") as caught:
            start(plan_program(tmp_path / "exp", "bash", "-c", "exit 7", foreground=foreground))
        assert caught.value.exit_code == code


def test_a_rank_without_files_is_an_error(tmp_path: Path) -> None:
    run = run_to_end(plan_program(tmp_path / "exp", "true"))
    with pytest.raises(RunError, match="has no ranks; leave out --rank"):
        find_rank_tails(run, 0)


# --- stopping from several sides -------------------------------------------------------------------------------------


def test_two_stops_at_once_agree(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "sleep", "600"))
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(stop.main([run.run_id]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0]
    assert query_run(run).state == "stopped"


def test_a_job_may_stop_itself(tmp_path: Path) -> None:
    code = "import sys; from flagscale.cli.stop import main; sys.exit(main([]))"
    run = submit(plan_program(tmp_path / "exp", sys.executable, "-c", code))
    wait_for(lambda: query_run(run).has_ended)
    assert query_run(run).state == "stopped"
    assert list_left(run) == []


def test_the_second_ctrl_c_ends_a_stubborn_job_at_once(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", *STUBBORN), 600.0)
    code = (
        "import sys; from flagscale.runner.monitor.runs import load_run; from flagscale.runner.monitor.follow import "
    )
    code += "wait_job; sys.exit(wait_job(load_run(sys.argv[1])))"
    argv = [sys.executable, "-c", code, run.run_id]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        assert follower.stderr
        assert follower.stdout.readline() == "armed\n"
        follower.send_signal(signal.SIGINT)
        assert "Ctrl-C again" in follower.stderr.readline()
        wait_for(lambda: query_run(run).state == "stopping")
        follower.send_signal(signal.SIGINT)
        follower.communicate()
    assert follower.returncode == 143
    assert query_run(run).state == "stopped"
    assert list_left(run) == []


class Impatient(io.StringIO):
    """A stream at whose other end someone presses Ctrl-C as soon as they read `word`."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def write(self, text: str) -> int:
        if self.word in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


STUBBORN = ("bash", "-c", "trap '' TERM; echo armed; sleep 600 & wait; wait")


def test_ctrl_c_while_the_first_one_is_being_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submit(plan_program(tmp_path / "exp", *STUBBORN), 600.0)
    monkeypatch.setattr(sys, "stdout", Impatient("armed"))
    monkeypatch.setattr(sys, "stderr", Impatient("Ctrl-C again"))
    assert wait_job(run) == 143
    assert f"ending {run.run_id} at once" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert list_left(run) == []


@pytest.mark.parametrize("is_storm", [False, True], ids=["once", "at every line from there on"])
def test_no_line_of_the_waiting_is_unprotected(tmp_path: Path, is_storm: bool) -> None:
    """Ctrl-C comes before the n-th line that is run once the waiting has begun, for each n of the first round."""
    for number in range(2, 18, 3 if is_storm else 1):
        run = submit(plan_program(tmp_path / str(number), "sleep", "600"))
        seen = 0

        def trace(frame: FrameType, event: str, _arg: object, number: int = number) -> Any:
            nonlocal seen
            if frame.f_code.co_filename != follow.__file__:
                return None
            if event == "line":
                seen += 1
                if seen == number or (is_storm and seen > number):
                    os.kill(os.getpid(), signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            exit_code = wait_job(run)
        finally:
            sys.settrace(before)
        assert (exit_code, query_run(run).state, list_left(run)) == (143, "stopped", [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_leaves_a_job_that_is_only_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", "echo word; sleep 600"))
    monkeypatch.setattr(sys, "stdout", Impatient("word"))
    assert logs.main(["-f", run.run_id]) == 0
    assert f"run {run.run_id} goes on; `flagscale logs -f" in capsys.readouterr().err
    assert not query_run(run).has_ended
    stop_run(run, force=True)


def test_ctrl_c_that_is_ignored_stays_so(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "sleep", "600"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_interrupts(run, stops_job=True) as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.num == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert query_run(run).state != "stopping"
    stop_run(run, force=True)


def test_ctrl_c_during_the_hand_over_stops_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = local.hand_over

    def hand_over_interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(local, "hand_over", hand_over_interrupted)
    with pytest.raises(LaunchError, match=r"interrupted; run .* is being stopped") as caught:
        submit(plan_program(tmp_path / "exp", "sleep", "600"))
    assert caught.value.exit_code == 130
    run = load_run(tmp_path / "exp")
    wait_for(lambda: query_run(run).state == "stopped")
    assert list_left(run) == []


def test_stop_waits_for_what_runs_after(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "sleep", "600", after_stop="sleep 1; echo tidied"))
    stop_run(run)
    assert run.output_path(run.labels[0]).read_text() == "tidied\n"


def test_a_lock_does_not_outlive_who_held_it(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from flagscale.runner.launch.files import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match="another launch"), hold_lock(tmp_path):
            pass
        holder.kill()
    with hold_lock(tmp_path):
        pass


# --- lists and pictures ----------------------------------------------------------------------------------------------


def test_runs_whose_folder_is_gone_are_left_out(tmp_path: Path) -> None:
    import shutil

    kept = run_to_end(plan_program(tmp_path / "kept", "true"))
    gone = run_to_end(plan_program(tmp_path / "gone", "true"))
    shutil.rmtree(gone.exp_dir)
    assert [run.run_id for run in list_runs()] == [kept.run_id]
    assert load_run() == kept
    with pytest.raises(RunError, match="is missing"):
        load_run(gone.run_id)
    (tmp_path / "state" / "runs" / "20260101T000000-ffff.json").write_text("{")
    assert [run.run_id for run in list_runs()] == [kept.run_id]


def test_runs_of_one_second_are_in_the_order_of_their_start(tmp_path: Path) -> None:
    started = [run_to_end(plan_program(tmp_path / str(number), "true")).run_id for number in range(6)]
    assert [run.run_id for run in list_runs()] == started[::-1]


def test_no_runs_at_all() -> None:
    with pytest.raises(RunError, match="no run is listed"):
        load_run()


def print_losses(first: int, last: int) -> str:
    return "\n".join(f"echo '{ITERATION.format(step, 8, 9.0 - step)}'" for step in range(first, last + 1))


def test_a_resumed_training_is_drawn_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    exp = tmp_path / "exp"
    for part in (print_losses(1, 4), print_losses(3, 8)):
        run = run_to_end(plan_program(exp, "bash", "-c", part))
    picture = plot_loss(run, tmp_path / "picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="cannot write"):
        plot_loss(run, tmp_path / "missing" / "picture.png")


def test_each_run_tells_only_of_its_own_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    runs = [run_to_end(plan_program(tmp_path / "exp", "bash", "-c", print_losses(*part))) for part in ((1, 4), (5, 8))]
    assert [(state.progress.iteration if state.progress else None) for state in map(query_run, runs)] == [4, 8]
    for run, words in zip(runs, ("loss 8.0000 -> 5.0000 in 4 steps", "loss 4.0000 -> 1.0000 in 4 steps"), strict=True):
        capsys.readouterr()
        assert logs.main(["-f", run.run_id]) == 0
        assert words in capsys.readouterr().err


def test_without_losses_or_without_matplotlib_there_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = run_to_end(plan_program(tmp_path / "silent", "echo", "iteration 1/ 2 | lm loss: NAN |"))
    with pytest.raises(RunError, match="printed no loss"):
        plot_loss(silent)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    loud = run_to_end(plan_program(tmp_path / "loud", "bash", "-c", print_losses(1, 2)))
    assert "pip install matplotlib" in capsys.readouterr().err
    assert query_run(loud).state == "succeeded"
    assert not (loud.exp_dir / "loss.png").exists()


def test_the_environment_of_the_launcher_is_the_job_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "a\nb 'c' $(d) `e`")
    run = run_to_end(plan_program(tmp_path / "exp", "bash", "-c", 'printf %s "$ODD"'))
    assert run.output_path(run.labels[0]).read_text() == os.environ["ODD"]
