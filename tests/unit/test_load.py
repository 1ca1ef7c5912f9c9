"""Loading: FlagScale's own shapes load, and everything wrong with a configuration is told at once, each placed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import CWD, TREES, changed, load, serve_model, serve_tree, train_tree, write_config

from flagscale.errors import ConfigError
from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import Config, hidden_values, load_config
from flagscale.runner.config.tasks import CustomServe, ServeModel


def faults_of(tree: dict[str, Any], **fields: Any) -> dict[str, str]:
    """Dotted path -> what is said about it, without the path."""
    with pytest.raises(ConfigError) as caught:
        load(tree, **fields)
    return {fault.path: str(fault).split(": ", 2)[2] for fault in caught.value.faults}


@pytest.mark.parametrize("kind", TREES)
def test_a_sound_configuration_of_every_task_type_loads(kind: str) -> None:
    config = load(TREES[kind]())
    assert config.task_type == kind
    assert config.action == "run"
    assert [(host.name, host.slots) for host in config.hosts] == [("localhost", 2)]


def test_all_faults_at_once_each_with_path_and_suggestion() -> None:
    tree = train_tree(
        experiment__runner__nproc_per_nod=3,
        experiment__runner__tee=[1],
        experiment__task__backend="megatorn",
        experiment__exp_dir=None,
        acton="run",
        action="rnu",
        train__sytem={"x": 1},
        train__model__hidden_siz=3,
    )
    assert faults_of(tree) == {
        "experiment.runner.nproc_per_nod": "there is no key `nproc_per_nod` here; did you mean `nproc_per_node`?",
        "experiment.runner.tee": "is `[1]`; expected a string (in quotes, where YAML reads a number) or a whole number",
        "experiment.exp_dir": "is missing; expected a value",
        "acton": "there is no key `acton` here; did you mean `action`?",
        "action": "there is no action `rnu`; did you mean `run`?",
        "train.model.hidden_siz": "Megatron-LM 0.19.2 has no argument `hidden_siz`; did you mean `hidden_size`?",
        "train.sytem": "there is no key `sytem` here; did you mean `system`?",
    }


def test_faults_are_placed_in_files_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path, train_tree(train__model__num_leyers=3))
    composed = compose_config(path.parent, path.stem, ["+experiment.runner.nnode=1"])
    with pytest.raises(ConfigError) as caught:
        load_config(composed, tmp_path)
    rows = {fault.path: fault for fault in caught.value.faults}
    line = 1 + (tmp_path / "train" / "small.yaml").read_text().splitlines().index("  num_leyers: 3")
    assert rows["train.model.num_leyers"].where == f"train/small.yaml:{line}"
    assert rows["train.model.num_leyers"].suggestion == "num_layers"
    assert rows["experiment.runner.nnode"].where == "override `+experiment.runner.nnode=1`"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("experiment.runner.nproc_per_node", "two", "is `two`; expected a whole number"),
        ("experiment.runner.nproc_per_node", True, "is `true`; expected a whole number"),
        ("experiment.runner.nproc_per_node", 1.5, "is `1.5`; expected a whole number"),
        ("experiment.runner.nproc_per_node", 0, "is `0`; expected greater than or equal to 1"),
        ("experiment.runner.hang_detection_timeout", True, "is `true`; expected a number"),
        ("experiment.runner.per_node_task", "maybe", "is `maybe`; expected true or false"),
        ("experiment.runner.master_port", 70000, "is `70000`; expected less than or equal to 65535"),
        ("experiment.runner.backend", "-c", "is `-c`; expected the name or the path of a program"),
        ("experiment.runner.type", "shh", "is `shh`; expected ssh, local, cloud, ray or slurm; did you mean `ssh`?"),
        ("experiment.runner", ["ssh"], 'is `["ssh"]`; expected a mapping'),
        ("experiment.exp_name", 3, "is `3`; expected a string (in quotes, where YAML reads a number)"),
        ("experiment.exp_dir", "", "is ``; expected String should have at least 1 character"),
        ("experiment.envs", ["A=1"], 'is `["A=1"]`; expected a mapping'),
        ("experiment.envs.A", {"B": 1}, 'is `{"B": 1}`; expected a string (in quotes, where YAML reads a number)'),
        ("experiment.task.type", "trian", "is `trian`; expected train, inference, serve, compress or rl;"
         " did you mean `train`?"),
        ("experiment.task.unknown_args", "worn", "is `worn`; expected error, warn or pass; did you mean `warn`?"),
        ("experiment.cmds.before_start", ["a"], 'is `["a"]`; expected a string (in quotes, where YAML reads a number)'),
        ("experiment.runner.cli_args.engine_args", "{oops", "is `{oops`; expected a mapping, or the text of a JSON"
         " object"),
        ("train.model", "big", "is `big`; expected a mapping"),
        ("train.system", [1], "is `[1]`; expected a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_type_says_what_was_expected(path: str, value: Any, says: str) -> None:
    assert faults_of(changed(train_tree(), {path: value}))[path] == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("A-B", "expected a name of a variable: letters, digits and _, no digit first"),
        ("A B", "expected a name of a variable"),
        ("2A", "expected a name of a variable"),
        ("", "expected a name of a variable"),
        ("A=$(touch x)", "expected a name of a variable"),
        ("NAÏVE", "expected a name of a variable"),
        ("UID", "expected another name: bash sets this variable itself"),
        ("RANDOM", "expected another name: bash sets this variable itself"),
        ("FLAGSCALE_RUN_TOKEN", "expected another name: the launcher itself sets this variable"),
    ],
)
def test_names_of_variables_are_what_a_script_can_export(name: str, says: str) -> None:
    tree = train_tree()
    tree["experiment"]["envs"][name] = "x"
    tree["experiment"]["node_specific"] = {"h": {name: "x"}}
    found = faults_of(tree)
    assert says in found[f"experiment.envs.{name}"]
    assert says in found[f"experiment.node_specific.h.{name}"]


@pytest.mark.parametrize("path", ["experiment.exp_name", "experiment.envs.A", "train.data.data_path",
                                  "experiment.runner.hostfile", "experiment.cmds.before_start"])  # fmt: skip
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a\0b", "holds a NUL, which no command line, file name or environment can hold"),
        ("\udcff", "holds bytes that are not UTF-8 text"),
        (b"x", "is of the type bytes; expected text, a number, true or false"),
        (2**70, "is a number too large to be meant; expected less than 2^64; in quotes, if it is a name"),
    ],
)
def test_what_nothing_can_hold_is_refused_wherever_it_stands(path: str, value: Any, says: str) -> None:
    assert faults_of(changed(train_tree(), {path: value})) == {path: says}


def test_a_key_and_the_current_folder_may_not_hold_them_either() -> None:
    assert "train.model.a\0b" in faults_of(changed(train_tree(), {"train.model.a\0b": 1}))
    with pytest.raises(ConfigError, match=r"experiment\.exp_dir: holds bytes that are not UTF-8 text"):
        load(train_tree(), cwd=Path("/home/\udcff"))


NULLABLE = [
    *("exp_name", "task.backend", "task.unknown_args", "runner", "runner.type", "runner.nnodes", "runner.hostfile"),
    *("runner.rdzv_backend", "runner.tee", "runner.foreground", "runner.deploy", "runner.cli_args", "envs", "cmds"),
    *("cmds.before_start", "secrets", "node_specific", "node_args", "auto_tuner", "deploy", "seed", "envs.GREETING"),
]


@pytest.mark.parametrize("key", NULLABLE)
def test_null_is_as_good_as_left_out(key: str) -> None:
    tree = train_tree(train__system__tensor_model_parallel_size=1)
    with_null = load(changed(tree, {f"experiment.{key}": None}))
    node: Any = tree["experiment"]
    for part in key.split(".")[:-1]:
        node = node.setdefault(part, {})
    node.pop(key.split(".")[-1], None)
    assert with_null.experiment == load(tree).experiment


def test_null_inside_mappings_of_sections_is_left_out_too() -> None:
    model = serve_model(engine_args_specific={"vllm": None}, resources=None, depends=None)
    assert load(serve_tree(model)).task == load(serve_tree(serve_model())).task
    assert load(train_tree(action=None, device_type_specific={"A": None})).action == "run"
    with pytest.raises(ConfigError, match=r"serve\.0\.serve_id: is missing"):
        load(serve_tree(serve_model(serve_id=None)))


def test_null_of_the_ssh_port_means_no_port() -> None:
    assert load(train_tree(experiment__runner__ssh_port=None)).experiment.runner.ssh_port is None
    assert load(train_tree()).experiment.runner.ssh_port == 22


def test_unknown_keys_that_are_interpolated_are_no_typo() -> None:
    tree = train_tree(experiment__mine={"deep": 3}, own_root=1, train__anchors={"a": 1}, train__model__my_number=4)
    seen = frozenset({"experiment.mine.deep", "own_root", "train.anchors.a", "train.model.my_number"})
    assert load(tree, references=seen).experiment.exp_name == "demo"
    assert set(faults_of(tree)) == {"experiment.mine", "own_root", "train.anchors", "train.model.my_number"}


def test_unknown_arguments_can_be_warned_of_or_passed() -> None:
    tree = train_tree(train__model__brand_new_switch=True)
    assert "train.model.brand_new_switch" in faults_of(tree)
    warned = load(changed(tree, {"experiment.task.unknown_args": "warn"}))
    assert [fault.path for fault in warned.warnings] == ["train.model.brand_new_switch"]
    passed = load(changed(tree, {"experiment.task.unknown_args": "pass"}))
    assert passed.warnings == ()
    assert "brand_new_switch" in {argument.name for argument in passed.arguments[0]}


def test_the_task_section_and_its_entry_point_must_be_there() -> None:
    tree = train_tree()
    tree["serve"] = tree.pop("train")
    assert faults_of(tree)["train"] == (
        "experiment.task.type is train, but there is no section `train`; the configuration has `serve`; "
        "expected a task file: `defaults: [{train: <file>}]`"
    )
    for kind in ("train", "inference", "compress", "rl"):
        tree = TREES[kind]()
        del tree["experiment"]["task"]["entrypoint"]
        assert "needs one; expected a script or a module" in faults_of(tree)["experiment.task.entrypoint"]


def test_an_unknown_backend_has_the_nearest_name() -> None:
    text = "train has no backend `megatorn`; did you mean `megatron`?"
    assert faults_of(train_tree(experiment__task__backend="megatorn")) == {"experiment.task.backend": text}


@pytest.mark.parametrize("value", [3, "x", [1], {"h": 3}])
def test_overlays_at_the_root_are_mappings_of_mappings(value: Any) -> None:
    assert faults_of(train_tree(node_specific=value)) == {"node_specific": "cannot be read; expected a mapping of"
                                                          " names to mappings"}  # fmt: skip


def test_overlays_hold_arguments_of_the_backend() -> None:
    rows = {"mlu590": {"build_dir": "/b", "use-flash-attn": "false", "num_leyers": 3, "bf16": "perhaps", "seed": None}}
    found = faults_of(train_tree(device_type_specific=rows))
    assert set(found) == {"device_type_specific.mlu590.num_leyers", "device_type_specific.mlu590.bf16"}
    assert found["device_type_specific.mlu590.num_leyers"].endswith("did you mean `num_layers`?")


@pytest.mark.parametrize("value", [None, {}, [], "x", 3])
def test_an_experiment_that_is_nothing_is_a_fault(value: Any) -> None:
    assert any(path.startswith("experiment") for path in faults_of({"experiment": value, "train": {}}))
    assert faults_of({})["experiment"] == "is missing; expected a section"


def test_hosts_that_the_hostfile_lacks_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    config = load(
        train_tree(experiment__runner__hostfile="hosts", experiment__node_specific={"node2": {"A": 1}}), tmp_path
    )
    assert [str(fault).split(": ", 1)[1] for fault in config.warnings] == [
        "experiment.node_specific.node2: the hostfile names no such host; did you mean `node1`?"
    ]


def test_a_hostfile_is_found_from_where_the_command_is_typed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    config = load(train_tree(experiment__runner__hostfile="hosts"), tmp_path)
    assert [host.name for host in config.hosts] == ["a", "b"]
    assert "No such file" in faults_of(train_tree(experiment__runner__hostfile="hosts"))["experiment.runner.hostfile"]


# --- shapes that FlagScale's users have ------------------------------------------------------------------------------

AQUILA = """
experiment:
  exp_name: aquila2
  exp_dir: ./outputs
  task: {type: train, backend: megatron, entrypoint: ./flagscale/train/train_gpt.py}
  runner: {backend: torchrun, nnodes: 1, nproc_per_node: 8}
  envs: {CUDA_VISIBLE_DEVICES: "0,1,2,3,4,5,6,7", CUDA_DEVICE_MAX_CONNECTIONS: 1}
