"""The shipped examples: every file of them loads, plans and renders, and describes the model that it names.

The sizes are checked against what the models' makers publish: a wrong dimension, vocabulary, or number of experts
changes the number of parameters that it gives.
"""

import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import EXPERIMENTS, name_of
from factories import ROOT, run_py

from flagscale.errors import ConfigError
from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import Config, load_config
from flagscale.runner.launch.dry import render_dry_run
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site

SITE = Site("/flagscale", None, {"megatron": "/flagscale/third_party/Megatron-LM/src"})

# experiment, overrides -> parameters in billions as published (total, active for one token), chips
PUBLISHED = {
    ("aquila/train", ()): (7.3, 7.3, 8),
    ("qwen3/train", ("train=0_6b",)): (0.6, 0.6, 8),
    ("qwen3/train", ()): (8.2, 8.2, 8),
    ("qwen3/train_32b", ()): (32.8, 32.8, 16),
    ("qwen3/train_30b_a3b", ()): (30.5, 3.3, 16),
    ("qwen3/train_235b_a22b", ()): (235, 22, 128),
    ("llama3/train", ()): (8.03, 8.03, 8),
    ("llama3/train_70b", ()): (70.6, 70.6, 64),
    ("deepseek_v3/train", ()): (15.96, 2.9, 8),
    ("deepseek_v3/train_671b", ()): (671, 37, 256),
    ("mixtral/train", ()): (46.7, 12.9, 8),
    ("mixtral/train_4_hosts", ()): (46.7, 12.9, 32),
    ("qwen2_5/train", ()): (7.61, 7.61, 8),
}
CASES = pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "+".join((case[0], *case[1])))

Arguments = Mapping[str, Any]
Case = tuple[str, tuple[str, ...]]


@cache
def load_example(case: Case) -> Config:
    model, name = case[0].split("/")
    return load_config(compose_config(ROOT / "examples" / model / "conf", name, case[1]), ROOT)


def arguments_of(config: Config) -> Arguments:
    return {argument.name: argument.value for argument in config.arguments[0]}


