"""Jobs started, watched and ended on this machine, with real processes and a real torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_jobs import list_left, plan_processes, plan_program, plan_ranks, start, submit, wait_for, with_port

from flagscale.cli import list_runs, logs, rerun, status, stop
from flagscale.errors import FlagScaleError, LaunchError, RunError, UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch import capacity
from flagscale.runner.launch.files import hold_lock
from flagscale.runner.launch.record import load_record
from flagscale.runner.monitor.follow import wait_job
from flagscale.runner.monitor.runs import load_run
from flagscale.runner.monitor.state import query_run
from flagscale.runner.monitor.stop import stop_run
from flagscale.runner.plan.job import AtLaunch, ProcessSpec

LABEL = "host_0_localhost"


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- a life, from start to stop --------------------------------------------------------------------------------------


def test_start_status_stop_and_stop_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = tmp_path / "after"
    run = start(plan_program(tmp_path / "exp", "sleep", "600", after_stop=f"echo $FLAGSCALE_RUN_TOKEN >> {flag}"))
    state = query_run(run)
    assert (state.state, state.exit_code, state.has_ended) == ("running", None, False)
    pid_file = run.log_dir / "pids" / f"{LABEL}.pid"
    assert int(pid_file.read_text()) == state.hosts[0].agent_pid
    script = run.log_dir / "scripts" / f"{LABEL}_run.sh"
    assert (script.stat().st_mode & 0o777, (run.folder / "job.json").stat().st_mode & 0o777) == (0o700, 0o600)
    capsys.readouterr()
    assert stop.main([run.run_id]) == 0
    assert capsys.readouterr().out == f"{run.run_id}: stopped\n"
    assert not pid_file.exists()
    assert list_left(run) == []
    assert len(flag.read_text().split()) == 1
    assert stop.main([str(tmp_path / "exp")]) == 0
    assert "nothing to stop" in capsys.readouterr().out
    assert query_run(run).reason


def test_the_exit_code_and_the_output_of_a_followed_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", "echo out; echo err >&2; printf unfinished; exit 3"))
    assert wait_job(run) == 3
    shown = capfd.readouterr()
    assert shown.out.split() == ["out", "err", "unfinished"]
    assert "failed: main ended with exit code 3" in shown.err


def test_a_job_killed_by_a_signal_has_the_shell_s_exit_code(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", "kill -SEGV $$"))
    assert wait_job(run) == 128 + signal.SIGSEGV
    assert query_run(run).reason == "main died of SIGSEGV"


def test_ranks_come_up_and_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\nwhile not Path('go').exists(): time.sleep(0.1)\nprint(f'rank {rank} is done')"
    run = start(plan_ranks(tmp_path / "exp", code))
    state = query_run(run)
    assert [(rank.rank, rank.local_rank, rank.state) for rank in state.ranks] == [(0, 0, "up"), (1, 1, "up")]
    assert len({rank.pid for rank in state.ranks}) == 2
    (tmp_path / "go").touch()
    assert wait_job(run) == 0
    assert [(rank.state, rank.exit_code) for rank in query_run(run).ranks] == [("exited", 0), ("exited", 0)]
    capsys.readouterr()
    assert logs.main([run.run_id, "--rank", "1"]) == 0
    assert capsys.readouterr().out == "stdout | rank 1 says hello\nstdout | rank 1 is done\n"
    assert logs.main([run.run_id]) == 0
    assert "[default0]:rank 0 says hello" in capsys.readouterr().out
    with pytest.raises(RunError, match="has no rank 7; expected 0 to 1"):
        logs.main([run.run_id, "--rank", "7"])


def test_a_rank_that_fails_at_the_start_is_shown_with_its_last_lines(tmp_path: Path) -> None:
    code = """
if rank == "1":
    Path(os.environ["FLAGSCALE_RANK_DIR"], "rank_1.up").unlink()
    sys.exit("out of luck")
