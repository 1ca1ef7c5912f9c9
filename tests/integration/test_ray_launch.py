"""Jobs in places of real Ray clusters: ours on this machine and over test hosts, and one that runs already."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import HostSet, MakeHosts, missing
from ssh_jobs import Bench

from flagscale.runner.launch.folder import find_cluster
from flagscale.runner.launch.ports import find_free_port
from flagscale.runner.launch.procs import find_ours, list_procs, read_environ
from flagscale.runner.monitor.state import query_run

pytest_plugins = ("host_fixtures",)
pytest.importorskip("ray")
pytest.importorskip("torch")

NEEDS_HOSTS = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PATIENCE_S = 90.0
RAY = Path(sys.executable).with_name("ray")


class Here:
    """In place of a set of hosts: commands run on this machine."""

    def command(self, argv: Sequence[str], on: str | None = None) -> list[str]:
        del on
        return list(argv)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "base" / "state"))
    (tmp_path / "base").mkdir()
    here: Any = Here()
    return Bench(here, tmp_path / "base")


def wait_for(is_so: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(0.2)


def wait_state(bench: Bench, *states: str) -> dict[str, Any]:
    wait_for(lambda: query_run(bench.run).state in states)
    return bench.status()


def write_local(bench: Bench, **runner: Any) -> None:
    bench.write(hostfile="localhost slots=2\n", type="ray", **runner)
    config = json.loads((bench.base / "conf" / "config.yaml").read_text())
    config["experiment"]["envs"]["GLOO_SOCKET_IFNAME"] = "lo"
    (bench.base / "conf" / "config.yaml").write_text(json.dumps(config))


def list_cluster(bench: Bench) -> list[int]:
    """Living processes of the run's own cluster that this machine's tokens tell of, on any test host."""
    cluster = find_cluster(bench.run)
    assert cluster is not None
    tokens = {cluster.load_spec(label).token for label in cluster.labels}
    return [pid for pid in list_procs() if read_environ(pid).get("FLAGSCALE_RUN_TOKEN") in tokens]


def is_scratch_left(bench: Bench) -> bool:
    return bool(list(Path("/tmp").glob(f"fs-{bench.run.run_id}*")))


# --- a cluster of our own, on one host -------------------------------------------------------------------------------


def test_one_host_from_launch_to_the_second_stop(bench: Bench) -> None:
    write_local(bench)
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert "2 of 2 ranks up" in done.stdout
    assert [(rank["rank"], rank["state"]) for rank in bench.status()["ranks"]] == [(0, "up"), (1, "up")]
    output = bench.run.output_path("host_0_localhost")
    wait_for(lambda: "secret" in output.read_text())
    assert "quoted: a 'b' \"c\" $HOME `d` \\e of host: None secret: 12" in output.read_text()
    written = [path for path in bench.exp_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hidden-value" in path.read_bytes()]
    assert len(bench.call("list").stdout.splitlines()) == 2
    assert list_cluster(bench)
    again = bench.launch()
    assert again.returncode == 1
    assert "already holds a job that runs" in again.stderr
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert (bench.list_left(), list_cluster(bench), is_scratch_left(bench)) == ([], [], False)
    assert "nothing to stop" in bench.call("stop", str(bench.exp_dir)).stdout
    assert (bench.status()["state"], bench.status()["exit_code"]) == ("stopped", 143)


@pytest.mark.slow
def test_a_job_outlives_its_launcher_and_its_cluster_ends_with_it(bench: Bench) -> None:
    write_local(bench)
    with bench.popen("run", str(bench.base / "conf" / "config.yaml"), "--foreground") as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and query_run(bench.run).state == "running")
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.communicate()
    assert bench.status()["state"] == "running"
    (bench.base / "go").touch()
    followed = bench.call("logs", "-f", str(bench.exp_dir))
    assert "rank 1 is done" in followed.stdout
    assert bench.status()["state"] == "succeeded"
    wait_for(lambda: not list_cluster(bench) and not is_scratch_left(bench))
    first = bench.run.run_id
    again = bench.call("rerun", str(bench.exp_dir), "--foreground")
    assert again.returncode == 0, again.stderr
    assert bench.run.run_id != first
    assert bench.status()["state"] == "succeeded"
    wait_for(lambda: not list_cluster(bench))


@pytest.mark.slow
def test_a_launcher_that_is_killed_early_leaves_a_cluster_that_stop_ends(bench: Bench) -> None:
    write_local(bench)
    with bench.popen("run", str(bench.base / "conf" / "config.yaml")) as launcher:
        wait_for(lambda: (bench.exp_dir / "runs" / "current").exists() and list_cluster(bench))
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.communicate()
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert (bench.list_left(), list_cluster(bench), is_scratch_left(bench)) == ([], [], False)
    assert bench.status()["state"] in ("never_started", "stopped")


# --- a cluster of our own, over test hosts ---------------------------------------------------------------------------


@pytest.fixture
def two_hosts(make_hosts: MakeHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    base = tmp_path / "base"
    base.mkdir()
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(base / "state"))
    return Bench(make_hosts(2), base)


def state_of(bench: Bench) -> str:
    return str(bench.status()["state"])


@pytest.mark.hosts
@NEEDS_HOSTS
def test_two_hosts_and_a_node_of_ray_that_dies(two_hosts: Bench) -> None:
    bench = two_hosts
    bench.write(type="ray", hostfile=None)
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert {(rank["host"], rank["state"]) for rank in bench.status()["ranks"]} == {
        ("host_0_h1", "up"),
        ("host_1_h2", "up"),
    }
    wait_for(lambda: "on h2" in bench.run.output_path("host_1_h2").read_text())
    cluster = find_cluster(bench.run)
    assert cluster is not None
    token = cluster.load_spec("host_1_h2").token
    raylet = next(
        pid
        for pid in list_procs()
        if read_environ(pid).get("FLAGSCALE_RUN_TOKEN") == token
        and b"raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    )
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: state_of(bench) == "lost")
    reason = str(bench.status()["reason"])
    assert "Ray has given up the place of host_" in reason
    wait_for(lambda: bench.list_left() == [] and list_cluster(bench) == [])
    assert "its Ray cluster failed: host_1_h2: ray" in str(bench.status()["reason"])
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    assert not is_scratch_left(bench)


@pytest.mark.hosts
@NEEDS_HOSTS
def test_a_host_without_ray_and_one_that_is_down(two_hosts: Bench) -> None:
    bench = two_hosts
    bench.write(type="ray")
    import ray

    installed = next(Path(ray.__file__).parents[1].glob("ray-*.dist-info"))
    (bench.base / "empty").mkdir()
    hide = ["mount", "--bind", str(bench.base / "empty"), str(installed)]
    subprocess.run(bench.hosts.command(hide, "h2"), check=True)
    done = bench.launch()
    assert done.returncode == 1
    assert "1 of 2 hosts cannot take part; nothing was started" in done.stderr
    assert "h2  has no Ray for" in done.stderr
    bench.hosts.kill("h2")
    done = bench.launch()
    assert "h2  cannot be reached" in done.stderr
    assert not (bench.exp_dir / "runs").exists() or not list((bench.exp_dir / "runs").iterdir())


# --- a cluster that runs already -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Running:
    """Somebody else's cluster of one node, which asks for a token."""

    address: str
    env: dict[str, str]

    def ask(self, code: str) -> Any:
        head = f"import json, ray; ray.init(address='{self.address}', logging_level='ERROR')\n"
        done = subprocess.run(
            [sys.executable, "-c", head + f"print(json.dumps({code}))"],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Started as its owner would, and ended by the processes that bear its mark."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("f" * 64)
    port = find_free_port()
    mark = f"flagscale-test-{os.getpid()}-{port}"
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "FLAGSCALE_RUN_TOKEN": mark}
    words = [str(RAY), "start", "--head", "--port", str(port), "--include-dashboard", "false", "--num-cpus", "2"]
    words += ["--num-gpus", "2", "--resources", '{"A800": 2}', "--temp-dir", f"/tmp/fst-{port}"]
    words += ["--disable-usage-stats", "--object-store-memory", "100000000"]
    words += ["--ray-client-server-port", str(find_free_port()), "--dashboard-agent-listen-port", str(find_free_port())]
    subprocess.run(words, env={**os.environ, **env}, check=True, capture_output=True, timeout=120)
    try:
        yield Running(f"127.0.0.1:{port}", {name: env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")})
    finally:
        while left := find_ours(mark):
            for proc in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(proc.pid, signal.SIGKILL)
            time.sleep(0.1)
        subprocess.run(["rm", "-rf", f"/tmp/fst-{port}"], check=True)


def write_running(bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch, **runner: Any) -> None:
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    write_local(bench)
    path = bench.base / "conf" / "config.yaml"
    config = json.loads(path.read_text())
    config["experiment"]["runner"] = {"type": "ray", "ray_address": running.address, "start_timeout_s": 90, **runner}
    path.write_text(json.dumps(config))


FREE = "ray.available_resources()"


def test_places_of_a_running_cluster_are_taken_and_given_back(
    bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_running(bench, running, monkeypatch, device_type="A800", nproc_per_node=2)
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    assert {rank["host"] for rank in bench.status()["ranks"]} == {"host_0_node0"}
    assert running.ask(FREE).get("A800", 0) == 0
    other = bench.call(
        "run",
        str(bench.base / "conf" / "config.yaml"),
        f"experiment.exp_dir={bench.base}/other",
        "+experiment.runner.ray_wait_s=3",
    )
    assert other.returncode == 1
    assert "no room within 3 s for 1 x (2 A800); free is" in other.stderr
    assert not (bench.base / "other" / "runs").exists()
    assert bench.call("stop", str(bench.exp_dir)).stdout.split()[-1] == "stopped"
    assert bench.list_left() == []
    wait_for(lambda: running.ask(FREE).get("A800") == 2)
    assert running.ask("len(ray.nodes())") == 1


def test_a_rank_sees_the_devices_that_ray_gave_and_nothing_of_ray(
    bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_running(bench, running, monkeypatch, device_type="gpu", nproc_per_node=1)
    done = bench.launch()
    assert done.returncode == 0, done.stderr
    environ = read_environ(bench.status()["ranks"][0]["pid"])
    assert environ["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    assert [name for name in environ if name.startswith("RAY_")] == []
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
    wait_for(lambda: running.ask(FREE).get("GPU") == 2)


@pytest.mark.parametrize(
    ("runner", "text"),
    [
        ({"device_type": "A800", "nproc_per_node": 3}, "the cluster can never give 1 x (3 A800)"),
        ({"device_type": "mlu", "nproc_per_node": 1}, "1 x (1 mlu)"),
        ({"nnodes": 2, "device_type": "cpu"}, "2 x (1 CPU), each on a node of its own"),
    ],
)
def test_what_a_cluster_can_never_give_is_told_with_what_it_has(
    bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch, runner: dict[str, Any], text: str
) -> None:
    write_running(bench, running, monkeypatch, **runner)
    done = bench.launch()
    assert done.returncode == 1
    assert text in done.stderr
    assert "2 A800" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bench.exp_dir / "runs").exists()


def test_a_place_that_is_taken_back_ends_the_job(
    bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_running(bench, running, monkeypatch, device_type="cpu", nproc_per_node=1)
    assert bench.launch().returncode == 0
    holder = f"ray.kill(ray.get_actor('flagscale-{bench.run.run_id}', namespace='flagscale'))"
    running.ask(holder)
    state = wait_state(bench, "lost")
    assert "Ray has given up the place of host_0_node0" in state["reason"]
    wait_for(lambda: bench.list_left() == [])
    assert running.ask("len(ray.nodes())") == 1


def test_no_cluster_where_one_is_named(bench: Bench, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    write_running(bench, running, monkeypatch, device_type="cpu", ray_wait_s=3)
    done = bench.launch("experiment.runner.ray_address=127.0.0.1:9")
    assert done.returncode == 1
    assert "cannot be joined" in done.stderr
    assert "Traceback" not in done.stderr


# --- the cluster that this machine is part of ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OnHost:
    """In place of a set of hosts: commands run on one of them, as by a user who is logged in there."""

    hosts: HostSet
    name: str

    def command(self, argv: Sequence[str], on: str | None = None) -> list[str]:
        return self.hosts.command(argv, on or self.name)


@pytest.fixture
def where_ray_writes() -> Iterator[Path]:
    """Ray's own folder, so that a host can have one of its own on its place."""
    folder = Path("/tmp/ray")
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    yield folder
    if is_new:
        with contextlib.suppress(OSError):  # somebody uses it by now
            folder.rmdir()


@pytest.mark.slow
@pytest.mark.hosts
@NEEDS_HOSTS
def test_the_cluster_that_this_machine_is_part_of(
    where_ray_writes: Path, make_hosts: MakeHosts, tmp_path: Path
) -> None:
    """`ray start --head` as its documentation has it, on a machine where nobody else's Ray is, and `auto`."""
    (tmp_path / "base").mkdir()
    here: Any = OnHost(make_hosts(1, private_dirs=(where_ray_writes,)), "h1")
    bench = Bench(here, tmp_path / "base")
    bench.write()
    path = bench.base / "conf" / "config.yaml"
    config = json.loads(path.read_text())
    runner = {"type": "ray", "ray_address": "auto", "device_type": "cpu", "ray_wait_s": 5, "start_timeout_s": 90}
    config["experiment"]["runner"] = {**runner, "nproc_per_node": 2}
    path.write_text(json.dumps(config))
    none = bench.launch()
    assert none.returncode == 1
    assert "no Ray cluster runs here (`experiment.runner.ray_address: auto`)" in none.stderr
    assert "Traceback" not in none.stderr
    assert not (bench.exp_dir / "runs").exists()

    note = where_ray_writes / "ray_current_cluster"
    subprocess.run(here.command(["sh", "-c", f"echo 127.0.0.1:9 > {note}"]), check=True)  # of a cluster that has died
    gone = bench.launch()
    assert "the Ray cluster at 127.0.0.1:9 cannot be joined: Connection refused" in gone.stderr
    subprocess.run(here.command(["rm", str(note)]), check=True)

    def ray(*words: str) -> str:
        command = here.command(["env", "RAY_raylet_start_wait_time_s=150", str(RAY), *words])
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ray("start", "--head", "--num-cpus", "2", "--disable-usage-stats", "--object-store-memory", "100000000")
    done = bench.launch("experiment.runner.ray_wait_s=60")
    assert done.returncode == 0, done.stderr
    state = bench.status()
    assert (state["state"], [rank["state"] for rank in state["ranks"]]) == ("running", ["up", "up"])
    assert "0.0/2.0 CPU" not in ray("status")
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert bench.list_left() == []
    wait_for(lambda: "0.0/2.0 CPU" in ray("status"))
