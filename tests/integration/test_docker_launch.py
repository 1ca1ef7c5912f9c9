"""Jobs in containers: all of it happens inside, words arrive as they were, and a stop ends what is inside."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import start_container, write_docker
from hosts import MakeHosts, missing
from ssh_jobs import Bench, is_empty, pid_of, wait_for

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")
pytest.importorskip("torch")

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> MakeBench:
    """Hosts with a stand-in for docker, and a container `box` on each."""

    def make(num_hosts: int, hostfile: str | None = None) -> Bench:
        base = tmp_path / "base"
        base.mkdir()
        bench = Bench(make_hosts(num_hosts), base)
        for number in range(1, num_hosts + 1):
            host = f"h{number}"
            program = write_docker(base / host)
            words = ["mount", "--bind", str(program), "/usr/local/bin/docker"]
            Path("/usr/local/bin/docker").exists() or pytest.skip("there is no /usr/local/bin/docker to stand in for")
            subprocess.run(bench.hosts.command(words, host), check=True)
            start_container(lambda argv, host=host: run_at(bench, argv, host), base / host, "box")
        bench.write(num_hosts, slots=1, hostfile=hostfile, docker="box", python=sys.executable)
        return bench

    return make


def run_at(bench: Bench, argv: list[str], host: str) -> str:
    return subprocess.run(bench.hosts.command(argv, host), capture_output=True, text=True, check=True).stdout


def test_a_job_in_containers_of_two_hosts(make_bench: MakeBench) -> None:
    bench = make_bench(2)
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    wait_for(lambda: "secret" in bench.call("logs", str(bench.exp_dir)).stdout)
    shown = bench.call("logs", str(bench.exp_dir)).stdout
    assert "quoted: a 'b' \"c\" $HOME `d` \\e of host: two secret: 12" in shown
    for number in (0, 1):
        inner = Path(bench.base, f"h{number + 1}", "box").read_text().strip()
        inside = run_at(bench, ["readlink", f"/proc/{inner}/ns/pid"], f"h{number + 1}").strip()
        assert str(Path(f"/proc/{pid_of(bench, number)}/ns/pid").readlink()) == inside
    bystander = subprocess.Popen(bench.hosts.command(["bash", "-c", "exec -a torchrun sleep 1000"], "h1"))
    try:
        assert [host["state"] for host in bench.status()["hosts"]] == ["running", "running"]
        assert "already holds a job that runs" in bench.launch().stderr
        stopped = bench.call("stop", str(bench.exp_dir))
        assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
        assert bench.list_left() == []
        assert bench.status()["reason"].startswith("stopped by root on")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_container_that_is_not_there_is_told(make_bench: MakeBench) -> None:
    bench = make_bench(2)
    done = bench.launch("experiment.runner.python={h2: nosuchpython}")
    assert "h2  has no nosuchpython in its container `box`" in done.stderr
    assert "name the interpreter there by `experiment.runner.python`" in done.stderr
    (bench.base / "h2" / "box").unlink()
    done = bench.launch()
    assert done.returncode == 1
    assert "1 of 2 hosts cannot take part; nothing was started" in done.stderr
    assert "h2  has no running container `box` (`experiment.runner.docker`): Error response" in done.stderr
    assert is_empty(bench.exp_dir)


def test_a_container_of_the_launching_machine(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on any other host, with a command in place of a connection."""
    bench = make_bench(1)
    bench.write(hostfile="localhost slots=2\n", docker="box", python=sys.executable)
    program = write_docker(bench.base / "here")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin:/usr/sbin:/sbin")
    done = bench.launch()
    assert "has no running container `box`" in done.stderr
    outer = start_container(
        lambda argv: subprocess.run(bench.hosts.command(argv), capture_output=True, text=True, check=True).stdout,
        program.parent,
        "box",
    )
    try:
        done = bench.launch("+experiment.envs.GLOO_SOCKET_IFNAME=lo")
        assert done.returncode == 0, done.stderr
        assert bench.status()["state"] == "running"
        assert bench.call("stop", str(bench.exp_dir)).returncode == 0
        assert bench.status()["state"] == "stopped"
        assert bench.list_left() == []
    finally:
        subprocess.run(["kill", "-KILL", str(outer)], check=True)
