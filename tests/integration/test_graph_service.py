"""A graph of models in a real Ray Serve, started, asked, broken and stopped by the command.

One Ray serves most tests of this file. What its classes do is chosen by the request: they meet each other, fail, hang.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from factories import Tree, write_config
from graphs import graph_tree, node
from services import PATIENCE_S, Bench, wait_for

from flagscale.runner.launch.folder import find_current
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.launch.procs import list_procs, read_environ

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.xdist_group("graph_service")

RAY = Path(sys.executable).with_name("ray")
MODELS = '''
import asyncio, os, time
from pathlib import Path

FOLDER = Path(__file__).parent


class Begin:
    def forward(self, prompt: str, act: str):
        if act == "fail":
            raise ValueError(f"cannot begin with {prompt!r}")
        return {"prompt": prompt, "act": act, "pid": os.getpid()}


async def meet(name: str, other: str, asked) -> dict:
    """An interval in which the other branch was seen at work."""
    since = time.time()
    mark = FOLDER / f"{name}.{asked['prompt']}"
    mark.touch()
    while asked["act"] == "meet" and not (FOLDER / f"{other}.{asked['prompt']}").exists():
        await asyncio.sleep(0.01)
    if asked["act"] == "hang":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            (FOLDER / f"{name}.left").touch()
            raise
    return {"since": since, "until": time.time(), "pid": os.getpid(), "begin": asked["pid"]}


class Left:
    async def forward(self, asked):
        if asked["act"] == "die":
            os._exit(3)
        return await meet("left", "right", asked)


class Right:
    async def forward(self, asked):
        return await meet("right", "left", asked)


class End:
    def forward(self, left, right):
        return {"left": left, "right": right, "pid": os.getpid()}


class Broken:
    def __init__(self) -> None:
        import a_module_that_is_not_there

    def forward(self, prompt, act):
        return prompt
'''
NODES = (
    node("begin", "Begin"),
    node("left", "Left", "begin"),
    node("right", "Right", "begin"),
    node("end", "End", "left", "right", resources={"num_replicas": 2}),
)
REQUEST = {"args": ["prompt", "act"], "types": ["str", "str"]}


def make_bench(base: Path, *nodes: Tree, **deploy: Any) -> Bench:
    port = find_free_port()
    assert port is not None
    (base / "models.py").write_text(MODELS)
    tree = graph_tree(*nodes, request=REQUEST, experiment__exp_dir=str(base / "exp"))
    runner = tree["experiment"]["runner"]
    runner["start_timeout_s"] = 300
    runner["deploy"] |= {"port": port, **deploy}
    write_config(base / "conf", tree, "serve")
    return Bench(base, port)


def start(bench: Bench, **env: str) -> subprocess.CompletedProcess[str]:
    return bench.call("serve", str(bench.base / "conf" / "serve.yaml"), timeout_s=400, **env)


def list_of_run(bench: Bench) -> list[int]:
    """Every living process that the run started, in Ray's workers too."""
    run = find_current(bench.exp_dir)
    assert run is not None
    token = run.load_spec(run.labels[0]).token
    return [pid for pid in list_procs() if read_environ(pid).get("FLAGSCALE_RUN_TOKEN") == token]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = make_bench(tmp_path_factory.mktemp("graph"), *NODES)
    try:
        done = start(made)
        assert done.returncode == 0, done.stderr + made.read_log()
        assert f"url      {made.url}/generate" in done.stdout
        yield made
        pids = list_of_run(made)
        assert len(pids) > 5
        stopped = made.serve("stop", str(made.exp_dir))
        assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
        assert made.list_left() == list_of_run(made) == []
        status = made.status()
        assert (status["state"], status["replicas"]) == ("succeeded", [])
        assert list(Path("/tmp").glob(f"fs-*/session_*/{pids[0]}")) == []
    finally:
        made.serve("stop", str(made.exp_dir), "--force")
        assert made.list_left() == []


def ask(bench: Bench, prompt: str, act: str = "") -> httpx.Response:
    return httpx.post(f"{bench.url}/generate", json={"prompt": prompt, "act": act}, timeout=PATIENCE_S)


def replicas_of(bench: Bench, name: str) -> dict[int, str]:
    """pid -> state"""
    return {row["pid"]: row["state"] for row in bench.look()["replicas"] if row["model"] == name}


def test_branches_run_at_the_same_time_and_nodes_in_processes_of_their_own(bench: Bench) -> None:
    answer = ask(bench, "first", "meet")
    assert answer.status_code == 200, answer.text
    left, right = answer.json()["left"], answer.json()["right"]
    assert max(left["since"], right["since"]) < min(left["until"], right["until"])
    assert left["begin"] == right["begin"]
    assert len({left["pid"], right["pid"], left["begin"], answer.json()["pid"]}) == 4


