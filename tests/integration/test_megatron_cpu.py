"""Megatron for real, on CPUs: every way of splitting a model trains, and a run that is taken up again is the same run.

Each case is a torchrun of its own with a model of a few thousand parameters; the source is fetched if it is not there.
"""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flagscale.chips import CHIPS
from flagscale.env import CHIP, RANK_DIR, source_dir
from flagscale.patch.chiptree import lay_tree, load_layers
from flagscale.patch.pins import load_pin
from flagscale.train.token_files import prepare_text

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "flagscale" / "train" / "train_gpt.py"
CPU = CHIPS[0]
CPU_ARGUMENTS = CPU.backend_args["megatron"]

TINY: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32,
    "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 6, "lr": 2e-3, "min_lr": 2e-4, "seed": 7,
    "lr_decay_style": "cosine", "eval_iters": 0, "eval_interval": 100, "log_interval": 1, "vocab_size": 512,
    "tokenizer_type": "NullTokenizer", "attention_dropout": 0.0, "hidden_dropout": 0.0, "mock_data": True,
}  # fmt: skip

STEP = re.compile(r" iteration +(\d+)/.*? consumed samples: +(\d+) .*? lm loss: (\S+) ")


@dataclass(frozen=True)
class Run:
    """What a run printed: iteration -> (consumed samples, loss), in order."""

    exit_code: int
    output: str
    steps: dict[int, tuple[int, float]]

    @property
    def losses(self) -> list[float]:
        return [loss for _samples, loss in self.steps.values()]


def flags(args: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in args.items():
        if value is not False and value is not None:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(value)]
    return words


