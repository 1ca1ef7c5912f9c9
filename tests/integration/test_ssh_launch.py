"""Jobs over several test hosts by SSH: a real torchrun with a real all-reduce, watched, ended and broken."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import MakeHosts, missing
from ssh_jobs import PATIENCE_S, Bench, is_empty, pid_of, wait_for, watch_bystander

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")
pytest.importorskip("torch")

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> Iterator[MakeBench]:
    """Hosts, on the first of which somebody else's process has to live on whatever the test does."""
    with ExitStack() as stack:

        def make(num_hosts: int = 2, private_dirs: tuple[Path, ...] = ()) -> Bench:
            base = tmp_path / "base"
            base.mkdir()
            bench = Bench(make_hosts(num_hosts, private_dirs), base)
            stack.enter_context(watch_bystander(bench))
            return bench

        yield make


def known_hosts(bench: Bench) -> Path:
    return bench.hosts.layout.control.home / ".ssh" / "known_hosts"


# --- a life ----------------------------------------------------------------------------------------------------------


def test_two_hosts_from_launch_to_the_second_stop(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert "2 of 2 ranks up" in done.stdout
    state = bench.status()
    assert state["state"] == "running"
    assert [(rank["rank"], rank["host"], rank["state"]) for rank in state["ranks"]] == [
        (0, "host_0_h1", "up"),
        (1, "host_1_h2", "up"),
    ]
    wait_for(lambda: "secret" in bench.call("logs", str(bench.exp_dir)).stdout)
    wait_for(lambda: "on h2" in bench.call("logs", str(bench.exp_dir), "--rank", "1").stdout)
    shown = bench.call("logs", str(bench.exp_dir)).stdout
    assert "host_0_h1 | [default0]:rank 0 of 2 on h1" in shown
    assert "quoted: a 'b' \"c\" $HOME `d` \\e of host: two secret: 12" in shown
    written = [path for path in bench.exp_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hidden-value" in path.read_bytes()]
    assert " running " in bench.call("list").stdout
    again = bench.launch()
    assert again.returncode == 1
    assert "already holds a job that runs" in again.stderr
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert bench.list_left() == []
    assert "nothing to stop" in bench.call("stop", str(bench.exp_dir)).stdout
    state = bench.status()
    assert (state["state"], state["exit_code"]) == ("stopped", 143)
    assert "stopped by" in state["reason"]


def test_a_job_ends_well_and_ranks_are_where_the_hostfile_puts_them(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(hostfile="h2 slots=1\nroot@h1:22 slots=1\n")
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists())
        wait_for(lambda: bench.status()["state"] == "running")
        (bench.base / "go").touch()
        out, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, err
    assert "rank 0 is done" in out
    assert "rank 1 is done" in out
    state = bench.status()
    assert state["state"] == "succeeded"
    assert [rank["host"] for rank in state["ranks"]] == ["host_0_h2", "host_1_h1"]
    assert [(rank["rank"], rank["exit_code"]) for rank in state["ranks"]] == [(0, 0), (1, 0)]


# --- refusals: nothing is started, nothing stays ---------------------------------------------------------------------


def test_what_is_wrong_on_which_host_is_told_at_once(make_bench: MakeBench) -> None:
    bench = make_bench(4)
    bench.write(4)
    bench.hosts.kill("h2")
    lines = known_hosts(bench).read_text().splitlines()
    keys = {line.split(",")[0]: line.split(" ", 1)[1] for line in lines}
    kept = [line for line in lines if not line.startswith(("h3,", "h4,"))]
    known_hosts(bench).write_text("\n".join([*kept, f"h4 {keys['h1']}"]) + "\n")
    done = bench.launch()
    assert done.returncode == 1
    assert "3 of 4 hosts cannot take part; nothing was started" in done.stderr
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith("  h")}
    assert "cannot be reached" in rows["h2"]
    assert "its host key is unknown" in rows["h3"]
    assert "accept_new_host_keys" in rows["h3"]
    assert "its host key has changed" in rows["h4"]
    assert "Traceback" not in done.stderr
    assert is_empty(bench.exp_dir)
    done = bench.launch("+experiment.runner.accept_new_host_keys=true")
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith("  h")}
    assert set(rows) == {"h2", "h4"}
    assert any(line.startswith("h3 ") for line in known_hosts(bench).read_text().splitlines())
    assert f"h4 {keys['h4']}" not in known_hosts(bench).read_text()


