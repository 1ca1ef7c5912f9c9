"""How long a user waits for the command line, against what it cannot be faster than.

    python benchmarks/startup.py [--runs 15]

Three ratios, each of whole processes run in turn (A B A B ..) so that a machine's drift falls on both alike; the median
of the pairs is quoted, of processor time and of wall time:

    dry run of a 64-host job through run.py  /  an empty Hydra application       promised: at most 1.5
    the same of 1,024 hosts                  /  an empty Hydra application       promised: at most 3
    flagscale --help                         /  python -c pass                    promised: at most 3
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_HOSTS, MOST_HOSTS = 64, 1024

EMPTY_APP = """
import hydra


@hydra.main(version_base=None, config_path=None)
def main(config):
    pass


main()
"""

EXPERIMENT = """
defaults:
  - _self_
  - train: model
experiment:
  exp_name: startup
  exp_dir: {folder}/outputs
  task: {{type: train, backend: megatron, entrypoint: ./flagscale/train/train_gpt.py}}
  runner: {{backend: torchrun, nnodes: {num_hosts}, nproc_per_node: 8, hostfile: {folder}/hostfile.txt}}
  envs: {{CUDA_DEVICE_MAX_CONNECTIONS: 1, NCCL_SOCKET_IFNAME: bond0}}
action: dryrun
hydra: {{run: {{dir: "${{experiment.exp_dir}}/hydra"}}}}
"""

TASK = """
system:
  tensor_model_parallel_size: 8
  pipeline_model_parallel_size: 8
  use_distributed_optimizer: true
  precision: {bf16: true}
  checkpoint: {save_interval: 500}
model:
  num_layers: 80
  hidden_size: 8192
  ffn_hidden_size: 28672
  num_attention_heads: 64
  group_query_attention: true
  num_query_groups: 8
  seq_length: 8192
  max_position_embeddings: 8192
  micro_batch_size: 1
  global_batch_size: 2048
  train_iters: 1000
  optimizer: {weight_decay: 0.1, clip_grad: 1.0, lr_scheduler: {lr: 3.0e-4, min_lr: 3.0e-5, lr_decay_style: cosine}}
data:
  mock_data: true
  tokenizer: {tokenizer_type: NullTokenizer, vocab_size: 128000}
"""


def write_inputs(folder: Path, num_hosts: int = NUM_HOSTS) -> tuple[list[str], list[str]]:
    """The command lines of the dry run and of the empty application."""
    (folder / "conf" / "train").mkdir(parents=True)
    (folder / "conf" / "job.yaml").write_text(EXPERIMENT.format(folder=folder, num_hosts=num_hosts))
    (folder / "conf" / "train" / "model.yaml").write_text(TASK)
    (folder / "hostfile.txt").write_text("".join(f"node-{i} slots=8 type=H100\n" for i in range(num_hosts)))
    (folder / "empty.py").write_text(EMPTY_APP)
    job = [sys.executable, str(ROOT / "run.py"), "--config-path", str(folder / "conf"), "--config-name", "job"]
    return job, [sys.executable, str(folder / "empty.py"), f"hydra.run.dir={folder / 'empty'}"]


def time_once(command: list[str]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of a whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def compare(name: str, ours: list[str], peer: list[str], promised: float, runs: int) -> bool:
    for command in (ours, peer):
        time_once(command)
    pairs = [(time_once(ours), time_once(peer)) for _ in range(runs)]
    cpu = statistics.median(a[0] / b[0] for a, b in pairs)
    wall = statistics.median(a[1] / b[1] for a, b in pairs)
    ours_s, peer_s = (statistics.median(pair[side][1] for pair in pairs) for side in (0, 1))
    verdict = "kept" if min(cpu, wall) <= promised else "BROKEN"
    print(
        f"{name}: {wall:.2f} times (wall), {cpu:.2f} times (processor), {ours_s:.3f} s against {peer_s:.3f} s;"
        f" promised at most {promised}: {verdict}"
    )
    return verdict == "kept"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted pairs (default: 15)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job, empty = write_inputs(Path(folder, "some"))
        large, _ = write_inputs(Path(folder, "many"), MOST_HOSTS)
        kept = [
            compare(f"{NUM_HOSTS}-host dry run / empty Hydra application", job, empty, 1.5, args.runs),
            compare(f"{MOST_HOSTS}-host dry run / empty Hydra application", large, empty, 3.0, args.runs),
            compare(
                "flagscale --help / python -c pass",
                [str(Path(sys.executable).with_name("flagscale")), "--help"],
                [sys.executable, "-c", "pass"],
                3.0,
                args.runs,
            ),
        ]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
