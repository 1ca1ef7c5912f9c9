"""A service whose replicas are on other hosts, reached over SSH: behind a key there, and ended from here."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from factories import serve_model, serve_tree, write_config
from hosts import MakeHosts, missing, run_at
from services import FAKE, Bench, wait_for
from ssh_jobs import Bench as HostBench

from flagscale.serve.folder import find_control

pytest_plugins = ("host_fixtures",)
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

pytest.importorskip("paramiko")

PORT = 18431


def make_bench(make_hosts: MakeHosts, base: Path, num_hosts: int, is_shared: bool = True, **deploy: Any) -> HostBench:
    """is_shared: all hosts see one experiment folder; else each has its own"""
    (base / "exp").mkdir(parents=True)
    Bench.make(base)  # the model and the fake engine
    bench = HostBench(make_hosts(num_hosts, () if is_shared else (base / "exp",)), base)
    (base / "hostfile").write_text("".join(f"h{number} slots=2 type=cpu\n" for number in range(1, num_hosts + 1)))
    args = {"model": str(base / "model"), "served_model_name": "m"}
    is_paired = deploy.get("prefill_decode_disaggregation", False)
    resources = {} if is_paired else {"num_replicas": num_hosts}
    model = serve_model(serve_id="m", engine_args=args, resources=resources)
    runner: dict[str, Any] = {
        "hostfile": str(base / "hostfile"),
        "bin_dir": str(base / "bin"),
        "start_timeout_s": 90,
        "no_shared_fs": not is_shared,
        "deploy": {"port": PORT, **deploy},
    }
    addresses = {host.name: {"VLLM_HOST_IP": bench.hosts.host(host.name).address} for host in bench.hosts.layout.hosts}
    tree = serve_tree(
        model,
        experiment__exp_dir=str(bench.exp_dir),
        experiment__runner=runner,
        experiment__node_specific=addresses if is_paired else {},
    )
    write_config(base / "conf", tree, "serve")
    return bench


def status_of(bench: HostBench) -> dict[str, Any]:
    done = bench.call("serve", "status", str(bench.exp_dir), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ask(bench: HostBench, url: str, on: str | None = None, times: int = 1) -> str:
    """What is answered; `times` in a row, and without a pause between them."""
    body = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 3})
    command = ("curl", "-s", *(f"{url}/v1/completions",) * times, "-H", "Content-Type: application/json", "-d", body)
    return run_at(bench.hosts, *command, on=on).stdout


def list_engines(bench: HostBench) -> list[str]:
    needle = str(bench.base / "model").encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if needle in words and str(FAKE).encode() in words:
            found.append(folder.name)
    return found


def test_replicas_on_two_hosts_behind_one_address(make_hosts: MakeHosts, tmp_path: Path) -> None:
    bench = make_bench(make_hosts, tmp_path / "base", 2)
    done = bench.call("serve", str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 0, done.stderr
    status = status_of(bench)
    assert [(row["hosts"], row["state"]) for row in status["replicas"]] == [(["h1"], "ready"), (["h2"], "ready")]
    assert '"w0 w1 w2"' in ask(bench, f"http://127.0.0.1:{PORT}")
    # an engine that other machines can reach answers nobody without the controller's key
    assert "wrong key" in ask(bench, status["replicas"][0]["url"], on="h2")
    assert bench.call("serve", "doctor", str(bench.exp_dir)).returncode == 0

    bench.hosts.kill("h2")
    wait_for(lambda: status_of(bench)["state"] == "degraded")
    for _ in range(3):
        assert '"w0 w1 w2"' in ask(bench, f"http://127.0.0.1:{PORT}")
    bench.hosts.start("h2")
    # a replica may just be on its way to the host that came back: it is waited for, and ended
    done = bench.call("serve", "stop", str(bench.exp_dir), timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert list_engines(bench) == []


def test_caches_go_from_one_host_to_another(make_hosts: MakeHosts, tmp_path: Path) -> None:
    """Prompts are computed on h2 and answered from h1, by addresses that each reaches of the other."""
    words = {"prefill_address": "h2", "decode_address": "h1", "prefill_decode_log_dir": str(tmp_path / "halves")}
    bench = make_bench(make_hosts, tmp_path / "base", 2, prefill_decode_disaggregation=True, **words)
    done = bench.call("serve", str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 0, done.stderr
    rows = {row["role"]: row for row in status_of(bench)["replicas"]}
    assert (rows["prefill"]["hosts"], rows["decode"]["hosts"]) == (["h2"], ["h1"])
    assert '"w0 w1 w2"' in ask(bench, f"http://127.0.0.1:{PORT}")
    assert [row["requests"] for row in status_of(bench)["replicas"]] == [2, 2]
    assert "Loading weights" in (tmp_path / "halves" / "prefill_0" / "host_0_h2.output").read_text()
    done = bench.call("serve", "stop", str(bench.exp_dir), timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert list_engines(bench) == []


def test_a_fault_of_one_host_is_named_and_nothing_is_left_on_the_other(make_hosts: MakeHosts, tmp_path: Path) -> None:
    bench = make_bench(make_hosts, tmp_path / "base", 2)
    (bench.base / "hostfile").write_text("h1 slots=2 type=cpu\nh9 slots=2 type=cpu\n")
    done = bench.call("serve", str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 1
    assert "the service did not start: m-1: " in done.stderr
    assert "h9" in done.stderr
    assert list_engines(bench) == []


@pytest.mark.slow
def test_the_seat_of_a_lost_host_is_taken_elsewhere_until_the_host_is_back(
    make_hosts: MakeHosts, tmp_path: Path
) -> None:
    """The cable of h2 is pulled: its engine lives on, out of reach, and may not be anybody's when it is plugged in."""
    bench = make_bench(make_hosts, tmp_path / "base", 2, is_shared=False, host_lost_after_s=3)
    done = bench.call("serve", str(bench.base / "conf" / "serve.yaml"))
    assert done.returncode == 0, done.stderr

    def replicas() -> dict[str, tuple[str, list[str]]]:
        return {row["name"]: (row["state"], row["hosts"]) for row in status_of(bench)["replicas"]}

    assert replicas() == {"m-0": ("ready", ["h1"]), "m-1": ("ready", ["h2"])}
    answered = ask(bench, f"http://127.0.0.1:{PORT}", times=4)
    bench.hosts.cut("h2")
    # over a connection that is open already no error comes: who waits at the lost host is answered elsewhere
    answered += ask(bench, f"http://127.0.0.1:{PORT}", times=4)
    assert answered.count('"choices"') == 8
    moved = {"m-0": ("ready", ["h1"]), "m-1": ("lost", ["h2"]), "m-2": ("ready", ["h1"])}
    wait_for(lambda: replicas() == moved, 120)
    assert status_of(bench)["state"] == "ready"
    assert len(list_engines(bench)) == 3
    examined = bench.call("serve", "doctor", str(bench.exp_dir))
    assert (examined.returncode, "lost at h2: h2 " in examined.stdout) == (1, True), examined.stdout

    # the controller's successor finds the same: what lives is its own, what is out of reach is nobody's yet
    control = find_control(bench.exp_dir)
    assert control is not None
    os.kill(control.pid, signal.SIGKILL)
    wait_for(lambda: find_control(bench.exp_dir) != control)
    wait_for(lambda: replicas() == moved, 120)
    assert len(list_engines(bench)) == 3
    assert '"w0 w1 w2"' in ask(bench, f"http://127.0.0.1:{PORT}")

    bench.hosts.join("h2")
    wait_for(lambda: "m-1" not in replicas(), 120)
    assert replicas() == {"m-0": ("ready", ["h1"]), "m-2": ("ready", ["h1"])}
    assert len(list_engines(bench)) == 2
    assert run_at(bench.hosts, "pgrep", "-f", str(FAKE), on="h2").stdout == ""
    done = bench.call("serve", "stop", str(bench.exp_dir), timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert list_engines(bench) == []