def test_a_wrong_key_and_an_unknown_name(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(hostfile="h1 slots=1\nnowhere slots=1\n")
    key = bench.hosts.layout.control.home / ".ssh" / "id_ed25519"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    done = bench.launch()
    assert done.returncode == 1
    assert "lets root in by none of this user's keys (root@h1)" in done.stderr
    assert "the name `nowhere` is not known" in done.stderr
    assert is_empty(bench.exp_dir)


def test_a_folder_that_is_not_shared_is_told(make_bench: MakeBench, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    bench = make_bench(2, (tmp_path / "own",))
    bench.write()
    done = bench.launch(f"experiment.exp_dir={tmp_path / 'own' / 'exp'}", "experiment.task.entrypoint=nosuch.py")
    assert done.returncode == 2
    assert done.stderr.count("does not see the experiment folder") == 2
    assert done.stderr.count("entry point") == 2
    assert is_empty(tmp_path / "own")


def test_a_taken_port_on_the_head_host(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(master_port=23456)
    code = "import socket, time; s = socket.create_server(('', 23456)); time.sleep(100)"
    with subprocess.Popen(bench.hosts.command(["python3", "-c", code], "h1")) as holder:
        try:
            wait_for(lambda: bench.launch().returncode == 1, 30)
            done = bench.launch()
        finally:
            holder.kill()
    assert "port 23456 (`experiment.runner.master_port`) is taken by process" in done.stderr


def test_local_with_other_machines_is_a_fault(make_bench: MakeBench) -> None:
    bench = make_bench(1)
    bench.write(1, type="local")
    done = bench.launch()
    assert done.returncode == 2
    assert "experiment.runner.type: is local, but the hostfile names other machines: h1" in done.stderr


# --- faults of a running job -----------------------------------------------------------------------------------------


def test_a_rank_killed_on_one_host_ends_the_others_and_is_named(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(slots=2)
    assert bench.launch().returncode == 0
    os.kill(pid_of(bench, 3), signal.SIGKILL)
    wait_for(lambda: bench.status()["state"] == "failed")
    wait_for(lambda: bench.status()["ended"])
    state = bench.status()
    assert state["reason"] == "host_1_h2: rank 3 died of SIGKILL"
    assert state["exit_code"] == 1
    assert [rank["rank"] for rank in state["ranks"] if rank["is_first_failure"]] == [3]
    assert [rank["signal"] for rank in state["ranks"] if rank["rank"] == 3] == ["SIGKILL"]
    wait_for(lambda: bench.list_left() == [], 20)


def test_a_rank_that_fails_at_the_start_is_named_with_its_last_lines(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    done = bench.launch("+experiment.envs.FAIL_AT_START='1'", "experiment.runner.start_timeout_s=60")
    if done.returncode == 0:  # it lived for the 3 s after which a rank that announces nothing counts as up
        wait_for(lambda: bench.status()["state"] == "failed")
        assert "rank 1 ended with exit code 1" in bench.status()["reason"]
    else:
        assert "did not start on host_1_h2: rank 1 ended with exit code 1" in done.stderr
        assert "  out of luck" in done.stderr
    wait_for(lambda: bench.list_left() == [], 30)


def test_a_job_outlives_its_launcher_and_is_found_again(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and bench.status()["state"] == "running")
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.communicate()
    assert bench.status()["state"] == "running"
    with bench.popen("logs", "-f", str(bench.exp_dir)) as follower:
        time.sleep(2)
        (bench.base / "go").touch()
        out, _ = follower.communicate(timeout=PATIENCE_S)
    assert "rank 1 is done" in out
    assert bench.status()["state"] == "succeeded"
    assert bench.list_left() == []


def test_a_host_that_is_cut_off_is_told_and_never_called_finished(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    assert bench.launch().returncode == 0
    bench.hosts.cut("h2")
    state = bench.status()
    assert state["state"] == "unreachable"
    assert "host_1_h2: cannot be reached" in state["reason"]
    assert [host["state"] for host in state["hosts"]][1] == "unreachable"
    again = bench.launch()
    assert again.returncode == 1
    assert "h2  cannot be reached" in again.stderr
    stopped = bench.call("stop", str(bench.exp_dir))
    assert "Traceback" not in stopped.stderr
    assert bench.status()["hosts"][0]["state"] == "stopped"
    wait_for(lambda: bench.list_left() == [])  # the folder, which h2 still sees, has told it
    bench.hosts.join("h2")
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert bench.status()["state"] == "stopped"
    assert bench.list_left() == []


def test_a_killed_agent_ends_the_job_on_all_hosts(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    assert bench.launch().returncode == 0
    agent = bench.status()["hosts"][1]["agent_pid"]
    subprocess.run(bench.hosts.command(["kill", "-KILL", str(agent)], "h2"), check=True)
    wait_for(lambda: bench.status()["ended"])
    state = bench.status()
    assert state["state"] == "lost"
    assert "host_1_h2: the agent" in state["reason"]
    assert [host["state"] for host in state["hosts"]] == ["stopped", "lost"]
    assert bench.list_left() == []


def test_watchers_killed_at_one_stroke_leave_nothing_after_a_stop(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    assert bench.launch().returncode == 0
    host = bench.status()["hosts"][1]
    pids = [str(host["agent_pid"]), str(host["guard_pid"])]
    subprocess.run(bench.hosts.command(["kill", "-KILL", *pids], "h2"), check=True)
    wait_for(lambda: bench.status()["hosts"][1]["state"] == "lost")
    assert "host_1_h2" in bench.status()["reason"]
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert bench.list_left() == []


@pytest.mark.slow
def test_a_launch_ends_what_a_stale_run_left(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    assert bench.launch().returncode == 0
    stale = [int(line.split()[0]) for line in bench.list_left()]
    for pid in stale:
        os.kill(pid, signal.SIGSTOP)  # they outlive the SIGTERM that the kernel sends
    for host, state in zip(("h1", "h2"), bench.status()["hosts"], strict=True):
        words = ["kill", "-KILL", str(state["agent_pid"]), str(state["guard_pid"])]
        subprocess.run(bench.hosts.command(words, host), check=True)
    wait_for(lambda: bench.status()["state"] == "lost")
    assert bench.status()["num_leftovers"] == len(stale)
    assert bench.launch().returncode == 0
    assert bench.status()["state"] == "running"
    assert not [pid for pid in stale if Path(f"/proc/{pid}").exists()]
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert bench.list_left() == []


def test_an_agent_that_does_not_start_ends_the_others(make_bench: MakeBench) -> None:
    """h2 answers what it is asked before, and is gone when it is told to start."""
    bench = make_bench()
    wrapper = bench.base / "bin" / "python"
    wrapper.parent.mkdir()
    (wrapper.parent / "torchrun").symlink_to(Path(sys.executable).with_name("torchrun"))
    wrapper.write_text(f"""#!/bin/sh\nLC_ALL=C sed -u '/"errand": "start"/Q' | exec {sys.executable} "$@"\n""")
    wrapper.chmod(0o755)
    bench.write(python={"h2": str(wrapper)})
    done = bench.launch()
    assert done.returncode == 1
    assert "1 of 2 hosts cannot take part; all were ended" in done.stderr
    assert bench.list_left() == []
    assert [host["state"] for host in bench.status()["hosts"]] == ["stopped", "never_started"]
    shown = bench.call("status", str(bench.exp_dir))
    assert (shown.returncode, "never_started" in shown.stdout, shown.stderr) == (0, True, "")
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    nothing = bench.call("status", str(bench.base))
    assert (nothing.returncode, "Traceback" in nothing.stderr) == (2, False)


def test_a_launcher_that_stays_ends_the_job_when_a_host_is_cut_off(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and bench.status()["state"] == "running")
        bench.hosts.cut("h2")
        _, err = launcher.communicate(timeout=2 * PATIENCE_S)
    assert launcher.returncode not in (0, None)
    assert "host_1_h2 cannot be reached" in err
    assert bench.status()["hosts"][0]["state"] == "stopped"
    assert bench.list_left() == []


@pytest.mark.slow
def test_a_host_that_loses_its_power_is_missed_without_a_launcher(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write()
    assert bench.launch().returncode == 0
    bench.hosts.kill("h2")
    assert bench.status()["state"] == "unreachable"
    wait_for(lambda: bench.list_left() == [], 2 * PATIENCE_S)
    first, second = bench.status()["hosts"]
    assert second["state"] == "unreachable"
    assert first["state"] in ("lost", "failed")
    bench.hosts.start("h2")
    state = bench.status()
    assert state["hosts"][1]["state"] == "lost"
    assert state["state"] in ("lost", "failed")
    assert bench.launch().returncode == 0
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
