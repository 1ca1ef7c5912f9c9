"""The example `tiny` trained by the real Megatron over several hosts: the losses are those of one host."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from factories import ROOT
from hosts import MakeHosts, missing
from ssh_jobs import Bench

pytest_plugins = ("host_fixtures",)
pytestmark = [
    pytest.mark.engine,
    pytest.mark.hosts,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

pytest.importorskip("paramiko")

PATIENCE_S = 400.0
NUM_STEPS = 6
SMALL = (
    *("train.model.num_layers=2", "train.model.hidden_size=64", "train.model.ffn_hidden_size=128"),
    *("train.model.num_attention_heads=4", "train.model.seq_length=32", "train.model.max_position_embeddings=32"),
    *("train.model.eval_interval=100000", "train.model.eval_iters=1", f"train.model.train_iters={NUM_STEPS}"),
    *("train.model.optimizer.lr_scheduler.lr_warmup_iters=2", "train.system.tensor_model_parallel_size=1"),
    *("train.model.micro_batch_size=2", "train.model.global_batch_size=8"),
)  # fmt: skip
"""data parallel: whatever the number of ranks, a step sees the same 8 sequences"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetch = [sys.executable, "-c", "import sys; from flagscale.cli import main; sys.exit(main())"]
    subprocess.run([*fetch, "source", "fetch", "megatron"], cwd=ROOT, check=True)
    prefix = tmp_path_factory.mktemp("data") / "text"
    text = ROOT / "examples" / "tiny" / "data" / "text.txt"
    subprocess.run([sys.executable, ROOT / "tools/datasets/prepare_text.py", "--output", prefix, text], check=True)
    return prefix


def train(bench: Bench, data: Path, name: str, *overrides: str) -> dict[int, float]:
    """Train in a folder of its own; returns the loss of each iteration."""
    words = (f"experiment.exp_dir={bench.base / name}", f"train.data.data_path={data}", "experiment.cmds=null")
    done = bench.call("train", "tiny", *words, *SMALL, *overrides, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(?:\S+ \| )?iteration +(\d+)/ *\d+ · loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in rows] == list(range(1, NUM_STEPS + 1)), done.stdout
    return {int(step): float(loss) for step, loss in rows}


def over_hosts(bench: Bench, *lines: str) -> tuple[str, ...]:
    hostfile = bench.base / "hostfile"
    hostfile.write_text("".join(f"{line}\n" for line in lines))
    return (
        *(f"+experiment.runner.hostfile={hostfile}", f"experiment.runner.nnodes={len(lines)}"),
        *("experiment.runner.nproc_per_node=null",),
    )


def as_debian_does(bench: Bench) -> None:
    """Every host believes that its own name is 127.0.1.1, so collectives that ask it for its address go astray."""
    for host in bench.hosts.layout.hosts:
        path = host.etc / "hosts"
        path.write_text(path.read_text().replace(f"{host.address} {host.name}\n", f"127.0.1.1 {host.name}\n"))


def test_two_hosts_learn_what_one_does(make_hosts: MakeHosts, data: Path, tmp_path: Path) -> None:
    bench = Bench(make_hosts(2), tmp_path)
    as_debian_does(bench)
    alone = train(bench, data, "alone")
    spread = train(bench, data, "spread", *over_hosts(bench, "h2 slots=1", "h1 slots=1"))
    assert spread == pytest.approx(alone, abs=1e-3)
    assert alone[NUM_STEPS] < alone[1] - 0.2


@pytest.mark.slow
def test_four_hosts_learn_what_one_does(make_hosts: MakeHosts, data: Path, tmp_path: Path) -> None:
    bench = Bench(make_hosts(4), tmp_path)
    as_debian_does(bench)
    alone = train(bench, data, "alone")
    spread = train(bench, data, "spread", *over_hosts(bench, *(f"h{number} slots=1" for number in (3, 1, 4, 2))))
    assert spread == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow
def test_two_places_of_ray_learn_what_one_host_does(make_hosts: MakeHosts, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    bench = Bench(make_hosts(2), tmp_path)
    as_debian_does(bench)
    alone = train(bench, data, "alone")
    spread = train(bench, data, "ray", *over_hosts(bench, "h2 slots=1", "h1 slots=1"), "+experiment.runner.type=ray")
    assert spread == pytest.approx(alone, abs=1e-3)
