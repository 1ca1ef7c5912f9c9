"""Jobs over test hosts that share no folder: what goes out, what comes back, and how one host learns of another."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts import MakeHosts, missing
from ssh_jobs import Bench, is_empty, pid_of, wait_for, watch_bystander

from flagscale.runner.launch.stacks import find_py_spy

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")
pytest.importorskip("torch")

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> Iterator[MakeBench]:
    """Hosts with an `exp` folder of their own; the program and the configuration are on all of them.

    On the first somebody else's process has to live on whatever the test does.
    """
    with ExitStack() as stack:

        def make(num_hosts: int = 2, **runner: object) -> Bench:
            base = tmp_path / "base"
            (base / "exp").mkdir(parents=True)
            bench = Bench(make_hosts(num_hosts, (base / "exp",)), base)
            bench.write(num_hosts, no_shared_fs=True, **runner)
            stack.enter_context(watch_bystander(bench))
            return bench

        yield make


def run_at(bench: Bench, host: str, *words: str) -> str:
    return subprocess.run(bench.hosts.command(words, host), capture_output=True, text=True, check=True).stdout


def list_files(bench: Bench, host: str) -> set[str]:
    """The files below the experiment folder as the host itself has them."""
    return set(run_at(bench, host, "find", str(bench.exp_dir), "-type", "f", "-printf", "%P\n").split())


def test_a_life_without_a_shared_folder(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench()
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert "on each of h1, h2 its own" in done.stderr
    assert bench.status()["state"] == "running"
    run_id = bench.run.run_id
    there = list_files(bench, "h2")
    assert {f"runs/{run_id}/host_1_h2.spec.json", "logs/host_1_h2.output"} <= there
    assert not any("host_0_h1" in path for path in there)
    here = {str(path.relative_to(bench.exp_dir)) for path in bench.exp_dir.rglob("*") if path.is_file()}
    assert "logs/scripts/host_1_h2_run.sh" in there - here
    wait_for(lambda: "secret" in bench.call("logs", str(bench.exp_dir), "--host", "h2").stdout)
    shown = bench.call("logs", str(bench.exp_dir)).stdout
    assert "host_0_h1 | [default0]:rank 0 of 2 on h1" in shown
    assert "quoted: a 'b' \"c\" $HOME `d` \\e of host: two secret: 12" in shown
    assert "rank 1 of 2 on h2" in bench.call("logs", str(bench.exp_dir), "--rank", "1").stdout
    unknown = bench.call("logs", str(bench.exp_dir), "--host", "h3")
    assert (unknown.returncode, "has no host `h3`; expected one of h1, h2" in unknown.stderr) == (1, True)
    assert " running " in bench.call("list").stdout
    again = bench.launch()
    assert "already holds a job that runs" in again.stderr
    # another machine with the run's folder: the same path, nothing else
    moved = tmp_path / "moved"
    shutil.move(bench.base / "state", moved)
    assert bench.status()["state"] == "running"
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert bench.list_left() == []
    assert "nothing to stop" in bench.call("stop", str(bench.exp_dir)).stdout
    state = bench.status()
    assert (state["state"], state["exit_code"]) == ("stopped", 143)
    assert "stopped by root on" in state["reason"]


def test_a_launcher_that_stays_shows_all_hosts_and_the_end(make_bench: MakeBench) -> None:
    bench = make_bench()
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and bench.status()["state"] == "running")
        (bench.base / "go").touch()
        out, err = launcher.communicate(timeout=90)
    assert launcher.returncode == 0, err
    assert "host_0_h1 | [default0]:rank 0 is done" in out
    assert "host_1_h2 | [default0]:rank 1 is done" in out
    assert bench.status()["state"] == "succeeded"
    assert bench.call("logs", str(bench.exp_dir), "-f").stdout == bench.call("logs", str(bench.exp_dir)).stdout


def test_the_first_failure_ends_all_hosts_without_a_launcher(make_bench: MakeBench) -> None:
    bench = make_bench(3)
    assert bench.launch().returncode == 0
    still = pid_of(bench, 1)
    os.kill(still, signal.SIGSTOP)  # it cannot fail by itself
    os.kill(pid_of(bench, 2), signal.SIGKILL)
    wait_for(lambda: [host for host in bench.status()["hosts"] if host["state"] == "stopping"])
    os.kill(still, signal.SIGCONT)
    wait_for(lambda: bench.list_left() == [], 60)
    state = bench.status()
    assert state["state"] == "failed"
    assert "died of SIGKILL" in state["reason"]
    assert {host["state"] for host in state["hosts"]} == {"failed", "stopped"}
    if find_py_spy():
        assert "Python stacks of rank 0 in " in state["stacks"]
        path = f"{bench.exp_dir}/logs/details/host_0_h1/{bench.run.run_id}/stacks/rank_0.txt"
        saved = subprocess.run(bench.hosts.command(["cat", path], "h1"), capture_output=True, text=True)
        assert "rank.py" in saved.stdout
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0


def test_a_killed_agent_ends_the_others_by_the_wire(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert bench.launch().returncode == 0
    agent = bench.status()["hosts"][0]["agent_pid"]
    subprocess.run(bench.hosts.command(["kill", "-KILL", str(agent)], "h1"), check=True)
    wait_for(lambda: bench.status()["ended"])
    state = bench.status()
    assert "host_0_h1: the agent" in state["reason"]
    first, second = state["hosts"]
    assert first["state"] == "lost"
    if second["state"] != "failed":  # on a busy machine its rank may lose the connection before its agent is told
        assert (second["state"], "ended because of host_0_h1: the agent" in second["reason"]) == ("stopped", True)
    assert bench.list_left() == []


def test_files_are_placed_on_all_hosts_or_on_none(make_bench: MakeBench) -> None:
    bench = make_bench()
    run_at(bench, "h2", "touch", str(bench.exp_dir / "runs"))
    done = bench.launch()
    assert done.returncode == 2
    assert "1 of 2 hosts cannot take part; nothing was started\n  h2  cannot write " in done.stderr
    assert "runs is a file; expected a folder" in done.stderr
    assert list_files(bench, "h1") == set()
    assert list_files(bench, "h2") == {"runs"}
    assert is_empty(bench.exp_dir)


def test_a_disk_that_is_full_before_the_launch_is_told(make_bench: MakeBench) -> None:
    bench = make_bench()
    run_at(bench, "h2", "mount", "-t", "tmpfs", "-o", "size=1m", "tiny", str(bench.exp_dir))
    done = bench.launch()
    assert done.returncode == 1
    assert f"h2  its disk is full: 1 MiB are free in {bench.exp_dir}; expected 64 at least" in done.stderr
    assert list_files(bench, "h1") | list_files(bench, "h2") == set()


def test_a_rank_that_fills_its_host_s_disk_is_named(make_bench: MakeBench) -> None:
    bench = make_bench()
    run_at(bench, "h2", "mount", "-t", "tmpfs", "-o", "size=80m", "small", str(bench.exp_dir))
    done = bench.launch("+experiment.envs.FILL_DISK='1'", f"+experiment.envs.FILL_AT={bench.exp_dir}/filled")
    if done.returncode == 0:
        wait_for(lambda: bench.status()["ended"])
    wait_for(lambda: bench.list_left() == [])
    state = bench.status()
    cause = f"host_1_h2: rank 1 ended with exit code 1; the disk of {bench.exp_dir}/"
    assert (state["state"], state["reason"].startswith(cause)) == ("failed", True), state["reason"]
    assert state["reason"].endswith(" is full")
    assert [host["state"] for host in state["hosts"]] == ["stopped", "failed"]
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0


def test_a_killed_launcher_is_followed_by_another(make_bench: MakeBench) -> None:
    bench = make_bench()
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and bench.status()["state"] == "running")
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.communicate()
    with bench.popen("logs", "-f", str(bench.exp_dir)) as follower:
        wait_for(lambda: bench.status()["state"] == "running")
        (bench.base / "go").touch()
        out, _ = follower.communicate(timeout=180)
    assert "host_1_h2 | [default0]:rank 1 is done" in out
    assert bench.status()["state"] == "succeeded"
    assert bench.list_left() == []


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_missed_without_a_launcher(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert bench.launch().returncode == 0
    for number in (0, 1):
        os.kill(pid_of(bench, number), signal.SIGSTOP)
    bench.hosts.cut("h2")
    assert bench.status()["state"] == "unreachable"
    wait_for(lambda: bench.list_left() == [], 180)
    bench.hosts.join("h2")
    state = bench.status()
    assert [host["state"] for host in state["hosts"]] == ["lost", "lost"]
    assert "no word from host_1_h2 for 60 s" in state["hosts"][0]["reason"]
    assert "no word from host_0_h1 for 60 s" in state["hosts"][1]["reason"]
