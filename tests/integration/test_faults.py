"""What dies, and what is told of it: ranks, agents, guards, both, launchers, and children that do not want to go."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_jobs import list_left, plan_processes, plan_program, plan_ranks, start, submit, wait_for

from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.procs import find_ours, is_same_alive
from flagscale.runner.launch.record import load_record
from flagscale.runner.monitor.state import RunState, query_run
from flagscale.runner.monitor.stop import stop_run
from flagscale.runner.plan.job import ProcessSpec


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))


def watchers(run: RunRef) -> tuple[int, int]:
    event = load_record(run, run.labels[0]).find("agent_started")
    assert event
    return event["pid"], event["guard"]


def wait_ended(run: RunRef) -> RunState:
    def find() -> RunState | None:
        return state if (state := query_run(run)).has_ended and not state.num_leftovers else None

    state: RunState = wait_for(find)
    return state


def test_a_killed_rank_fails_the_job_and_is_named(tmp_path: Path) -> None:
    run = start(plan_ranks(tmp_path / "exp", "time.sleep(600)"))
    ranks = query_run(run).ranks
    assert [rank.state for rank in ranks] == ["up", "up"]
    assert ranks[1].pid
    os.kill(ranks[1].pid, signal.SIGKILL)
    state = wait_ended(run)
    assert (state.state, state.reason) == ("failed", "rank 1 died of SIGKILL")
    assert [(rank.state, rank.signal) for rank in state.ranks] == [("ended", "SIGTERM"), ("failed", "SIGKILL")]
    assert state.ranks[1].is_first_failure
    assert list_left(run) == []


def test_ranks_are_ended_with_a_killed_agent(tmp_path: Path) -> None:
    run = start(plan_ranks(tmp_path / "exp", "time.sleep(600)"))
    agent, _ = watchers(run)
    os.kill(agent, signal.SIGKILL)
    state = wait_ended(run)
    assert state.state == "lost"
    assert f"the agent (process {agent}) was killed by SIGKILL" in str(state.reason)
    assert {rank.state for rank in state.ranks} == {"ended"}
    assert list_left(run) == []


@pytest.mark.parametrize("victim", ["agent", "guard"])
def test_the_other_watcher_ends_the_job(tmp_path: Path, victim: str) -> None:
    flag = tmp_path / "after"
    run = start(plan_program(tmp_path / "exp", "sleep", "600", after_stop=f"echo x >> {flag}"))
    agent, guard = watchers(run)
    os.kill(agent if victim == "agent" else guard, signal.SIGKILL)
    state = wait_ended(run)
    assert state.state == "lost"
    assert victim in str(state.reason)
    assert list_left(run) == []
    assert flag.read_text() == "x\n"
    wait_for(lambda: not Path(run.load_spec(run.labels[0]).pid_file).exists())
    again = start(plan_program(tmp_path / "exp", "sleep", "600"))
    assert stop_run(again).state.state == "stopped"


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('armed', flush=True); time.sleep(600)"
)


def kill_both(run: RunRef) -> None:
    agent, guard = watchers(run)
    os.kill(agent, signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not load_record(run, run.labels[0]).is_watched)


def test_without_watchers_the_truth_is_lost_and_stop_cleans_up(tmp_path: Path) -> None:
    run = start(plan_program(tmp_path / "exp", sys.executable, "-c", STUBBORN), grace_s=0.5)
    wait_for(lambda: "armed" in run.output_path(run.labels[0]).read_text())
    kill_both(run)
    state = query_run(run)
    assert (state.state, state.num_leftovers) == ("lost", 1)
    assert "1 of its processes still live" in str(state.reason)
    stopped = stop_run(run)
    assert (stopped.was_alive, stopped.num_leftovers) == (False, 1)
    assert list_left(run) == []
    assert query_run(run).num_leftovers == 0


def test_a_lost_run_does_not_block_the_next_and_its_leftovers_are_ended(tmp_path: Path) -> None:
    plan = plan_program(tmp_path / "exp", sys.executable, "-c", STUBBORN)
    first = start(plan, grace_s=0.5)
    wait_for(lambda: "armed" in first.output_path(first.labels[0]).read_text())
    kill_both(first)
    assert len(list_left(first)) == 1
    second = start(plan, grace_s=0.5)
    assert list_left(first) == []
    assert query_run(second).state == "running"
    stop_run(second, force=True)


def test_the_kernel_ends_a_plain_job_whose_watchers_are_killed(tmp_path: Path) -> None:
    run = start(plan_program(tmp_path / "exp", "sleep", "600"))
    kill_both(run)
    wait_for(lambda: not list_left(run))
    assert query_run(run).state == "lost"


DAEMON = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        # the environment is cleared too: only its parentage tells whose it is
        os.execve(sys.executable, [sys.executable, "-c", "import signal, time, os, sys\\nsignal.signal(signal.SIGTERM, "
            "signal.SIG_IGN)\\nopen(sys.argv[1], 'w').write(str(os.getpid()))\\ntime.sleep(600)", sys.argv[1]], {})
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


def daemon_plan(tmp_path: Path, lasts_s: str) -> tuple[Path, RunRef]:
    note = tmp_path / "daemon.pid"
    run = submit(plan_program(tmp_path / "exp", sys.executable, "-c", DAEMON, str(note), lasts_s), grace_s=0.5)
    wait_for(lambda: note.is_file() and note.read_text())
    return note, run


def test_stop_ends_daemons_and_those_who_ignore_sigterm(tmp_path: Path) -> None:
    note, run = daemon_plan(tmp_path, "600")
    daemon = int(note.read_text())
    stopped = stop_run(run)
    assert stopped.was_alive
    assert stopped.state.state == "stopped"
    assert not Path(f"/proc/{daemon}").exists()
    assert list_left(run) == []


def test_a_job_that_ends_well_leaves_no_daemon(tmp_path: Path) -> None:
    note, run = daemon_plan(tmp_path, "0")
    state = wait_ended(run)
    assert (state.state, state.exit_code) == ("succeeded", 0)
    assert not Path(f"/proc/{int(note.read_text())}").exists()


def test_daemons_are_ended_with_a_killed_agent(tmp_path: Path) -> None:
    note, run = daemon_plan(tmp_path, "600")
    os.kill(watchers(run)[0], signal.SIGKILL)
    assert wait_ended(run).state == "lost"
    assert not Path(f"/proc/{int(note.read_text())}").exists()


def test_an_identical_process_of_someone_else_is_untouched(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "599.25"])
    try:
        run = start(plan_program(tmp_path / "exp", "sleep", "599.25"))
        stop_run(run, force=True)
        assert list_left(run) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_one_failing_program_ends_the_others(tmp_path: Path) -> None:
    good = ProcessSpec("good", ("sleep", "600"), str(tmp_path))
    bad = ProcessSpec("bad", ("bash", "-c", "sleep 0.5; exit 7"), str(tmp_path))
    run = submit(plan_processes(tmp_path / "exp", good, bad))
    state = wait_ended(run)
    assert (state.state, state.exit_code, state.reason) == ("failed", 7, "bad ended with exit code 7")
    assert list_left(run) == []


def test_a_reused_number_is_nobody(tmp_path: Path) -> None:
    run = start(plan_program(tmp_path / "exp", "sleep", "600"))
    event = load_record(run, run.labels[0]).find("agent_started")
    assert event
    assert is_same_alive(event["pid"], event["start_time"])
    assert not is_same_alive(event["pid"], event["start_time"] + 1)
    stop_run(run)


LAUNCHER = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from local_jobs import plan_program, start
plan = plan_program(Path(sys.argv[1]), "sleep", "600", foreground=sys.argv[3] == "foreground")
try:
    start(plan)
except Exception as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start_launcher(exp_dir: Path, mode: str = "background") -> "subprocess.Popen[str]":
    argv = [sys.executable, "-c", LAUNCHER, str(exp_dir), str(Path(__file__).parent), mode]
    launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: list((exp_dir / "runs").glob("*/*.events.jsonl")))
    return launcher


def test_a_killed_launcher_leaves_the_job_alive_and_reachable(tmp_path: Path) -> None:
    from flagscale.runner.monitor.runs import load_run

    with start_launcher(tmp_path / "exp") as launcher:
        wait_for(lambda: query_run(load_run(tmp_path / "exp")).hosts[0].agent_pid)
        launcher.kill()
    run = load_run(tmp_path / "exp")
    wait_for(lambda: query_run(run).state == "running")
    assert load_run().run_id == run.run_id
    assert stop_run(run).state.state == "stopped"
    assert list_left(run) == []


@pytest.mark.parametrize(
    ("mode", "state", "words"), [("background", "running", "goes on"), ("foreground", "stopped", "stopped")]
)
def test_ctrl_c_during_the_start(tmp_path: Path, mode: str, state: str, words: str) -> None:
    from flagscale.runner.monitor.runs import load_run

    with start_launcher(tmp_path / "exp", mode) as launcher:
        run = load_run(tmp_path / "exp")
        wait_for(lambda: query_run(run).hosts[0].agent_pid)
        time.sleep(0.5)
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate()[0]
    assert launcher.returncode == 130
    assert words in said
    assert run.run_id in said
    wait_for(lambda: query_run(run).state == state)
    stop_run(run)
    assert find_ours(run.load_spec(run.labels[0]).token) == []
