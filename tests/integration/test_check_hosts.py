"""`flagscale check` over real test hosts: all is well, or what is wrong where, and nothing stays."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import MakeHosts, missing
from ssh_jobs import Bench

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")

Told = dict[tuple[str, str], tuple[str, str]]


def check(bench: Bench, *words: str) -> tuple[int, Told]:
    """(exit code, (host, check) -> (kind, text))"""
    done = bench.call("check", str(bench.base / "conf" / "config.yaml"), "--json", *words)
    assert "Traceback" not in done.stderr, done.stderr
    rows = json.loads(done.stdout)["findings"]
    return done.returncode, {(row["host"], row["check"]): (row["kind"], row["text"]) for row in rows}


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> Callable[[int], Bench]:
    def make(num_hosts: int) -> Bench:
        (tmp_path / "base").mkdir()
        return Bench(make_hosts(num_hosts), tmp_path / "base")

    return make


def test_good_hosts_and_then_bad_ones(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    bench.write(4, device_type="cpu")
    code, told = check(bench)
    assert {kind for kind, _ in told.values()} == {"ok"}
    assert code == 0
    assert told["h1", "port"][1].endswith("is free")
    assert {told[f"h{number}", "port"][1] for number in (2, 3, 4)} == {"reaches h1"}
    assert {told[f"h{number}", "network"][1] for number in (1, 2, 3, 4)} == {"eth0"}
    assert not bench.exp_dir.exists()

    bench.hosts.kill("h2")
    bench.hosts.cut("h3")
    (bench.hosts.host("h4").etc / "hosts").write_text("127.0.0.1 localhost\n")
    code, told = check(
        bench, "+experiment.node_specific.h1={GLOO_SOCKET_IFNAME: ib0}", "experiment.task.entrypoint=gone.py"
    )
    wrong = {key: text for key, (kind, text) in told.items() if kind != "ok"}
    assert set(wrong) == {
        *(("h1", "job"), ("h1", "network"), ("h2", "reach"), ("h3", "reach")),
        *(("h4", "job"), ("h4", "network"), ("h4", "port")),
    }
    assert code == 1
    assert "there is no interface ib0; expected one of eth0, lo" in wrong["h1", "network"]
    assert "cannot be reached" in wrong["h2", "reach"]
    assert "no answer within 10 s" in wrong["h3", "reach"]
    assert "cannot connect to h1 port" in wrong["h4", "port"]
    assert not bench.exp_dir.exists()


def test_a_launch_asks_for_the_name_of_the_head_itself(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    bench.write()
    (bench.hosts.host("h2").etc / "hosts").write_text("127.0.0.1 localhost\n")
    done = bench.launch()
    assert done.returncode == 2
    assert "does not know the name `h1`, where ranks meet" in done.stderr


def test_a_table_says_it_too(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    bench.write(hostfile="h1 slots=1\nnowhere slots=1\n")
    done = bench.call("check", str(bench.base / "conf" / "config.yaml"))
    assert done.returncode == 1
    head, *rows = done.stdout.splitlines()
    assert head.split()[:2] == ["host", "reach"]
    assert rows[0].startswith("h1")
    assert rows[1].split() == ["nowhere", "fault"]
    assert rows[-1] == "nowhere: cannot be reached: the name `nowhere` is not known"