train:
  system:
    tensor_model_parallel_size: 1
    disable_bias_linear: True
    use_distributed_optimizer: True
    precision: {fp16: True, initial_loss_scale: 522893, min_loss_scale: 1.0, attention_softmax_in_fp32: True}
    logging: {log_interval: 1, tensorboard_log_interval: 1, wandb_project: p, wandb_exp_name: e}
    checkpoint: {save_interval: 2000}
  model:
    num_layers: 32
    hidden_size: 4096
    num_attention_heads: 32
    seq_length: 2048
    max_position_embeddings: 2048
    norm_epsilon: 1e-5
    no_position_embedding: true
    swiglu: true
    train_samples: 1002539063
    micro_batch_size: 2
    global_batch_size: 1728
    optimizer:
      weight_decay: 0.1
      adam_beta1: 0.9
      lr_scheduler: {lr: 2.0e-5, min_lr: 2.0e-6, lr_warmup_samples: 3076172, lr_decay_style: cosine}
  data:
    data_path: /data/pile
    split: 1
    tokenizer: {tokenizer_type: HuggingFaceTokenizer, vocab_size: 100008}
"""
R1 = """
experiment:
  exp_name: deepseek_r1
  exp_dir: outputs/deepseek_r1
  task: {type: serve}
  deploy: {use_fs_serve: false}
  runner: {hostfile: hostfile.txt, docker: a_container, ssh_port: 22}
  envs: {CUDA_DEVICE_MAX_CONNECTIONS: 1}
  cmds: {before_start: source env.sh && export GLOO_SOCKET_IFNAME=bond0}