time.sleep(60)
"""
    with pytest.raises(LaunchError) as caught:
        start(plan_ranks(tmp_path / "exp", code))
    assert "rank 1 ended with exit code 1" in str(caught.value)
    assert "\n  out of luck" in str(caught.value)
    assert "attempt_0/1/stderr.log" in str(caught.value)
    run = load_run(tmp_path / "exp")
    assert list_left(run) == []
    assert [rank.is_first_failure for rank in query_run(run).ranks] == [False, True]


def test_before_start_that_fails_is_a_failed_start(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="before_start failed with exit code 4"):
        start(plan_program(tmp_path / "exp", "sleep", "600", before_start="(exit 4)"))


def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    process = ProcessSpec("silent", ("sleep", "600"), str(tmp_path), num_ranks=1, announces=True)
    with pytest.raises(LaunchError, match=r"after 0.5 s only 0 of 1 ranks up; the job was ended"):
        start(plan_processes(tmp_path / "exp", process, start_timeout_s=0.5))
    run = load_run(tmp_path / "exp")
    wait_for(lambda: query_run(run).has_ended)
    assert list_left(run) == []


def test_ctrl_c_stops_a_followed_job(tmp_path: Path) -> None:
    run = start(plan_program(tmp_path / "exp", "bash", "-c", "trap 'echo saving; exit 0' TERM; sleep 600 & wait"))
    code = (
        "import sys; from flagscale.runner.monitor.runs import load_run; from flagscale.runner.monitor.follow import "
    )
    code += "wait_job; print('ready', flush=True); sys.exit(wait_job(load_run(sys.argv[1])))"
    argv = [sys.executable, "-c", code, run.run_id]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        assert follower.stdout.readline() == "ready\n"
        wait_for(lambda: Path(f"/proc/{follower.pid}/syscall").exists())
        import time

        time.sleep(1)
        follower.send_signal(signal.SIGINT)
        out, err = follower.communicate()
    assert follower.returncode == 143
    assert "saving" in out
    assert "Ctrl-C again" in err
    assert query_run(run).state == "stopped"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be someone else")
def test_someone_else_s_run_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(plan_program(tmp_path / "exp", "sleep", "600"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 65534)
        with pytest.raises(RunError, match="belongs to root, who alone may stop it"):
            stop_run(run)
    stop_run(run, force=True)


# --- the experiment folder -------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    plan = plan_program(tmp_path / "exp", "sleep", "600")
    first = start(plan)
    before = list_tree(tmp_path / "exp")
    with pytest.raises(LaunchError, match=rf"already holds a job that runs: {first.run_id}, since .*flagscale stop"):
        start(plan)
    assert list_tree(tmp_path / "exp") == before
    stop_run(first)
    second = start(plan)
    stop_run(second)
    assert [run.run_id for run in (load_run(), load_run(tmp_path / "exp"))] == [second.run_id] * 2
    assert load_run(first.folder) == first


def test_each_run_shows_its_own_part_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for word in ("first", "second"):
        runs.append(submit(plan_program(tmp_path / "exp", "echo", word)))
        wait_job(runs[-1])
    capsys.readouterr()
    for run, word in zip(runs, ("first\n", "second\n"), strict=True):
        logs.main([run.run_id])
        assert capsys.readouterr().out == word


def test_two_launches_at_one_moment(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "exp"), pytest.raises(LaunchError, match="another launch"):
        start(plan_program(tmp_path / "exp", "true"))


def test_nothing_is_written_where_the_plan_cannot_run(tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    script = ProcessSpec("main", (sys.executable, "trian.py"), str(tmp_path), entrypoint="trian.py")
    (tmp_path / "train.py").touch()
    (tmp_path / "exp2" / "logs" / f"{LABEL}.output").mkdir(parents=True)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        wrong = {
            rf"trian.py is missing; did you mean `{tmp_path}/train.py`": plan_processes(exp, script),
            "`no-such-program` is not on the PATH": plan_program(exp, "no-such-program"),
            "/no/such/file is missing or may not be executed": plan_program(exp, "/no/such/file"),
            "NO_SUCH_SECRET is not set": replace(plan_program(exp, "true"), secrets=(("KEY", "NO_SUCH_SECRET"),)),
            rf"cannot write {exp}2/logs/{LABEL}.output": plan_program(tmp_path / "exp2", "true"),
            rf"port {port} .* is taken by process {os.getpid()} \(": with_port(plan_program(exp, "true"), port),
        }
        for words, plan in wrong.items():
            with pytest.raises(FlagScaleError, match=words):
                start(plan)
            assert not exp.exists()
    assert not (tmp_path / "state").exists()


def test_hosts_elsewhere_are_named(tmp_path: Path) -> None:
    plan = plan_program(tmp_path / "exp", "true")
    away = replace(plan, hosts=(replace(plan.hosts[0], host=Host("node7", 8)),))
    with pytest.raises(LaunchError, match=r"1 other machine \(node7\)"):
        start(away)


@pytest.mark.parametrize("blocked", ["exp", "exp/logs", "exp/logs/scripts", "exp/runs", "state"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).touch()
    before = list_tree(tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}/{blocked} is a file; expected a folder"):
        start(plan_program(tmp_path / "exp", "true"))
    assert list_tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    # the launch looks for far more room than there ever is here
    monkeypatch.setattr(capacity, "LEAST_FREE_BYTES", 0)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * (512 * 1024 - 4 * 4096))
    with pytest.raises(LaunchError, match=f"cannot write {small_disk}/exp/.*No space left"):
        start(plan_program(small_disk / "exp", "true"))
    assert list_tree(small_disk) == ["ballast"]


def test_a_job_that_fills_the_disk_is_still_told_of(small_disk: Path) -> None:
    run = submit(plan_program(small_disk / "exp", "bash", "-c", "yes | head -c 10000000 > fill; exit 9"))
    assert wait_job(run) == 9
    assert query_run(run).reason == f"main ended with exit code 9; the disk of {run.folder} is full"
    assert list_left(run) == []


# --- what the job is given -------------------------------------------------------------------------------------------


def test_secrets_reach_the_job_under_its_own_name_and_stand_nowhere(tmp_path: Path) -> None:
    code = 'echo "got ${#KEY} ${#LISTED} ${OUTER-nothing}"; sleep 600'
    plan = plan_program(tmp_path / "exp", "bash", "-c", code)
    plan = replace(plan, secrets=(("KEY", "OUTER"), ("LISTED", "LISTED")))
    run = start(plan, env={**os.environ, "OUTER": "hunter2-hunter2", "LISTED": "hunter2", "KEY": "hunter2-stale"})
    wait_for(lambda: "got 15 7 nothing\n" in run.output_path(LABEL).read_text())
    for path in (*tmp_path.rglob("*"),):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        assert b"hunter2" not in line.read_bytes()
    event = load_record(run, LABEL).find("agent_started")
    assert event
    for watcher in (event["pid"], event["guard"]):
        environ = Path(f"/proc/{watcher}/environ").read_bytes()
        assert b"PATH=" in environ
        assert b"hunter2" not in environ
    stop_run(run, force=True)


def test_a_chosen_port_reaches_the_script_and_is_kept_for_the_record(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "echo", AtLaunch("master_port", "port="), AtLaunch("run_id")))
    assert wait_job(run) == 0
    match = re.fullmatch(rf"port=(\d+) {run.run_id}\n", run.output_path(LABEL).read_text())
    assert match
    values = json.loads(run.job_path.read_text())["values"]
    assert (values["master_port"], values["run_id"]) == (match[1], run.run_id)


def test_files_of_the_plan_are_there_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "exp" / "logs" / "scripts" / "serve.yaml"
    run = submit(plan_program(tmp_path / "exp", "cat", str(path), files=((str(path), "a: '$(b)'\n"),)))
    assert wait_job(run) == 0
    assert run.output_path(LABEL).read_text() == "a: '$(b)'\n"


def test_signals_that_python_ignores_or_we_block_are_as_usual_in_the_job(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"))
    assert wait_job(run) == 0
    masks = dict(line.split() for line in run.output_path(LABEL).read_text().splitlines())
    # signals 32 and 33 belong to the C library: nobody can set them, and whoever started the tests may ignore them;
    # SIGHUP is ignored on purpose under `nohup`
    others = ~(0b11 << 31 | 1 << (signal.SIGHUP - 1))
    assert {name: int(mask, 16) & others for name, mask in masks.items()} == {"SigBlk:": 0, "SigIgn:": 0}


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_status_list_and_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = submit(plan_program(tmp_path / "exp", "true"))
    assert wait_job(first) == 0
    capsys.readouterr()
    assert rerun.main([first.run_id]) == 0
    shown = capsys.readouterr()
    second = load_run()
    assert f"starting the job of {first.run_id} again" in shown.err
    assert shown.out.startswith(f"run {second.run_id}: ")
    assert second.run_id != first.run_id
    assert wait_job(second) == 0
    capsys.readouterr()
    assert list_runs.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run_id"], row["state"]) for row in rows] == [
        (second.run_id, "succeeded"),
        (first.run_id, "succeeded"),
    ]
    assert status.main([second.run_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows[0]
    assert status.main([]) == 0
    assert "succeeded, exit code 0" in capsys.readouterr().out
    assert list_runs.main(["--alive"]) == 0
    assert capsys.readouterr().out == "no run is alive\n"
    assert list_runs.main([]) == 0
    assert first.run_id in capsys.readouterr().out


def test_runs_are_found_by_their_beginning_and_faults_name_the_nearest(tmp_path: Path) -> None:
    run = submit(plan_program(tmp_path / "exp", "true"))
    wait_job(run)
    assert load_run(run.run_id[:12]) == run
    with pytest.raises(RunError, match=f"did you mean `{run.run_id}`"):
        load_run(run.run_id[:-1] + "x")
    with pytest.raises(RunError, match="no run in"):
        load_run(tmp_path)
    other = submit(plan_program(tmp_path / "other", "true"))
    wait_job(other)
    with pytest.raises(RunError, match="2 runs begin with `2`"):
        load_run("2")


def test_logs_follow_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = submit(plan_program(tmp_path / "exp", "bash", "-c", "for i in 1 2 3; do echo line $i; sleep 0.3; done"))
    assert logs.main(["-f", run.run_id]) == 0
    assert capsys.readouterr().out == "line 1\nline 2\nline 3\n"
    assert logs.main(["-n", "1"]) == 0
    assert capsys.readouterr().out == "line 3\n"


LOSSES = """
for i in 1 2 3; do
  echo " [2026-01-01 00:00:00] iteration        $i/       3 | consumed samples: $((i*4)) |" \\
    "elapsed time per iteration (ms): 100.0 | global batch size:     4 | lm loss: $((9-i)).5E+00 | grad norm: 1.0 |"
done
"""


def test_a_training_is_summed_up_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    exp = tmp_path / "exp"
    (exp / "checkpoints").mkdir(parents=True)
    (exp / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    plan = replace(plan_program(exp, "bash", "-c", LOSSES), checkpoint_dir=str(exp / "checkpoints"))
    assert wait_job(submit(plan)) == 0
    shown = capsys.readouterr()
    assert "iteration 2/3 · loss 7.5000 · grad norm 1.000 · 100 ms · 0:00 left" in shown.out
    assert "loss 8.5000 -> 6.5000 in 3 steps" in shown.err
    assert f"checkpoint {exp}/checkpoints/iter_0000003; plot {exp}/loss.png; log {exp}/logs/{LABEL}.output" in shown.err
    assert (exp / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert query_run(load_run()).progress is not None
