"""A graph of models over two hosts: its program and the head of Ray here, a node of Ray on the other."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import write_config
from graphs import graph_tree, node
from hosts import MakeHosts, missing, run_at
from services import wait_for
from ssh_jobs import Bench

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("ray.serve")
pytest.importorskip("paramiko")

PORT = 18433
MODELS = """
import os

class Begin:
    def forward(self, prompt):
        return [os.uname().nodename, os.getcwd(), open("word").read()]

class End:
    def forward(self, first):
        return [first, [os.uname().nodename, os.getcwd(), open("word").read()]]
"""


def status_of(bench: Bench) -> dict[str, Any]:
    done = bench.call("serve", "status", str(bench.exp_dir), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nodes_are_placed_where_there_is_room_and_all_ends_together(make_hosts: MakeHosts, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "work").mkdir(parents=True)
    (base / "work" / "models.py").write_text(MODELS)
    (base / "work" / "word").write_text("carried")
    bench = Bench(make_hosts(1), base)
    (base / "hostfile").write_text("localhost slots=2 type=cpu\nh1 slots=2 type=cpu\n")
    wants = {"module": str(base / "work" / "models.py"), "resources": {"num_cpus": 2}}
    nodes = (node("first", "Begin", **wants), node("last", "End", "first", **wants))
    tree = graph_tree(*nodes, experiment__exp_dir=str(bench.exp_dir))
    runner = tree["experiment"]["runner"]
    runner |= {"hostfile": str(base / "hostfile"), "master_addr": bench.hosts.layout.control.address}
    runner["start_timeout_s"] = 300
    runner["deploy"] |= {"port": PORT, "working_dir": str(base / "work")}
    write_config(base / "conf", tree, "serve")
    done = bench.call("serve", str(base / "conf" / "serve.yaml"), timeout_s=400)
    log = "\n".join(path.read_text() for path in bench.exp_dir.glob("serve_logs/*.output"))
    assert done.returncode == 0, done.stderr + log
    status = status_of(bench)
    assert len({row["hosts"][0] for row in status["replicas"]}) == 2
    body = json.dumps({"prompt": "x"})
    header = "Content-Type: application/json"
    told = run_at(bench.hosts, "curl", "-s", f"http://127.0.0.1:{PORT}/generate", "-H", header, "-d", body).stdout
    first, last = json.loads(told)
    assert {first[0], last[0]} > {"h1"}
    assert first[2] == last[2] == "carried"
    assert all(str(base) not in found[1] for found in (first, last))  # each in a copy of the working folder
    assert bench.call("serve", "doctor", str(bench.exp_dir)).returncode == 0
    stopped = bench.call("serve", "stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    wait_for(lambda: bench.list_left() == [])
    assert status_of(bench)["state"] in ("stopped", "succeeded")