def count_attention(args: Arguments) -> int:
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    if not args.get("multi_latent_attention"):
        head = args.get("kv_channels", hidden // heads)
        kv = args["num_query_groups"] if args.get("group_query_attention") else heads
        biases = (heads + 2 * kv) * head if args.get("add_qkv_bias") else 0
        return 2 * hidden * heads * head + 2 * hidden * kv * head + biases
    rank, kv_rank = args.get("q_lora_rank"), args["kv_lora_rank"]
    query = heads * (args["qk_head_dim"] + args["qk_pos_emb_head_dim"])
    queries = rank * (hidden + query) if rank else hidden * query
    values = kv_rank * heads * (args["qk_head_dim"] + args["v_head_dim"])
    return queries + hidden * (kv_rank + args["qk_pos_emb_head_dim"]) + values + heads * args["v_head_dim"] * hidden


def count_expert(args: Arguments) -> int:
    return 3 * args["hidden_size"] * args["moe_ffn_hidden_size"]


def count_experts_layers(args: Arguments) -> int:
    if "num_experts" not in args:
        return 0
    dense = re.match(r"\(\[0\](?:\*(\d+))?\+", str(args.get("moe_layer_freq", "")))
    return args["num_layers"] - (int(dense[1] or 1) if dense else 0)


def count_shared(args: Arguments) -> int:
    """Parameters that every token uses: all but the routed experts, without the layers that predict further ahead."""
    hidden, layers, sparse = args["hidden_size"], args["num_layers"], count_experts_layers(args)
    tables = 2 if args.get("untie_embeddings_and_output_weights") else 1
    total = tables * args["padded_vocab_size"] * hidden + hidden
    total += layers * (count_attention(args) + 2 * hidden)
    total += (layers - sparse) * 3 * hidden * args["ffn_hidden_size"]
    shared = 3 * hidden * args.get("moe_shared_expert_intermediate_size", 0)
    return total + sparse * (shared + hidden * args.get("num_experts", 0))


def count_parameters(args: Arguments) -> tuple[int, int]:
    """(all, those that one token uses)."""
    sparse = count_experts_layers(args)
    routed = sparse * count_expert(args) if sparse else 0
    shared = count_shared(args)
    return shared + routed * args.get("num_experts", 0), shared + routed * args.get("moe_router_topk", 0)


@CASES
def test_dimensions_give_the_published_number_of_parameters(case: Case) -> None:
    total, active = count_parameters(arguments_of(load_example(case)))
    published_total, published_active, _ = PUBLISHED[case]
    assert total / 1e9 == pytest.approx(published_total, rel=0.01)
    assert active / 1e9 == pytest.approx(published_active, rel=0.03)


@CASES
def test_weights_gradients_and_optimizer_fit_on_chips_of_80_gb(case: Case) -> None:
    """Bytes a parameter: 2 the weight, 4 its gradient, 12 master copy and moments, the latter over the replicas."""
    config = load_example(case)
    args, world = arguments_of(config), sum(host.slots for host in config.hosts)
    tensor, stages = args["tensor_model_parallel_size"], args["pipeline_model_parallel_size"]
    experts = args.get("expert_model_parallel_size", 1) * args.get("expert_tensor_parallel_size", tensor)
    total, shared = count_parameters(args)[0], count_shared(args)
    state = 0 if args.get("optimizer_cpu_offload") else 12
    replicas, expert_replicas = world // (tensor * stages), world // (experts * stages)
    used = shared / (tensor * stages) * (6 + state / replicas)
    used += (total - shared) / (experts * stages) * (6 + state / expert_replicas)
    assert used < 60e9


@CASES
def test_example_runs_on_the_chips_that_its_first_line_names(case: Case) -> None:
    config = load_example(case)
    assert sum(host.slots for host in config.hosts) == PUBLISHED[case][2]
    head = (ROOT / "examples" / case[0].replace("/", "/conf/")).with_suffix(".yaml").read_text().splitlines()[0]
    count = len(config.hosts)
    assert ("one machine with 8 chips" if count == 1 else f"{count} machines with 8 chips") in head
    assert {host.chip for host in config.hosts} == ({None} if count == 1 else {"H100"})


@CASES
def test_all_micro_batches_fill_the_pipeline(case: Case) -> None:
    config = load_example(case)
    args, world = arguments_of(config), sum(host.slots for host in config.hosts)
    stages = args["pipeline_model_parallel_size"]
    replicas = world // (args["tensor_model_parallel_size"] * stages)
    micro_batches = args["global_batch_size"] // (args["micro_batch_size"] * replicas)
    assert micro_batches >= 2 * stages
    if "num_layers_per_virtual_pipeline_stage" in args:
        assert micro_batches % stages == 0


@CASES
def test_example_is_checked_strictly_and_gives_no_warning(case: Case) -> None:
    config = load_example(case)
    assert config.warnings == ()
    assert config.experiment.task.unknown_args == "error"


def test_published_sizes_cover_every_experiment_and_every_size() -> None:
    tested = {name for name, _ in PUBLISHED}
    assert {name_of(path) for path in EXPERIMENTS} - {"tiny/train"} <= tested
    used = {
        ROOT / "examples" / case[0].split("/")[0] / "conf" / "train" / f"{_size_of(case)}.yaml" for case in PUBLISHED
    }
    sizes = set(ROOT.glob("examples/*/conf/train/*.yaml"))
    assert {path for path in sizes if "tiny" not in path.parts} == used


def _size_of(case: Case) -> str:
    chosen = [word.partition("=")[2] for word in case[1] if word.startswith("train=")]
    top = yaml.safe_load((ROOT / "examples" / case[0].replace("/", "/conf/")).with_suffix(".yaml").read_text())
    return chosen[0] if chosen else str(top["defaults"][0]["train"])


def test_experiment_composes_plans_and_dry_runs(experiment: Path) -> None:
    config = load_config(compose_config(experiment.parent, experiment.stem), ROOT)
    assert config.action == "run"
    plan = plan_config(config, SITE)
    assert plan.num_ranks == sum(host.slots for host in config.hosts)
    text = render_dry_run(plan)
    assert text == render_dry_run(plan_config(config, SITE))
    for host in plan.hosts:
        assert f"==== {host.label}: torchrun" in text
    assert f"--num-layers {arguments_of(config)['num_layers']} " in text


def test_every_yaml_of_the_examples_is_a_mapping_without_repeated_keys() -> None:
    files = sorted(ROOT.glob("examples/*/conf/**/*.yaml"))
    assert len(files) >= 2 * len({path.parts[-3] for path in files if path.stem == "train"})
    for path in files:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        if path.parent.name == "serve":  # a list of models
            assert isinstance(node, yaml.SequenceNode), path
        for row in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            assert isinstance(row, yaml.MappingNode), path
            keys = [key.value for key, _ in row.value]
            assert len(keys) == len(set(keys)), path


@pytest.mark.parametrize("experiment_name", [name for name in map(name_of, EXPERIMENTS) if name.endswith("/train")])
def test_default_dry_runs_from_any_folder(experiment_name: str, tmp_path: Path) -> None:
    """`train.yaml` needs no hostfile, so that a newcomer can look at it anywhere."""
    model = experiment_name.split("/")[0]
    config = load_config(compose_config(ROOT / "examples" / model / "conf", "train"), tmp_path)
    assert [host.name for host in config.hosts] == ["localhost"]
    assert plan_config(config, SITE).exp_dir.startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["qwen3/train", "deepseek_v3/train_671b"])
