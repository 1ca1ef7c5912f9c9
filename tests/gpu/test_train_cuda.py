"""Megatron on an NVIDIA chip, as a user starts it: the losses of a CPU, in bf16 too, resumed, and a published model.

Without Transformer Engine and Apex, which need not be installed: the arguments that do without are the ones that a
start without them names.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

ROOT = Path(__file__).resolve().parents[2]
FLAGSCALE = ("-c", "import sys; from flagscale.cli import main; sys.exit(main())")
KERNELS = (
    *("++train.model.transformer_impl=local", "++train.model.no_rope_fusion=true"),
    *("++train.model.no_persist_layer_norm=true", "++train.model.no_gradient_accumulation_fusion=true"),
    "++train.model.no_masked_softmax_fusion=true",
)
ONE_RANK = ("experiment.runner.nproc_per_node=1", "train.system.tensor_model_parallel_size=1")
TINY = ("tiny", *ONE_RANK, "train.model.train_iters=20", "train.model.eval_iters=0")
SAME_WEIGHTS = ("++train.model.use_cpu_initialization=true",)
"""as on a CPU: each kind of device draws others from a seed"""
BF16 = ("+train.system.precision.bf16=true",)
QWEN3 = (
    *("qwen3", "train=0_6b", *ONE_RANK, "++experiment.runner.foreground=true", "train.model.seq_length=1024"),
    *("train.model.micro_batch_size=1", "train.model.global_batch_size=4", "~train.model.train_samples"),
    *(
        "+train.model.train_iters=6",
        "train.model.eval_iters=0",
        "~train.model.optimizer.lr_scheduler.lr_warmup_samples",
    ),
    *("~train.data.data_path", "+train.data.mock_data=true", "train.data.tokenizer.tokenizer_type=NullTokenizer"),
    *("~train.data.tokenizer.tokenizer_model", "~train.data.tokenizer.padded_vocab_size"),
    *("+train.data.tokenizer.vocab_size=151935", "experiment.envs.CUDA_VISIBLE_DEVICES='0'"),
)


def flagscale(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "FLAGSCALE_STATE_DIR": str(folder / "state"), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, *FLAGSCALE, *words]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def train(folder: Path, exp: str, chip: str, words: Sequence[str]) -> dict[int, float]:
    """Iteration -> loss of one run."""
    words = (*words, *(KERNELS if chip == "NVIDIA" else ()))
    where = (f"++experiment.runner.device_type={chip}", f"experiment.exp_dir={folder / exp}")
    done = flagscale(folder, "train", *words, *where)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
    rows = re.findall(r"^iteration (\d+)/\d+ · loss ([\d.]+)", done.stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in rows}


@pytest.fixture(scope="module", autouse=True)
def _trees(tmp_path_factory: pytest.TempPathFactory) -> None:
    for chip in ("NVIDIA", "Generic_CPU"):
        done = flagscale(tmp_path_factory.mktemp("install"), "install", "--backend", "megatron", "--device", chip)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("tiny"), "exp", "NVIDIA", (*TINY, *SAME_WEIGHTS))


def test_the_losses_are_those_of_a_cpu(tmp_path: Path, on_cuda: dict[int, float]) -> None:
    on_cpu = train(tmp_path, "exp", "Generic_CPU", TINY)
    assert sorted(on_cpu) == sorted(on_cuda) == list(range(1, 21))
    assert on_cuda[1] == pytest.approx(on_cpu[1], abs=1e-3)
    assert all(on_cuda[step] == pytest.approx(on_cpu[step], abs=0.03) for step in on_cpu)


def test_bf16_learns_as_fp32_does(tmp_path: Path, on_cuda: dict[int, float]) -> None:
    losses = train(tmp_path, "exp", "NVIDIA", (*TINY, *SAME_WEIGHTS, *BF16))
    assert losses[20] < 0.8 * losses[1]
    assert losses[20] == pytest.approx(on_cuda[20], rel=0.05)


def test_a_run_that_is_taken_up_again_is_the_same_run(tmp_path: Path, on_cuda: dict[int, float]) -> None:
    stop = ("++train.model.exit_interval=10",)
    first = train(tmp_path, "exp", "NVIDIA", (*TINY, *SAME_WEIGHTS, *stop))
    second = train(tmp_path, "exp", "NVIDIA", (*TINY, *SAME_WEIGHTS))
    assert sorted(first) == list(range(1, 11))
    assert sorted(second) == list(range(11, 21))
    assert all(loss == pytest.approx(on_cuda[step], abs=0.01) for step, loss in {**first, **second}.items())


def test_a_published_model_takes_steps(tmp_path: Path) -> None:
    losses = train(tmp_path, "exp", "NVIDIA", QWEN3)
    assert sorted(losses) == list(range(1, 7))
    assert losses[1] == pytest.approx(math.log(151936), rel=0.05)
    assert losses[6] < losses[1]


@pytest.mark.skipif(bool(find_spec("transformer_engine")), reason="Transformer Engine is installed here")
def test_what_is_not_installed_is_told_at_once(tmp_path: Path) -> None:
    where = ("experiment.runner.device_type=NVIDIA", f"experiment.exp_dir={tmp_path}/exp")
    done = flagscale(tmp_path, "train", *TINY, *where)
    assert done.returncode != 0
    assert "no_rope_fusion: true" in done.stderr
