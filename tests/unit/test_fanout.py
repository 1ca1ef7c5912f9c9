"""The benchmark of the fan-out measures what it says: real hosts, a real loop, a broken promise in the exit code."""

import sys
from pathlib import Path

import pytest
from factories import ROOT
from hosts import MakeHosts, missing

sys.path.insert(0, str(ROOT / "benchmarks"))

import fanout

pytest_plugins = ("host_fixtures",)


def test_ratios_and_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    one, many, loop = fanout.Cost(1.0, 0.1, 0.0), fanout.Cost(2.0, 3.0, 1.6), fanout.Cost(20.0, 2.0, 1.0)
    assert fanout.compare("launch", one, many, loop, 64)
    assert not fanout.compare("launch", fanout.Cost(0.4, 0.1, 0.0), many, loop, 64)
    assert not fanout.compare("launch", one, many, fanout.Cost(15.0, 2.0, 1.0), 64)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "launch: 64 hosts take 2.00 times what one takes (promised at most 4), and 10.00 times less"
    )
    assert first.endswith("kept")
    assert "machine: 3.00 processor seconds (25 ms a host)" in second


@pytest.mark.hosts
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_every_verb_and_its_loop_do_their_work(make_hosts: MakeHosts, tmp_path: Path) -> None:
    pytest.importorskip("paramiko")
    bench = fanout.Bench(make_hosts(2), tmp_path)
    bench.write(2)
    for run in (bench.verb, bench.loop):
        for verb in fanout.VERBS:
            cost = run(verb, 2)
            assert cost.wall_s > 0
            assert cost.cpu_s > 0
