"""Small builders of configurations, plans and hosts: each test says only what it is about.

Trees are what Hydra would have composed, as plain dicts, so that most tests need no Hydra; `write_config` puts the same
trees into YAML files for the tests that do.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flagscale.runner.config.compose import Composed
from flagscale.runner.config.hostfile import Host
from flagscale.runner.config.load import Config, load_config
from flagscale.runner.plan.job import HostPlan, JobPlan, ProcessSpec
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site

ROOT = Path(__file__).resolve().parent.parent
SITE = Site("/opt/flagscale", "/opt/venv/bin", {"megatron": "/opt/megatron", "verl": "/opt/verl"})
CWD = Path("/home/user")

Tree = dict[str, Any]


def _experiment(kind: str, entrypoint: str | None, **task: Any) -> Tree:
    return {
        "exp_name": "demo",
        "exp_dir": "outputs",
        "task": {"type": kind, **({"entrypoint": entrypoint} if entrypoint else {}), **task},
        "runner": {"nproc_per_node": 2},
        "envs": {"GREETING": "hello"},
    }


def train_tree(**changes: Any) -> Tree:
    """A training configuration that passes every check; `changes` are dotted paths with `__` for the dots."""
    tree = {
        "experiment": _experiment("train", "flagscale/train/train_gpt.py", backend="megatron"),
        "action": "run",
        "train": {
            "system": {
                "tensor_model_parallel_size": 2,
                "precision": {"bf16": True},
                "checkpoint": {"save_interval": 10},
            },
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "seq_length": 128,
                "max_position_embeddings": 128,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "train_iters": 10,
                "optimizer": {"lr_scheduler": {"lr": 1e-4}},
            },
            "data": {"mock_data": True, "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 511}},
        },
    }
    return changed(tree, changes)


def serve_model(engine: str = "vllm", **changes: Any) -> Tree:
    return {"serve_id": f"{engine}_model", "engine": engine, "engine_args": {"model": "/models/m"}, **changes}


def serve_tree(*models: Tree, **changes: Any) -> Tree:
    tree = {"experiment": _experiment("serve", None), "action": "run", "serve": list(models) or [serve_model()]}
    return changed(tree, changes)


def inference_tree(**changes: Any) -> Tree:
    task = {
        "llm": {"model": "/models/m", "tensor_parallel_size": 2},
        "generate": {"prompts": ["Hello, my name is", 'It\'s "so" $HOME'], "sampling": {"top_p": 0.9}},
    }
    experiment = _experiment("inference", "flagscale/inference/inference_aquila.py", backend="vllm")
    return changed({"experiment": experiment, "action": "run", "inference": task}, changes)


def rl_tree(**changes: Any) -> Tree:
    task = {
        "config-path": "config",
        "config-name": "ppo_trainer.yaml",
        "trainer": {"logger": ["console", "wandb"], "val_before_train": False, "nnodes": 1},
        "append_kargs": {"actor_rollout_ref": {"rollout": {"trust_remote_code": True}}},
    }
    experiment = _experiment("rl", "verl.trainer.main_ppo", backend="verl")
    return changed({"experiment": experiment, "action": "run", "rl": task}, changes)


def compress_tree(**changes: Any) -> Tree:
    task = {
        "model": {"model_path": "/models/m", "device_map": "auto"},
        "data": {"num_calibration_samples": 8},
        "compress_args": {"quantization": [{"algo": {"gptq": {"blocksize": 128}}, "scheme": "W4A16"}]},
    }
    experiment = _experiment("compress", "flagscale/compress/compressor.py")
    return changed({"experiment": experiment, "action": "run", "compress": task}, changes)


TREES = {
    "train": train_tree,
    "serve": serve_tree,
    "inference": inference_tree,
    "rl": rl_tree,
    "compress": compress_tree,
}


def changed(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """A copy of the tree with values at paths whose parts are joined by `__` or by dots."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        parts = path.replace("__", ".").split(".")
        node: Any = tree
        for part in parts[:-1]:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(parts[-1])] = value
        else:
            node[parts[-1]] = value
    return tree


def composed(tree: Tree, **fields: Any) -> Composed:
    """The tree as if Hydra had composed it from `conf/train.yaml`."""
    return Composed(tree, Path("conf"), "train", **fields)


def load(tree: Tree, cwd: Path = CWD, **fields: Any) -> Config:
    return load_config(composed(tree, **fields), cwd)


def plan(tree: Tree, cwd: Path = CWD, site: Site = SITE) -> JobPlan:
    return plan_config(load(tree, cwd), site)


def hosts(count: int, slots: int = 8, chip: str | None = None) -> tuple[Host, ...]:
    return tuple(Host(f"node{index}", slots, chip) for index in range(count))


def write_hostfile(folder: Path, listed: Sequence[Host]) -> Path:
    rows = [f"{host.name} slots={host.slots}" + (f" type={host.chip}" if host.chip else "") for host in listed]
    path = folder / "hostfile.txt"
    path.write_text("\n".join(rows) + "\n")
    return path


def write_config(folder: Path, tree: Tree, name: str = "exp") -> Path:
    """The tree as an experiment file and a task file, the way examples/ lays them out; returns the experiment file."""
    kind = tree["experiment"]["task"]["type"]
    top = {"defaults": ["_self_", {kind: "small"}], **{key: value for key, value in tree.items() if key != kind}}
    top.setdefault("hydra", {"run": {"dir": "${experiment.exp_dir}/hydra"}})
    (folder / kind).mkdir(parents=True, exist_ok=True)
    (folder / kind / "small.yaml").write_text(yaml.safe_dump(tree[kind], sort_keys=False, allow_unicode=True))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(top, sort_keys=False, allow_unicode=True))
    return path


def process(*argv: str, **fields: Any) -> ProcessSpec:
    return ProcessSpec(**{"name": "stub", "argv": argv or ("stub",), "cwd": "/", **fields})


def host_plan(*processes: ProcessSpec, **fields: Any) -> HostPlan:
    return HostPlan(**{"host": Host("localhost", 1), "node_rank": 0, "processes": processes, **fields})


def job_plan(*host_plans: HostPlan, **fields: Any) -> JobPlan:
    defaults = {
        "task": "train",
        "backend": "",
        "exp_name": "demo",
        "exp_dir": "/out",
        "log_dir": "/out/logs",
        "hosts": host_plans or (host_plan(process()),),
    }
    return JobPlan(**{**defaults, **fields})


def run_python(
    *argv: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A real Python process with this checkout importable; output as text."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    words = [sys.executable, *map(str, argv)]
    return subprocess.run(words, cwd=cwd, env=whole, capture_output=True, text=True, timeout=120)


def run_py(
    config: Path, *words: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python run.py` on an experiment file, as a user types it from the folder `cwd`."""
    argv = ("--config-path", str(config.parent), "--config-name", config.stem, *words)
    return run_python(ROOT / "run.py", *argv, cwd=cwd, env=env)