serve:
- serve_id: vllm_model
  engine: vllm
  engine_args: {model: /m, tensor_parallel_size: 8, pipeline_parallel_size: 4, gpu_memory_utilization: 0.9,
    max_model_len: 32768, max_num_seqs: 256, enforce_eager: true, trust_remote_code: true}
"""
GRAPH = """
experiment:
  exp_name: several
  exp_dir: outputs/several
  task: {type: serve, entrypoint: null}
  runner:
    hostfile: null
    deploy: {port: 6701, use_fs_serve: true, enable_composition: true, name: /generate,
      request: {args: [prompt], types: [str]}}
serve:
- {serve_id: A, module: models.py, name: One, resources: {num_replicas: 2, num_gpus: 1}}
- {serve_id: B, module: models.py, depends: [A], name: Two, resources: {num_gpus: 1, min_replicas: 2, max_replicas: 3}}
- {serve_id: C, module: models.py, depends: [A, B], name: Three}
"""
TUNER = """
    space: {data_parallel_size: auto, tensor_model_parallel_size: [1, 2, 4, 8], use_recompute: auto}
    control: {max_time_per_task: 200, train_iters: 3}
    memory_model: {model_name: default, gpu_memory: 80000, gpu_utilization: [0.5, 0.9]}
"""
RL = """
experiment:
  exp_name: ppo
  exp_dir: outputs/ppo
  task: {type: rl, backend: verl, entrypoint: verl.trainer.main_ppo}
  runner: {runtime_env: env.yaml, ray_port: 6380}