def test_run_py_dry_runs_an_example(name: str, tmp_path: Path) -> None:
    experiment = (ROOT / "examples" / name.replace("/", "/conf/")).with_suffix(".yaml")
    done = run_py(experiment, "action=dryrun", f"hydra.run.dir={tmp_path}", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torchrun" in done.stdout


def test_data_and_tokenizer_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PATH", "/data/my corpus")
    monkeypatch.setenv("TOKENIZER_PATH", "/data/tokenizer")
    args = arguments_of(load_example.__wrapped__(("llama3/train", ())))
    assert (args["data_path"], args["tokenizer_model"]) == ("/data/my corpus", "/data/tokenizer")


@pytest.mark.parametrize("chosen", ["32", "0_6", "8", "235.22"])
def test_a_number_for_a_size_is_answered_with_the_nearest_size(chosen: str, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "examples/qwen3/conf", conf)
    file = conf / "train.yaml"
    file.write_text(file.read_text().replace("train: 8b", f"train: {chosen}", 1))
    for overrides, where in (((), str(file)), ((f"train={chosen}",), f"override `train={chosen}`")):
        with pytest.raises(ConfigError) as caught:
            compose_config(conf, "train", overrides)
        assert f"train/{chosen}" in str(caught.value)
        assert any(fault.suggestion or fault.expected for fault in caught.value.faults)
        assert where in str(caught.value) or str(conf) in str(caught.value)


@pytest.mark.parametrize("key", ["exp_name", "exp_dir"])
def test_run_py_finds_the_typo_that_keeps_hydra_from_starting(key: str, tmp_path: Path) -> None:
    """Hydra's own folder hangs on `exp_dir`: its complaint alone would not name the misspelt key."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "examples/qwen3/conf", conf)
    file = conf / "train.yaml"
    file.write_text(file.read_text().replace(f"{key}: ", f"{key}s: ", 1))
    done = run_py(file, "action=dryrun", cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(
        rf"train\.yaml:\d+: experiment\.{key}s: there is no key `{key}s` here; did you mean `{key}`\?", done.stderr
    )
    assert "Traceback" not in done.stderr