def environment(source: Path | None, **more: str) -> dict[str, str]:
    path = os.pathsep.join(str(folder) for folder in (ROOT, source) if folder)
    return {**os.environ, **CPU.env, CHIP: CPU.name, "PYTHONPATH": path, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def train(source: Path | None, nproc: int, args: dict[str, Any], **env: str) -> Run:
    """Run the entry point on `nproc` ranks with TINY, the CPU's arguments, and `args` over both."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", f"--master-port={free_port()}"]
    words += [str(ENTRY), *flags({**CPU_ARGUMENTS, **TINY, **args})]
    ran = subprocess.run(
        words, cwd=ROOT, env=environment(source, **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    output = ran.stdout.decode("utf-8", "replace")
    steps = {int(step): (int(samples), float(loss)) for step, samples, loss in STEP.findall(output)}
    return Run(ran.returncode, output, steps)


def train_well(source: Path, nproc: int, args: dict[str, Any], **env: str) -> Run:
    run = train(source, nproc, args, **env)
    assert run.exit_code == 0, run.output[-4000:]
    assert all(math.isfinite(loss) for loss in run.losses)
    return run


@pytest.fixture(scope="session")
def source() -> Path:
    """Megatron's tree for CPUs, as `flagscale source fetch megatron` leaves it."""
    pin = load_pin(ROOT / "third_party" / "Megatron-LM" / "pin.yaml")
    lay_tree(pin, source_dir(pin.name), CPU.name, load_layers(ROOT / "hardware", pin.name, CPU.name))
    return source_dir(pin.name, CPU.name)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of token files made from a part of the tales."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text((ROOT / "examples" / "tiny" / "data" / "text.txt").read_text()[:30_000])
    prepare_text([text], folder / "tokens")
    return str(folder / "tokens")


@pytest.fixture(scope="session")
def one_rank(source: Path) -> Run:
    return train_well(source, 1, {})


LLAMA = {
    "position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "group_query_attention": True,
    "num_query_groups": 2, "qk_layernorm": True, "untie_embeddings_and_output_weights": True,
    "disable_bias_linear": True,
}  # fmt: skip
MOE = {"num_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

EASY = {
    "data parallel, distributed optimiser": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "pipeline parallel": {"pipeline_model_parallel_size": 2},
    "experts in parallel": {**MOE, "expert_model_parallel_size": 2},
}
MORE = {
    "sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "experts, sequence parallel": {
        **MOE,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "disable_bias_linear": True,
    },
    "interleaved pipeline": {
        "pipeline_model_parallel_size": 2,
        "num_layers": 4,
        "num_layers_per_virtual_pipeline_stage": 1,
    },
    "bf16, recomputed": {**LLAMA, **RECOMPUTE, "bf16": True, "tensor_model_parallel_size": 2, "hidden_dropout": 0.1},
    "predicting two tokens": {"mtp_num_layers": 1, "position_embedding_type": "rope"},
    "predicting two tokens, in a pipeline": {
        "mtp_num_layers": 1,
        "position_embedding_type": "rope",
        "pipeline_model_parallel_size": 2,
    },
}
CASES = [pytest.param(args, id=name) for name, args in EASY.items()]
CASES += [pytest.param(args, id=name, marks=pytest.mark.slow) for name, args in MORE.items()]


@pytest.mark.parametrize("args", CASES)
def test_two_ranks_train(source: Path, args: dict[str, Any]) -> None:
    run = train_well(source, 2, args)
    assert list(run.steps) == [1, 2, 3, 4, 5, 6]
    assert run.losses[-1] < run.losses[0]


def test_tensor_parallel_gives_the_losses_of_one_rank(source: Path, one_rank: Run, tmp_path: Path) -> None:
    run = train_well(source, 2, {"tensor_model_parallel_size": 2}, **{RANK_DIR: str(tmp_path)})
    assert run.losses == pytest.approx(one_rank.losses, abs=5e-3)
    assert run.losses[0] == pytest.approx(one_rank.losses[0], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_0.up", "rank_1.up"]


@pytest.mark.slow
def test_a_run_taken_up_again_is_the_run_that_never_stopped(source: Path, data: str, tmp_path: Path) -> None:
    args = resumable(data)
    saving = args | {"save": tmp_path / "whole", "load": tmp_path / "whole"}
    whole = train_well(source, 2, saving)
    assert {"iter_0000003", "iter_0000006"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    saving = args | {"save": tmp_path / "parts", "load": tmp_path / "parts"}
    first = train_well(source, 2, saving | {"exit_interval": 3})
    second = train_well(source, 2, saving)
    assert list(first.steps) == [1, 2, 3]
    assert list(second.steps) == [4, 5, 6]
    assert second.steps[4] == whole.steps[4]
    # Megatron's second line after a start is the mean of its first two.
    assert second.steps[5][1] == pytest.approx((whole.steps[4][1] + whole.steps[5][1]) / 2, abs=1e-5)
    assert second.steps[6] == whole.steps[6]
    assert [samples for samples, _loss in second.steps.values()] == [16, 20, 24]


def resumable(data: str) -> dict[str, Any]:
    return {
        "mock_data": False,
        "data_path": data,
        "split": "100,0,0",
        "use_distributed_optimizer": True,
        "save_interval": 3,
        "dist_ckpt_optim_fully_reshardable": True,
        "override_opt_param_scheduler": True,
    }


@pytest.mark.slow
def test_a_run_is_taken_up_under_another_split_of_the_ranks(source: Path, data: str, tmp_path: Path) -> None:
    args = resumable(data) | {"save": tmp_path / "saved", "load": tmp_path / "saved"}
    finished = train_well(source, 2, args)
    assert train_well(source, 2, args).steps == {}
    longer = train_well(source, 2, args | {"tensor_model_parallel_size": 2, "train_iters": 8})
    assert list(longer.steps) == [7, 8]
    assert longer.losses[0] == pytest.approx(finished.losses[-1], abs=0.2)
    shorter = train_well(source, 1, args | {"train_iters": 9})
    assert list(shorter.steps) == [9]
    assert shorter.losses[0] == pytest.approx(longer.losses[-1], abs=0.2)


@pytest.mark.slow
def test_a_run_that_is_killed_is_taken_up_from_its_last_whole_checkpoint(
    source: Path, data: str, tmp_path: Path
) -> None:
    args = resumable(data) | {"save": tmp_path / "saved", "load": tmp_path / "saved", "train_iters": 60}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    words += [str(ENTRY), *flags({**CPU_ARGUMENTS, **TINY, **args})]
    job = subprocess.Popen(words, cwd=ROOT, env=environment(source), stdout=subprocess.DEVNULL)
    tracker = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    while not tracker.exists():
        assert job.poll() is None
        time.sleep(0.1)
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.wait()
    last = int(tracker.read_text())
    again = train_well(source, 2, args | {"exit_interval": 3})
    assert next(iter(again.steps)) == last + 1
    assert next(iter(again.steps.values()))[0] == 4 * (last + 1)


def test_megatron_reads_the_token_files_that_we_write(source: Path, data: str) -> None:
    script = (
        "import sys, json; from flagscale.train.backend import start_megatron; start_megatron();"
        "from megatron.core.datasets.indexed_dataset import IndexedDataset; d = IndexedDataset(sys.argv[1]);"
        "print(json.dumps([len(d), d.document_indices.tolist(), d[1].tolist()]))"
    )
    words = [sys.executable, "-W", "ignore", "-c", script, data]
    ran = subprocess.run(words, env=environment(source), capture_output=True, text=True, check=True)
    length, bounds, second = json.loads(ran.stdout.splitlines()[-1])  # Megatron logs before it
    assert bounds == list(range(length + 1))
    assert bytes(second[:-1]).decode().startswith("Tale 2: ")
    assert second[-1] == 256


WRONG = {
    "error: unrecognized arguments: --hiden-size 3": {"hiden_size": 3},
    "error: data_path: no such file: no/such.bin, no/such.idx": {"mock_data": False, "data_path": "no/such"},
}
WRONG_TOO = {
    "error: argument --lr: invalid float value: 'fast'": {"lr": "fast"},
    "error: --lr-warmup-iters 6 is not less than 6": {"lr_warmup_iters": 6},
    "error: world size (2) is not divisible by total_model_size": {"tensor_model_parallel_size": 3},
    "error: Bias in Moe is only supported": {**MOE, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "error: train_gpt.py pretrains on plain token sequences: it has no --sft": {"sft": True},
}
FAULTS = [pytest.param(args, message, id=message) for message, args in WRONG.items()]
FAULTS += [pytest.param(args, message, id=message, marks=pytest.mark.slow) for message, args in WRONG_TOO.items()]


@pytest.mark.parametrize(("args", "message"), FAULTS)
def test_what_is_typed_wrong_is_one_line_and_no_traceback(source: Path, args: dict[str, Any], message: str) -> None:
    ran = run_entry(source, {**TINY, **args})
    assert ran.returncode == 2
    assert ran.stderr.startswith(message)
    assert ran.stderr.count("\n") == 1


def run_entry(source: Path | None, args: dict[str, Any], **env: str) -> "subprocess.CompletedProcess[str]":
    """The entry point as rank 0 of two, without torchrun around it: for what ends before the ranks meet."""
    words = [sys.executable, "-W", "ignore", str(ENTRY), *flags({**CPU_ARGUMENTS, **args})]
    around = environment(source, WORLD_SIZE="2", RANK="0", **env)
    return subprocess.run(words, cwd=ROOT, env=around, capture_output=True, text=True, check=False)


def test_a_missing_source_names_the_command_that_brings_it() -> None:
    ran = run_entry(None, TINY)
    assert ran.returncode == 1
    assert ran.stderr == ("error: no Megatron-LM on the Python path: get it with `flagscale source fetch megatron`\n")


def test_another_version_of_megatron_is_refused(tmp_path: Path) -> None:
    for part in ("core", "training"):
        (tmp_path / "megatron" / part).mkdir(parents=True)
        (tmp_path / "megatron" / part / "__init__.py").touch()
    (tmp_path / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    ran = run_entry(tmp_path, TINY)
    assert ran.returncode == 1
    assert ran.stderr == "error: Megatron-LM 0.16.1 is on the Python path; expected >=0.19.2,<0.20\n"


def test_an_unknown_chip_gets_its_nearest_name(source: Path) -> None:
    ran = run_entry(source, TINY, **{CHIP: "Generic_CPUs"})
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "FLAGSCALE_CHIP=Generic_CPUs: no such chip" in ran.stderr
    assert "did you mean `Generic_CPU`?" in ran.stderr


def validate(source: Path, words: Iterable[str], stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flagscale.train.validate", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(source), input=stdin, capture_output=True, text=True, check=False
    )


def test_many_argument_lists_are_judged_in_one_process(source: Path) -> None:
    lists = {
        "fine": (16, {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "global_batch_size": 64}),
        "for GPUs": (2, {"bf16": True, "fp8_format": "hybrid", "transformer_impl": "transformer_engine"}),
        "experts": (4, {"num_experts": 3, "expert_model_parallel_size": 2, "global_batch_size": 64}),
        "heads": (4, {"num_attention_heads": 2, "tensor_model_parallel_size": 4, "global_batch_size": 64}),
        "unknown": (1, {"bogus": 1}),
    }  # fmt: skip
    rows = [{"name": name, "world_size": size, "argv": flags(TINY | args)} for name, (size, args) in lists.items()]
    ran = validate(source, ["--stdin"], "\n".join(map(json.dumps, rows)))
    answers = {row["name"]: row["error"] for row in map(json.loads, ran.stdout.splitlines())}
    assert ran.returncode == 2, ran.stderr
    assert list(answers) == list(lists)
    assert answers["fine"] is answers["for GPUs"] is None
    assert "Number of experts should be a multiple" in answers["experts"]
    assert "num_attention_heads" in answers["heads"]
    assert answers["unknown"] == "unrecognized arguments: --bogus 1"


def test_one_argument_list_is_judged_by_exit_code(source: Path) -> None:
    ran = validate(source, ["--world-size", "2", "--", *flags(TINY)])
    assert (ran.returncode, ran.stdout) == (0, "valid\n"), ran.stderr
    ran = validate(source, ["--stdin"], "not json")
    assert ran.returncode == 2
    assert "error: line 1: expected name, world_size and argv" in ran.stderr
