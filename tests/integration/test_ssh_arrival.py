"""What reaches the ranks of several unlike hosts: every word and variable as it was written, and nobody else's."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import pytest
from hosts import MakeHosts, missing
from local_jobs import wait_for
from ssh_jobs import Bench

from flagscale.runner.plan.common import dump_yaml

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")
pytest.importorskip("torch")

MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(make_hosts: MakeHosts, tmp_path: Path) -> MakeBench:
    def make(num_hosts: int) -> Bench:
        (tmp_path / "first").mkdir()
        return Bench(make_hosts(num_hosts), tmp_path / "first")

    return make


DUMP = """
import json, os, sys
from pathlib import Path
host, rank = os.uname().nodename, os.environ["RANK"]
told = {"argv": sys.argv, "environ": dict(os.environ)}
Path(__file__).with_name(f"{host}.{rank}.json").write_text(json.dumps(told))
"""
NASTY = (
    *("", " ", "two  words", "'", '"', "it's \"so\"", "$HOME", "$(id)", "`id`", "$$", "a$local_rank", "!"),
    *("\\", "\\\\n", "a\nb\n", "\t", "*", "?[a-z]", "~", "{a,b}", "a;b", "a&&b", "a|b", "a>b", "#no", "-x", "--", "="),
    *("%s", "é ß 中文 \U0001f600", "\u2028", "\x01\x7f", "null", "true", "1e-5", "012", "[1, 2]", "trailing \\"),
)  # fmt: skip


def make_values() -> dict[str, str]:
    """Every nasty text, and some of any characters: all but what ends a C string and what YAML gives a meaning to."""
    draw = random.Random(7)
    alphabet = [chr(code) for code in (*range(1, 127), *range(0xA1, 0x2FF), 0x85, 0x2029, 0xFEFF, 0x1F1E6)]
    drawn = ("".join(draw.choices(alphabet, k=40)).replace("${", "$") for _ in range(20))
    return {f"VALUE_{number}": text for number, text in enumerate((*NASTY, *drawn))}


def write(bench: Bench, hostfile: str, source: str = DUMP, **experiment: Any) -> None:
    bench.write(hostfile=hostfile, foreground=True, **experiment.pop("runner", {}))
    (bench.base / "rank.py").write_text(source)
    path = bench.base / "conf" / "config.yaml"
    config = json.loads(path.read_text())
    config["experiment"] |= experiment
    path.write_text(dump_yaml(config))


def load_dumps(bench: Bench) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(bench.base.glob("h*.json"))}


def test_words_and_variables_arrive_as_they_were_written(make_bench: MakeBench) -> None:
    values = make_values()
    bench = make_bench(3)
    write(
        bench,
        "h1 slots=1 type=cpu\nroot@h2:22 slots=1 type=Generic_CPU\nh3 slots=2 type=cpu\n",
        envs={**values, "OF": "all", "GLOO_SOCKET_IFNAME": "lo", "PATH_LIKE": "/a:/b"},
        device_type_specific={"cpu": {"OF": "cpu $HOME 'x'", "TYPE": "cpu"}, "Generic_CPU": {"TYPE": 'é\n"y"'}},
        node_specific={"h3": {"OF": "node `z`", "GLOO_SOCKET_IFNAME": "eth0"}},
    )
    model = {name.lower(): text for name, text in values.items()}
    (bench.base / "conf" / "train" / "small.yaml").write_text(
        dump_yaml({"system": {}, "model": model, "data": {"listed": ["a b", "c'd"], "nested": {"deep": "\n"}}})
    )
    shown = bench.call("dryrun", str(bench.base / "conf" / "config.yaml"), "--json")
    assert shown.returncode == 0, shown.stderr
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    dumps = load_dumps(bench)
    assert list(dumps) == ["h1.0", "h2.1", "h3.2", "h3.3"]
    for host in json.loads(shown.stdout)["hosts"]:
        (process,) = host["processes"]
        planned = process["argv"][process["argv"].index(str(bench.base / "rank.py")) :]
        planned = [Template(word).safe_substitute(local_rank="?") for word in planned]  # as torchrun does
        for name in (name for name in dumps if name.startswith(host["host"] + ".")):
            told = dumps[name]
            assert told["argv"] == planned
            environ = {key: told["environ"].get(key) for key in process["environment"]}
            assert environ == process["environment"]
    for name, of, kind, interface in (
        ("h1.0", "cpu $HOME 'x'", "cpu", "lo"),
        ("h2.1", "all", 'é\n"y"', "lo"),
        ("h3.3", "node `z`", "cpu", "eth0"),
    ):
        environ = dumps[name]["environ"]
        assert (environ["OF"], environ["TYPE"], environ["GLOO_SOCKET_IFNAME"]) == (of, kind, interface)
        assert values.items() <= environ.items()
        words = {word.split("=", 1)[-1] if word.startswith("--value-") else word for word in dumps[name]["argv"]}
        assert set(values.values()) <= words


@pytest.mark.parametrize("choice", ["found", "before_start", "host"])
def test_the_interface_is_found_where_nobody_says_which(make_bench: MakeBench, choice: str) -> None:
    bench = make_bench(2)
    write(
        bench,
        "h1 slots=1\nh2 slots=1\n",
        cmds={"before_start": "export GLOO_SOCKET_IFNAME=lo0"} if choice == "before_start" else {},
    )
    if choice == "host":
        for host in bench.hosts.layout.hosts:
            (host.home / ".bashrc").write_text("export GLOO_SOCKET_IFNAME=of_the_host\n")
    assert bench.launch().returncode == 0
    wanted = {"found": "eth0", "before_start": "lo0", "host": "of_the_host"}[choice]
    assert {row["environ"]["GLOO_SOCKET_IFNAME"] for row in load_dumps(bench).values()} == {wanted}


def test_per_node_task_is_a_job_of_its_own_on_every_host(make_bench: MakeBench) -> None:
    """The port of the one is taken on the other, so each must find one for itself; the failure of one is its own."""
    bench = make_bench(2)
    source = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
print(f"{os.uname().nodename}: rank {dist.get_rank()} of {dist.get_world_size()}", flush=True)
dist.barrier()
dist.destroy_process_group()
sys.exit(3 if os.uname().nodename == "h2" and os.environ["RANK"] == "1" else 0)
"""
    write(bench, "h1 slots=2\nh2 slots=2\n", source, runner={"per_node_task": True})
    done = bench.launch()
    assert done.returncode == 1
    for name in ("h1", "h2"):
        output = next((bench.exp_dir / "logs").glob(f"host_*_{name}.output")).read_text()
        assert all(f"{name}: rank {rank} of 2" in output for rank in range(2)), output
    wait_for(lambda: bench.status()["ended"])
    state = bench.status()
    assert [host["state"] for host in state["hosts"]] == ["succeeded", "failed"]
    assert state["reason"] == "host_1_h2: rank 1 ended with exit code 3"
    assert bench.list_left() == []


def test_two_jobs_on_the_same_hosts_do_not_meet(make_bench: MakeBench, tmp_path: Path) -> None:
    first = make_bench(2)
    (tmp_path / "second").mkdir()
    second = Bench(first.hosts, tmp_path / "second")
    for bench in (first, second):
        bench.write()
        assert bench.launch().returncode == 0
    assert first.call("stop", str(first.exp_dir)).returncode == 0
    assert (first.list_left(), len(second.list_left()) > 0) == ([], True)
    assert second.status()["state"] == "running"
    assert second.call("stop", str(second.exp_dir)).returncode == 0
    assert second.list_left() == []
    ports = {json.loads(bench.run.job_path.read_text())["values"]["master_port"] for bench in (first, second)}
    assert len(ports) == 2