rl:
  config-path: config
  config-name: ppo_trainer.yaml
  data: {train_files: [/d/a.parquet], shuffle: false}
  trainer: {logger: [console, wandb], n_gpus_per_node: 8}
  append_kargs: {actor_rollout_ref: {rollout: {trust_remote_code: True}}}
"""


def read(text: str, cwd: Path = CWD) -> Config:
    return load(yaml.safe_load(text), cwd)


def test_shape_a_train() -> None:
    config = read(AQUILA)
    given = {argument.name: argument for argument in config.arguments[0]}
    assert given["lr"].path == "train.model.optimizer.lr_scheduler.lr"
    assert given["bf16" if "bf16" in given else "fp16"].value is True
    assert config.hosts[0].slots == 8


def test_shape_b_serve_over_hosts_with_deploy_in_its_old_place(tmp_path: Path) -> None:
    (tmp_path / "hostfile.txt").write_text("10.0.0.1 slots=8 type=gpu\n10.0.0.2 slots=8 type=gpu\n")
    config = read(R1, tmp_path)
    assert isinstance(config.task, tuple)
    assert config.experiment.runner.deploy.use_fs_serve is False
    assert [host.chip for host in config.hosts] == ["gpu", "gpu"]


def test_shape_c_graph_of_models(tmp_path: Path) -> None:
    takes = {"One": "prompt", "Two": "one", "Three": "one, two"}
    code = "\n".join(f"class {name}:\n    def forward(self, {given}): ..." for name, given in takes.items())
    (tmp_path / "models.py").write_text(code)
    config = read(GRAPH, tmp_path)
    assert config.warnings == ()
    assert isinstance(config.task, tuple)
    assert [model.depends for model in config.task if isinstance(model, ServeModel)] == [[], ["A"], ["A", "B"]]


def test_shape_d_tuner_space() -> None:
    tree = changed(yaml.safe_load(AQUILA), {"experiment.auto_tuner": yaml.safe_load(TUNER), "action": "auto_tune"})
    config = load(tree)
    assert config.action == "auto_tune"
    assert config.experiment.auto_tuner is not None
    assert config.experiment.auto_tuner["space"]["tensor_model_parallel_size"] == [1, 2, 4, 8]


def test_shape_e_heterogeneous_training_ends_in_named_dropped_arguments() -> None:
    hetero = {"enable_hetero": True, "hetero_process_meshes": [2, 1, 1, 1, 1], "hetero_device_types": ["A800"]}
    tree = changed(yaml.safe_load(AQUILA), {"train.system.hetero": hetero})
    found = faults_of(tree)
    assert set(found) == {f"train.system.hetero.{name}" for name in hetero}
    assert all("has no argument" in text and "did you mean" not in text for text in found.values())


def test_shape_f_rl() -> None:
    config = read(RL)
    assert config.experiment.runner.ray_port == 6380
    assert config.values["rl"]["config-path"] == "config"


def test_serve_with_an_entry_point_of_its_own_is_a_mapping() -> None:
    tree = serve_tree(experiment__task__entrypoint="serve.py")
    tree["serve"] = {"engine": {"model": "x"}, "generate": {"n": 1}}
    assert isinstance(load(tree).task, CustomServe)
    tree["serve"] = {"engin": {}}
    assert faults_of(tree)["serve.engin"] == "there is no key `engin` here; did you mean `engine`?"


@pytest.mark.parametrize("value", [[], None, "x", 3])
def test_serve_needs_a_model(value: Any) -> None:
    tree = serve_tree()
    tree["serve"] = value
    assert faults_of(tree)["serve"] == "holds no model; expected a list of models, each with a serve_id"


def test_faults_of_a_list_of_models_are_found() -> None:
    rows = [serve_model(serve_id="a", depends=["b"]), serve_model(serve_id="b", module="m.py", engine=None),
            serve_model(serve_id="a"), {"serve_id": "x"}, serve_model(serve_id="../up"),
            serve_model(serve_id="n", engine_args={})]  # fmt: skip
    found = faults_of(serve_tree(*rows[:4], rows[5]))
    assert found["serve.2.serve_id"] == "`a` is the name of another model too"
    expected = "expected experiment.runner.deploy.enable_composition: true, for a graph of models"
    assert found["serve.0.depends"] == f"has no effect here; {expected}"
    assert found["serve.1.module"] == f"`b` is a node of a graph; {expected}"
    assert found["serve.3"] == "`x` has neither an engine nor a module; expected one of the two"
    assert found["serve.4.engine_args.model"] == "is missing; expected a folder or a name of a model"
    assert "expected a name without spaces and slashes" in faults_of(serve_tree(rows[4]))["serve.0.serve_id"]


def test_wrong_keys_of_engines_are_told_by_key() -> None:
    found = faults_of(
        serve_tree(serve_model(engine_args_specific={"vlm": {}}), serve_model(engine="vlm", serve_id="b"))
    )
    assert found["serve.0.engine_args_specific.vlm"].endswith("did you mean `vllm`?")
    assert found["serve.1.engine"].endswith("did you mean `vllm`?")


def test_keys_that_an_override_cannot_spell_are_faults() -> None:
    tree = changed(TREES["rl"](), {"rl.a b": 1, "rl.data": {"x=y": 1, "rows": [{"p:q": 1}]}})
    assert set(faults_of(tree)) == {"rl.a b", "rl.data.x=y", "rl.data.rows.0.p:q"}


def test_inference_is_one_of_two() -> None:
    tree = TREES["inference"]()
    assert "both stand here" in faults_of(changed(tree, {"inference.engine": {"model": "x"}}))["inference"]
    del tree["inference"]["llm"]
    assert "neither stands here" in faults_of(tree)["inference"]


def test_hidden_values_are_found_in_a_configuration_that_is_not_sound() -> None:
    from factories import composed

    tree = train_tree(experiment__secrets=["T"], experiment__envs={"T": "hunter2"}, acton=3)
    assert hidden_values(composed(tree)) == {"hunter2"}
