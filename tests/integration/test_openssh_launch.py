"""Jobs over test hosts by the machine's own `ssh`: its configuration, the same words for the same faults."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import MakeHosts, missing
from ssh_jobs import Bench, is_empty, wait_for
from test_ssh_launch import known_hosts

pytest_plugins = ("host_fixtures",)
pytestmark = [
    pytest.mark.xdist_group("openssh"),
    pytest.mark.hosts,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

pytest.importorskip("torch")

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> MakeBench:
    def make(num_hosts: int = 2) -> Bench:
        base = tmp_path / "base"
        base.mkdir()
        return Bench(make_hosts(num_hosts), base)

    return make


def list_clients() -> list[str]:
    done = subprocess.run(["pgrep", "-af", "flagscale-ssh-"], capture_output=True, text=True)
    return done.stdout.splitlines()


def test_a_job_by_a_jump_host_and_an_alias(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(hostfile="h1 slots=1\nfar slots=1\n", ssh_client="openssh", master_addr="h1")
    config = known_hosts(bench).with_name("config")
    config.write_text("Host far\n  HostName h2\n  ProxyJump h1\n  StrictHostKeyChecking no\n")
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert [host["state"] for host in bench.status()["hosts"]] == ["running", "running"]
    h1 = bench.hosts.host("h1")
    log = (bench.hosts.host("h2").folder / "sshd.log").read_text()
    assert f"Accepted publickey for root from {h1.address}" in log
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert bench.list_left() == []
    assert bench.status()["state"] == "stopped"
    wait_for(lambda: not list_clients())  # a client ends a moment after us, by itself


def test_what_is_wrong_is_told_in_the_same_words(make_bench: MakeBench) -> None:
    bench = make_bench(4)
    bench.write(hostfile="".join(f"h{n} slots=1\n" for n in range(1, 5)) + "nowhere slots=1\n", ssh_client="openssh")
    bench.hosts.kill("h2")
    lines = known_hosts(bench).read_text().splitlines()
    keys = {line.split(",")[0]: line.split(" ", 1)[1] for line in lines}
    kept = [line for line in lines if not line.startswith(("h3,", "h4,"))]
    known_hosts(bench).write_text("\n".join([*kept, f"h4 {keys['h1']}"]) + "\n")
    done = bench.launch()
    assert done.returncode == 1
    assert "4 of 5 hosts cannot take part; nothing was started" in done.stderr
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith("  ")}
    assert "cannot be reached: Connection refused (h2)" in rows["h2"]
    assert "its host key is unknown (No ED25519 host key is known for h3" in rows["h3"]
    assert "its host key has changed" in rows["h4"]
    assert "the name `nowhere` is not known" in rows["nowhere"]
    assert is_empty(bench.exp_dir)
    done = bench.launch("+experiment.runner.accept_new_host_keys=true")
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith("  ")}
    assert set(rows) == {"h2", "h4", "nowhere"}
    assert keys["h3"] in known_hosts(bench).read_text()  # the name may be hashed
    key = bench.hosts.layout.control.home / ".ssh" / "id_ed25519"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    assert "lets this user in by none of this user's keys (h1)" in bench.launch().stderr
    wait_for(lambda: not list_clients())  # a client ends a moment after us, by itself


def test_a_host_that_is_cut_off_is_unreachable(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.write(ssh_client="openssh")
    assert bench.launch().returncode == 0
    bench.hosts.cut("h2")
    state = bench.status()
    assert state["state"] == "unreachable"
    assert "host_1_h2: cannot be reached: no answer within 10 s (h2)" in state["reason"]
    bench.hosts.join("h2")
    wait_for(lambda: bench.status()["state"] != "unreachable")
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert bench.list_left() == []