def test_the_verbs_tell_of_nodes_and_their_replicas(bench: Bench) -> None:
    status = bench.status()
    told = [(row["name"], row["engine"], row["ready"], row["wanted"]) for row in status["models"]]
    assert told == [("begin", "Begin", 1, 1), ("left", "Left", 1, 1), ("right", "Right", 1, 1), ("end", "End", 2, 2)]
    assert (status["state"], status["graph"], len(status["replicas"])) == ("ready", "/generate", 5)
    shown = bench.serve("status").stdout
    assert f"{bench.url}/generate" in shown
    assert all(f"pid {row['pid']}" in shown for row in status["replicas"])
    examined = bench.serve("doctor")
    assert (examined.returncode, "FAULT" in examined.stdout) == (0, False)
    assert "2 of 2 replicas of End are ready" in examined.stdout
    assert "every node has its replicas" in bench.serve("logs").stdout
    changed = bench.serve("update", str(bench.exp_dir), "--replicas", "2")
    assert (changed.returncode, "stop it, and start it anew" in changed.stderr) == (2, True)
    again = start(bench)
    assert (again.returncode, "already holds a service that runs" in again.stderr) == (1, True)


def test_a_node_that_fails_is_named_to_the_caller_and_shown_in_the_log(bench: Bench) -> None:
    answer = ask(bench, "x", "fail")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "node `begin` failed: ValueError: cannot begin with 'x'"
    wait_for(lambda: "models.py" in bench.read_log() and "Traceback" in bench.read_log())
    assert ask(bench, "y").status_code == 200


def test_a_body_that_does_not_fit_is_refused(bench: Bench) -> None:
    answer = httpx.post(f"{bench.url}/generate", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "`act`: is missing")


def test_when_the_caller_leaves_its_nodes_are_cancelled(bench: Bench) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{bench.url}/generate", json={"prompt": "gone", "act": "hang"}, timeout=10)
    wait_for(lambda: (bench.base / "left.left").exists() and (bench.base / "right.left").exists())
    wait_for(lambda: bench.look()["in_flight"] == 0)


def test_a_replica_that_dies_costs_its_request_and_comes_again(bench: Bench) -> None:
    (before,) = replicas_of(bench, "left")
    answer = ask(bench, "last", "die")
    assert (answer.status_code, "node `left` failed" in answer.text) == (500, True)
    wait_for(lambda: "ready" in {pid: s for pid, s in replicas_of(bench, "left").items() if pid != before}.values())
    assert ask(bench, "after").json()["left"]["pid"] != before
    (killed,) = replicas_of(bench, "right")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: "ready" in {pid: s for pid, s in replicas_of(bench, "right").items() if pid != killed}.values())
    wait_for(lambda: bench.look()["state"] == "ready")
    assert ask(bench, "once more").status_code == 200


@pytest.mark.slow
def test_a_class_that_cannot_be_made_is_named_with_its_line_and_nothing_is_left(tmp_path: Path) -> None:
    made = make_bench(tmp_path, node("broken", "Broken"))
    done = start(made)
    line = MODELS.splitlines().index("        import a_module_that_is_not_there") + 1
    assert done.returncode == 1
    cause = f"node broken cannot be started: {tmp_path}/models.py:{line}: ModuleNotFoundError: No module named"
    assert cause in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Traceback" in made.read_log()
    assert made.list_left() == list_of_run(made) == []


@pytest.mark.slow
def test_a_shortage_is_told_before_anything_waits_for_it(tmp_path: Path) -> None:
    made = make_bench(tmp_path, node("one", "Begin", resources={"num_cpus": 4000}))
    done = start(made)
    assert done.returncode == 1
    assert "one needs 4000 CPU in one place, and the largest host has " in done.stderr.splitlines()[-1]
    assert made.list_left() == []


@pytest.mark.slow
def test_another_ray_beside_is_left_alone_and_a_key_is_asked_for(tmp_path: Path) -> None:
    port = find_free_port()
    with subprocess.Popen(
        [
            str(RAY),
            "start",
            "--head",
            "--block",
            "--port",
            str(port),
            "--include-dashboard",
            "false",
            "--num-cpus",
            "1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
        start_new_session=True,
    ) as other:
        made = make_bench(tmp_path, *NODES, api_key_env="MY_KEY")
        try:
            done = start(made, MY_KEY="sk-graph")
            assert done.returncode == 0, done.stderr + made.read_log()
            assert ask(made, "x").status_code == 401
            headers = {"Authorization": "Bearer sk-graph"}
            body = {"prompt": "x", "act": ""}
            good = httpx.post(f"{made.url}/generate", json=body, headers=headers, timeout=PATIENCE_S)
            assert good.status_code == 200
            assert made.serve("doctor", MY_KEY="sk-graph").returncode == 0
            run = find_current(made.exp_dir)
            assert run is not None
            for path in made.base.rglob("*"):
                if path.is_file():
                    assert "sk-graph" not in path.read_text(errors="replace")
            head = next(pid for pid in list_of_run(made) if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text())
            os.kill(head, signal.SIGKILL)  # the graph ends with its Ray, and says so
            wait_for(lambda: made.status()["state"] == "failed", 120)
            assert "the head of Ray" in made.read_log()
            assert made.list_left() == list_of_run(made) == []
            assert other.poll() is None
            theirs = subprocess.run(
                [str(RAY), "status", "--address", f"127.0.0.1:{port}"], capture_output=True, text=True
            )
            assert theirs.returncode == 0, theirs.stderr
        finally:
            made.serve("stop", str(made.exp_dir), "--force")
            os.killpg(other.pid, signal.SIGTERM)
