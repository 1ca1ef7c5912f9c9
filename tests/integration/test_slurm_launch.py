"""Jobs given to a real Slurm of two nodes: queued, run, followed, cancelled, ended by Slurm itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from factories import ROOT
from slurm_cluster import Slurm

from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.procs import find_ours
from flagscale.runner.monitor.runs import load_run
from flagscale.runner.monitor.state import query_run

pytest_plugins = ("slurm_fixtures",)
pytest.importorskip("torch")

PATIENCE_S = 90.0
MASTER = {"start_timeout_s": 90, "master_addr": "127.0.0.1"}
"""the nodes of this Slurm have names that nobody can resolve"""
ENTRY = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
rank = os.environ["RANK"]
here = Path(__file__).parent
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(f"rank {rank} of {int(total)} on {os.environ['SLURMD_NODENAME']}", flush=True)
print("quoted:", os.environ.get("QUOTED"), "secret:", len(os.environ.get("TOKEN", "")), flush=True)
is_over = torch.zeros(1)
while not is_over:
    time.sleep(0.2)
    is_over = torch.tensor([float((here / "go").exists())])
    dist.all_reduce(is_over)
dist.destroy_process_group()
print(f"rank {rank} is done", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder of experiments, and the command as a user of this Slurm types it."""

    slurm: Slurm
    base: Path

    @property
    def exp_dir(self) -> Path:
        return self.base / "exp"

    def write(self, nnodes: int = 2, **runner: Any) -> None:
        (self.base / "rank.py").write_text(ENTRY)
        config = {
            "defaults": ["_self_", {"train": "small"}],
            "experiment": {
                "exp_name": 'small\'s "$1" job',
                "exp_dir": str(self.exp_dir),
                "task": {"type": "train", "backend": "pi0", "entrypoint": str(self.base / "rank.py")},
                "runner": {"type": "slurm", "nnodes": nnodes, "nproc_per_node": 1, **MASTER, **runner},
                "envs": {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "QUOTED": "a 'b' \"c\" $HOME `d` \\e"},
                "secrets": ["TOKEN"],
            },
            "action": "run",
            "hydra": {"run": {"dir": "${experiment.exp_dir}/hydra"}},
        }
        (self.base / "conf" / "train").mkdir(parents=True, exist_ok=True)
        (self.base / "conf" / "config.yaml").write_text(json.dumps(config))
        (self.base / "conf" / "train" / "small.yaml").write_text(json.dumps({"system": {}, "model": {}, "data": {}}))

    def popen(self, *words: str) -> subprocess.Popen[str]:
        env = {"FLAGSCALE_STATE_DIR": str(self.base / "state"), "PYTHONPATH": str(ROOT), "TOKEN": "hidden-value"}
        code = "import sys; from flagscale.cli import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, **self.slurm.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.base,
        )

    def call(self, *words: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        with self.popen(*words) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def launch(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.call("run", str(self.base / "conf" / "config.yaml"), *overrides)

    def launch_and_wait(self, *overrides: str) -> None:
        """The launcher leaves a job in the queue, so that this may return before it runs."""
        done = self.launch(*overrides)
        assert done.returncode == 0, done.stderr
        self.wait_state("running")

    def status(self) -> dict[str, Any]:
        done = self.call("status", str(self.exp_dir), "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def wait_state(self, *states: str) -> dict[str, Any]:
        wait_for(lambda: query_run(self.run).state in states)
        return self.status()

    @property
    def run(self) -> RunRef:
        return load_run(self.exp_dir)

    @property
    def job_id(self) -> str:
        return (self.run.folder / "slurm.job").read_text().strip()

    @property
    def is_queued(self) -> bool:
        return self.job_id in self.slurm.ask("squeue", "--noheader", "--format=%A").split()

    def list_left(self) -> list[int]:
        run = self.run
        return [proc.pid for label in run.labels for proc in find_ours(run.load_spec(label).token)]


@pytest.fixture
def bench(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    return Bench(slurm, tmp_path)


def wait_for(is_so: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
        time.sleep(0.3)


def test_two_nodes_from_the_queue_to_the_second_stop(bench: Bench) -> None:
    bench.write()
    bench.launch_and_wait()
    state = bench.status()
    assert [(rank["rank"], rank["state"]) for rank in state["ranks"]] == [(0, "up"), (1, "up")]
    assert {rank["host"] for rank in state["ranks"]} == {"host_0_node0", "host_1_node1"}
    outputs = [bench.run.output_path(label) for label in bench.run.labels]
    wait_for(lambda: all("secret: 12" in path.read_text() for path in outputs))
    shown = bench.call("logs", str(bench.exp_dir)).stdout
    assert all(f" of 2 on {node}" in shown for node in ("n1", "n2"))
    assert "quoted: a 'b' \"c\" $HOME `d` \\e secret: 12" in shown
    written = [path for path in bench.exp_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hidden-value" in path.read_bytes()]
    again = bench.launch()
    assert again.returncode == 1
    assert "already holds" in again.stderr
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert bench.list_left() == []
    assert not bench.is_queued
    assert "nothing to stop" in bench.call("stop", str(bench.exp_dir)).stdout
    state = bench.status()
    assert (state["state"], state["exit_code"]) == ("stopped", 143)
    assert "stopped by" in state["reason"]


def test_a_job_waits_its_turn_and_is_taken_out_of_the_queue(bench: Bench) -> None:
    bench.write()
    done = bench.launch("experiment.runner.nnodes=1", "+experiment.runner.slurm.options={begin: now+1hour}")
    assert done.returncode == 0, done.stderr
    assert "is PENDING (BeginTime); follow it with `flagscale logs -f" in done.stdout
    state = bench.status()
    assert (state["state"], state["hosts"][0]["state"]) == ("pending", "pending")
    assert [rank["state"] for rank in state["ranks"]] == ["waiting"]
    assert "PENDING (BeginTime)" in state["reason"]
    assert " pending " in bench.call("list").stdout
    again = bench.launch()
    assert again.returncode == 1
    assert "PENDING (BeginTime)" in again.stderr
    (bench.run.folder / "slurm.job").unlink()  # as if the launcher had been killed before it could write the number
    stopped = bench.call("stop", str(bench.exp_dir))
    assert (stopped.returncode, stopped.stdout.split()[-1]) == (0, "stopped"), stopped.stderr
    assert not bench.is_queued
    assert "before it had started" in bench.status()["reason"]


def test_staying_with_a_job_to_its_end(bench: Bench) -> None:
    bench.write()
    (bench.base / "go").touch()
    done = bench.call("run", str(bench.base / "conf" / "config.yaml"), "--foreground")
    assert done.returncode == 0, done.stderr
    assert "rank 1 is done" in done.stdout
    state = bench.status()
    assert (state["state"], state["exit_code"]) == ("succeeded", 0)
    again = bench.call("rerun", str(bench.exp_dir), "--foreground")
    assert again.returncode == 0, again.stderr
    assert bench.run.run_id != state["run_id"]
    assert bench.status()["state"] == "succeeded"


def test_a_killed_rank_ends_all_and_slurm_calls_the_job_failed(bench: Bench) -> None:
    bench.write()
    bench.launch_and_wait()
    rank = next(rank for rank in bench.status()["ranks"] if rank["rank"] == 1)
    os.kill(rank["pid"], signal.SIGKILL)
    state = bench.wait_state("failed")
    assert state["reason"] == f"{rank['host']}: rank 1 died of SIGKILL"
    wait_for(lambda: bench.list_left() == [])
    wait_for(lambda: not bench.is_queued)
    assert "JobState=FAILED" in bench.slurm.ask("scontrol", "show", "job", "-o", bench.job_id)


def test_scancel_by_hand_is_told_as_such(bench: Bench) -> None:
    bench.write()
    bench.launch_and_wait()
    bench.slurm.ask("scancel", bench.job_id)
    wait_for(lambda: not bench.is_queued)
    state = bench.wait_state("stopped")
    assert "cancelled in Slurm" in state["reason"]
    wait_for(lambda: bench.list_left() == [])


def test_a_keeper_that_is_killed_ends_the_job(bench: Bench) -> None:
    bench.write()
    bench.launch_and_wait()
    keeper = json.loads((bench.run.folder / "host_1_node1.keeper").read_text())
    os.kill(keeper["pid"], signal.SIGKILL)
    state = bench.wait_state("lost")
    assert "has given up the place of host_1_node1" in state["reason"]
    wait_for(lambda: bench.list_left() == [])


@pytest.mark.slow
def test_the_time_limit_is_named(bench: Bench) -> None:
    bench.write(slurm={"time": "1"})
    bench.launch_and_wait()
    wait_for(lambda: not bench.is_queued, 180)
    state = bench.wait_state("failed")
    assert "Slurm ended it at its time limit" in state["reason"]
    assert bench.list_left() == []


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("+experiment.runner.slurm.partition=nowhere", "invalid partition"),
        ("experiment.runner.nnodes=3", "configuration is not available"),
        ("+experiment.runner.slurm.options={gress: 'gpu:1'}", "gress"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words_and_leaves_nothing(bench: Bench, override: str, text: str) -> None:
    bench.write()
    done = bench.launch(override)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bench.exp_dir / "runs").exists()


def test_a_slurm_that_does_not_answer_is_unreachable_and_never_an_end(bench: Bench, tmp_path: Path) -> None:
    bench.write()
    assert bench.launch("+experiment.runner.slurm.options={begin: now+1hour}").returncode == 0
    conf = tmp_path / "slurm.conf"
    text = (bench.slurm.base / "slurm.conf").read_text()
    conf.write_text("\n".join("SlurmctldPort=9" if "SlurmctldPort" in line else line for line in text.splitlines()))
    (tmp_path / "other").mkdir()
    away = Bench(Slurm(tmp_path, {}), bench.base)
    state = away.status()
    assert state["state"] == "unreachable"
    assert "Slurm cannot be asked" in state["reason"]
    assert bench.call("stop", str(bench.exp_dir)).returncode == 0
