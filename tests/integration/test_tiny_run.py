"""The example `tiny` as a user runs it: learning, resuming, and being killed at every joint, with the real Megatron."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local_jobs import wait_for

from flagscale.runner.launch.procs import find_ours
from flagscale.runner.launch.resume import find_checkpoint

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0
LABEL = "host_0_localhost"
FLAGSCALE = ("-c", "import sys; from flagscale.cli import main; sys.exit(main())")
SMALL = (
    *("train.model.num_layers=2", "train.model.hidden_size=64", "train.model.ffn_hidden_size=128"),
    *("train.model.num_attention_heads=4", "train.model.seq_length=32", "train.model.max_position_embeddings=32"),
    *("train.model.eval_interval=100000", "train.model.eval_iters=1"),
    "train.model.optimizer.lr_scheduler.lr_warmup_iters=2",
)  # fmt: skip


def start(words: Sequence[str | Path], cwd: Path) -> "subprocess.Popen[str]":
    """A process of ours, its output in `<cwd>/out` and `<cwd>/err`."""
    env = {**os.environ, "FLAGSCALE_STATE_DIR": str(cwd / "state"), "PYTHONPATH": str(ROOT)}
    with (cwd / "out").open("w") as out, (cwd / "err").open("w") as err:
        return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, stdout=out, stderr=err, text=True)


@dataclass(frozen=True)
class Tiny:
    """One experiment folder, and the commands that a user gives about it from the folder around it."""

    folder: Path
    data: Path

    @property
    def exp_dir(self) -> Path:
        return self.folder / "exp"

    @property
    def words(self) -> list[str | Path]:
        prepare = f"python tools/datasets/prepare_text.py --output {self.data} ./examples/tiny/data/text.txt"
        return [
            *(ROOT / "run.py", "--config-path", "./examples/tiny/conf", "--config-name", "train"),
            *(f"experiment.exp_dir={self.exp_dir}", f"train.data.data_path={self.data}"),
            *(f'experiment.cmds.before_start="{prepare}"', *SMALL),
        ]

    def train(self, *overrides: str) -> "subprocess.Popen[str]":
        return start([*self.words, *overrides], self.folder)

    def train_to_end(self, *overrides: str) -> int:
        return self.train(*overrides).wait()

    def flagscale(self, *words: str) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "FLAGSCALE_STATE_DIR": str(self.folder / "state"), "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, *FLAGSCALE, *words]
        return subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S)

    def query(self) -> dict[str, Any]:
        done = self.flagscale("status", "--json", str(self.exp_dir))
        assert done.returncode == 0, done.stderr
        state: dict[str, Any] = json.loads(done.stdout)
        return state

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def steps(self) -> dict[int, float]:
        """Iteration -> loss, of what the last command showed."""
        rows = re.findall(r"^iteration (\d+)/\d+ · loss ([\d.]+)", self.out, re.MULTILINE)
        return {int(step): float(loss) for step, loss in rows}

    @property
    def saved(self) -> int:
        """The iteration of the last whole checkpoint; 0 without one."""
        found = find_checkpoint(self.exp_dir / "checkpoints")
        return found.iteration or 0 if found else 0

    def list_left(self) -> list[int]:
        """Processes that bear the token of any run of this experiment."""
        specs = self.exp_dir.glob(f"runs/*/{LABEL}.spec.json")
        return [proc.pid for spec in specs for proc in find_ours(json.loads(spec.read_text())["token"])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = subprocess.run([sys.executable, *FLAGSCALE, "source", "fetch", "megatron"], cwd=ROOT)
    assert done.returncode == 0
    return tmp_path_factory.mktemp("data") / "text"


@pytest.fixture
def tiny(tmp_path: Path, data: Path) -> Tiny:
    return Tiny(tmp_path, data)


DATA_PARALLEL = "train.system.tensor_model_parallel_size=1"


def test_a_run_learns_and_is_taken_up_where_it_ended_also_by_ranks_that_share_otherwise(tiny: Tiny) -> None:
    pytest.importorskip("matplotlib")
    checkpoints, output = tiny.exp_dir / "checkpoints", tiny.exp_dir / "logs" / f"{LABEL}.output"
    overrides = (DATA_PARALLEL, "train.model.train_iters=8", "train.system.checkpoint.save_interval=4")
    assert tiny.train_to_end(*overrides) == 0, tiny.err
    assert "tensor-model-parallel size: 1," in output.read_text()
    assert "data-parallel size: 2," in output.read_text()
    assert list(tiny.steps) == list(range(1, 9))
    assert tiny.steps[8] < tiny.steps[1] - 0.3
    assert f"training  starts from scratch: no checkpoint in {checkpoints}\n" in tiny.err
    assert f"checkpoint saved: iteration 4 in {checkpoints}\n" in tiny.out
    assert re.search(r"^validation loss \d\.\d{4} at iteration 8 · perplexity ", tiny.out, re.MULTILINE)
    assert len(tiny.out.splitlines()) < 30
    assert len(output.read_text().splitlines()) > 500
    last = tiny.err.splitlines()[-1]
    assert re.fullmatch(
        rf"loss \S+ -> \S+ in 8 steps \(\d:\d\d\); checkpoint {checkpoints}/iter_0000008; "
        rf"plot {tiny.exp_dir}/loss.png; log {output}",
        last,
    )
    assert (tiny.exp_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert tiny.train_to_end(*overrides) == 0, tiny.err
    assert f"training  resumes from iteration 8 ({checkpoints}/iter_0000008), of 8: nothing is left\n" in tiny.err
    nothing = f"nothing left to train: the checkpoint is at iteration 8 of 8 ({checkpoints}/iter_0000008); for more: "
    assert tiny.err.splitlines()[-1].startswith(nothing + "train.model.train_iters=16; log ")

    assert tiny.train_to_end("train.model.train_iters=10") == 0, tiny.err
    assert "tensor-model-parallel size: 2," in output.read_text()
    assert list(tiny.steps) == [9, 10]
    assert f"training  resumes from iteration 8 ({checkpoints}/iter_0000008)\n" in tiny.err
    assert (tiny.saved, tiny.list_left()) == (10, [])


ENDLESS = ("train.model.train_iters=100000", "train.system.checkpoint.save_interval=8")


def train_past_a_checkpoint(tiny: Tiny) -> "subprocess.Popen[str]":
    """Start the endless training and wait until it has saved once more; it began where the last one had saved."""
    before = tiny.saved
    launcher = tiny.train(*ENDLESS)
    wait_for(lambda: tiny.saved > before or launcher.poll() is not None, PATIENCE_S)
    assert launcher.poll() is None, tiny.err
    beginning = f"resumes from iteration {before} (" if before else "starts from scratch"
    assert f"training  {beginning}" in tiny.err
    assert min(tiny.steps) == before + 1
    return launcher


def wait_until_nothing_is_left(tiny: Tiny) -> dict[str, Any]:
    wait_for(lambda: not tiny.list_left(), PATIENCE_S)
    return tiny.query()


def test_a_killed_rank_agent_or_launcher_is_told_truly_and_costs_only_what_was_not_saved(tiny: Tiny) -> None:
    launcher = train_past_a_checkpoint(tiny)
    os.kill(tiny.query()["ranks"][1]["pid"], signal.SIGKILL)
    assert launcher.wait() == 1
    state = wait_until_nothing_is_left(tiny)
    assert (state["state"], state["exit_code"], state["reason"]) == ("failed", 1, "rank 1 died of SIGKILL")
    assert [rank["state"] for rank in state["ranks"]] == ["ended", "failed"]
    assert f"run {state['run_id']} failed: rank 1 died of SIGKILL" in tiny.err

    launcher = train_past_a_checkpoint(tiny)
    agent = tiny.query()["hosts"][0]["agent_pid"]
    os.kill(agent, signal.SIGKILL)
    assert launcher.wait() == 1
    state = wait_until_nothing_is_left(tiny)
    assert (state["state"], state["num_leftovers"]) == ("lost", 0)
    assert f"the agent (process {agent}) was killed by SIGKILL" in state["reason"]

    launcher = train_past_a_checkpoint(tiny)
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL
    state = tiny.query()
    assert (state["state"], [rank["state"] for rank in state["ranks"]]) == ("running", ["up", "up"])
    follow_and_stop(tiny, state["run_id"])

    before = tiny.saved
    assert tiny.train_to_end(f"train.model.train_iters={before + 2}") == 0, tiny.err
    assert list(tiny.steps) == [before + 1, before + 2]


def follow_and_stop(tiny: Tiny, run_id: str) -> None:
    """From processes that have nothing to do with the launcher."""
    follower = start([*FLAGSCALE, "logs", "-f", "-n", "0"], tiny.folder)
    wait_for(lambda: len(tiny.steps) >= 3, PATIENCE_S)
    done = tiny.flagscale("stop", run_id)
    assert (done.returncode, done.stdout) == (0, f"{run_id}: stopped\n")
    assert follower.wait() == 0
    assert f"run {run_id} stopped: stopped by " in tiny.err
    state = wait_until_nothing_is_left(tiny)
    assert (state["state"], state["exit_code"]) == ("stopped", 143)
    assert tiny.flagscale("stop", run_id).stdout == f"{run_id}: stopped before; nothing to stop\n"
