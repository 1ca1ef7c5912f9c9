"""`plan_train`: ranks, environment, arguments and folders of a training job on every host."""

from pathlib import Path
from typing import Any

import pytest
from factories import CWD, SITE, changed, hosts, load, plan, train_tree, write_hostfile

from flagscale.errors import UserError
from flagscale.runner.config.hostfile import Host
from flagscale.runner.plan.job import AtLaunch, JobPlan, ProcessSpec
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site
from flagscale.runner.plan.train import PASSED_TO_TORCHRUN, plan_train


def plan_on(folder: Path, listed: tuple[Host, ...], **changes: Any) -> JobPlan:
    write_hostfile(folder, listed)
    runner = {"hostfile": "hostfile.txt"}
    tree = train_tree(experiment__runner=runner, train__model__global_batch_size=64)
    return plan(changed(tree, changes), folder)


def only(job: JobPlan) -> ProcessSpec:
    ((process,),) = [host.processes for host in job.hosts]
    return process


def option(process: ProcessSpec, name: str) -> Any:
    return process.argv[process.argv.index(name) + 1]


def test_one_host() -> None:
    job = plan(train_tree())
    process = only(job)
    assert (job.task, job.backend, job.num_ranks, job.master_addr, job.master_port) == (
        "train", "megatron", 2, "localhost", None,
    )  # fmt: skip
    assert process.argv[0] == "torchrun"
    assert process.argv[-1] == process.entrypoint == "flagscale/train/train_gpt.py"
    assert process.announces
    assert process.cwd == "/opt/flagscale"
    assert process.path_dirs == ("/opt/megatron", "/opt/flagscale")
    assert process.bin_dirs == ("/opt/venv/bin",)
    assert job.exp_dir == "/home/user/outputs"
    assert job.log_dir == "/home/user/outputs/logs"


def test_what_only_the_launch_knows_stands_by_name() -> None:
    process = only(plan(train_tree()))
    assert option(process, "--rdzv-id") == AtLaunch("run_id")
    assert option(process, "--rdzv-endpoint") == AtLaunch("master_port", "localhost:")
    assert option(process, "--log-dir") == AtLaunch("run_id", "/home/user/outputs/logs/details/host_0_localhost/")


def test_what_the_user_fixes_is_fixed() -> None:
    process = only(plan(train_tree(experiment__runner__master_port=29500, experiment__runner__rdzv_id=7)))
    assert option(process, "--rdzv-id") == "7"
    assert option(process, "--rdzv-endpoint") == "localhost:29500"
    fixed = only(
        plan(train_tree(experiment__runner__rdzv_endpoint="head:1", experiment__runner__rdzv_backend="static"))
    )
    assert option(fixed, "--rdzv-endpoint") == "head:1"
    assert option(fixed, "--rdzv-backend") == "static"


def test_an_ipv6_address_stands_in_brackets() -> None:
    process = only(plan(train_tree(experiment__runner__master_addr="fe80::1")))
    assert str(option(process, "--rdzv-endpoint")).startswith("[fe80::1]:<master_port")


def test_ranks_of_unequal_hosts(tmp_path: Path) -> None:
    job = plan_on(tmp_path, (Host("a", 2), Host("b", 4), Host("c", 2)))
    assert [(host.label, host.processes[0].first_rank, host.processes[0].num_ranks) for host in job.hosts] == [
        ("host_0_a", 0, 2), ("host_1_b", 2, 4), ("host_2_c", 6, 2),
    ]  # fmt: skip
    assert [option(host.processes[0], "--node-rank") for host in job.hosts] == ["0", "1", "2"]
    assert {option(host.processes[0], "--nnodes") for host in job.hosts} == {"3"}
    assert job.master_addr == "a"


def test_per_node_task_makes_every_host_a_job_of_its_own(tmp_path: Path) -> None:
    job = plan_on(tmp_path, hosts(2, 4), experiment__runner__per_node_task=True)
    for host in job.hosts:
        (process,) = host.processes
        assert (option(process, "--nnodes"), option(process, "--node-rank"), process.first_rank) == ("1", "0", 0)
        assert option(process, "--rdzv-backend") == "c10d"
        assert option(process, "--rdzv-endpoint") == "localhost:0"
        assert (host.peer, host.interface_vars) == ("", ())


def test_hosts_have_the_numbers_of_the_hostfile(tmp_path: Path) -> None:
    """c10d would sort them by name, but is needed where ranks are to be restarted."""
    listed = (Host("b", 2), Host("a", 2))
    process = plan_on(tmp_path, listed).hosts[1].processes[0]
    assert (option(process, "--rdzv-backend"), option(process, "--node-rank")) == ("static", "1")
    assert option(process, "--rdzv-endpoint") == AtLaunch("master_port", "b:")
    for key, value in (("max_restarts", 3), ("rdzv_backend", "c10d")):
        process = plan_on(tmp_path, listed, **{f"experiment__runner__{key}": value}).hosts[1].processes[0]
        assert option(process, "--rdzv-backend") == "c10d"


def test_interface_variables_are_the_chips_less_what_the_user_sets(tmp_path: Path) -> None:
    given = {"node1": {"NCCL_SOCKET_IFNAME": "ib0"}}
    rows = plan_on(tmp_path, hosts(4, 2, "gpu"), experiment__node_specific=given).hosts
    assert [host.peer for host in rows] == ["node1", "node0", "node0", "node0"]
    both = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    assert [host.interface_vars for host in rows] == [both, both[:1], both, both]
    (alone,) = plan(train_tree()).hosts
    assert (alone.peer, alone.interface_vars) == ("", ())


def test_a_cloud_node_knows_its_place() -> None:
    runner = {"type": "cloud", "nnodes": 4, "node_rank": 2, "master_addr": "m", "master_port": 5, "nproc_per_node": 8}
    job = plan(train_tree(experiment__runner=runner, train__model__global_batch_size=64))
    process = only(job)
    assert (process.first_rank, option(process, "--nnodes"), option(process, "--node-rank")) == (16, "4", "2")
    assert job.hosts[0].label == "host_2_localhost"


def test_environment_node_over_chip_over_all_over_what_the_chip_wants(tmp_path: Path) -> None:
    job = plan_on(
        tmp_path,
        hosts(2, 2, "A800"),
        experiment__envs={"A": "all", "B": "all", "C": "all", "CUDA_DEVICE_MAX_CONNECTIONS": 8},
        experiment__device_type_specific={"A800": {"B": "chip", "C": "chip"}, "H100": {"A": "other"}},
        experiment__node_specific={"node1": {"C": "node"}},
    )
    first, second = (dict(host.processes[0].env) for host in job.hosts)
    assert first == {
        "PYTHONUNBUFFERED": "1", "FLAGSCALE_CHIP": "NVIDIA", "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "A": "all", "B": "chip", "C": "chip",
    }  # fmt: skip
    assert second == {**first, "C": "node"}


def test_arguments_keep_order_and_drop_nulls() -> None:
    process = only(plan(train_tree(train__model__seed=None, train__model__clip_grad=1.0)))
    names = [name for name, _ in process.arguments]
    assert names[:4] == ["save", "load", "tensorboard_dir", "wandb_save_dir"]
    assert "seed" not in names
    assert names.index("tensor_model_parallel_size") < names.index("num_layers") < names.index("mock_data")


def test_a_name_given_twice_keeps_its_first_place_and_its_last_value() -> None:
    tree = train_tree(train__model__weight_decay=0.1, train__data__weight_decay=0.2)
    arguments = only(plan(tree)).arguments
    assert [value for name, value in arguments if name == "weight_decay"] == [0.2]


def test_folders_are_the_contracts_or_the_users() -> None:
    job = plan(train_tree())
    assert (job.checkpoint_dir, job.load_dir) == ("/home/user/outputs/checkpoints",) * 2
    tree = train_tree(
        train__system__checkpoint={"save": "ckpt", "load": "/old/ckpt"},
        train__system__logging={"tensorboard_dir": "s3://bucket/tb", "log_dir": "../elsewhere"},
    )
    named = plan(tree)
    arguments = dict(only(named).arguments)
    assert (named.checkpoint_dir, named.load_dir) == ("/home/user/ckpt", "/old/ckpt")
    assert (arguments["save"], arguments["load"], arguments["tensorboard_dir"]) == (
        "/home/user/ckpt", "/old/ckpt", "s3://bucket/tb",
    )  # fmt: skip
    assert named.log_dir == "/home/elsewhere"
    assert named.hosts[0].make_dirs == (
        "/home/elsewhere", "/home/elsewhere/pids", "/home/elsewhere/details", "/home/user/ckpt",
        "/home/user/outputs/wandb",
    )  # fmt: skip


def test_the_runners_log_folder_wins() -> None:
    tree = train_tree(experiment__runner__log_dir="a", train__system__logging={"log_dir": "b"})
    assert plan(tree).log_dir == "/home/user/a"


@pytest.mark.parametrize(("exp_dir", "absolute"), [("out", "/home/user/out"), ("../o/./p", "/home/o/p"), ("/x/", "/x")])
def test_exp_dir_is_relative_to_where_the_command_is_typed(exp_dir: str, absolute: str) -> None:
    assert plan(train_tree(experiment__exp_dir=exp_dir), CWD).exp_dir == absolute


def test_overlays_by_chip_and_by_host(tmp_path: Path) -> None:
    job = plan_on(
        tmp_path,
        (Host("a", 2, "A800"), Host("b", 2, "mlu590")),
        device_type_specific={"mlu590": {"build_dir": "/builds/mlu", "use-flash-attn": "false", "lr": 0.5}},
        node_specific={"b": {"lr": 0.25, "bf16": "true"}},
    )
    first, second = (host.processes[0] for host in job.hosts)
    assert (first.cwd, second.cwd) == ("/opt/flagscale", "/builds/mlu")
    assert second.path_dirs == ("/opt/megatron", "/builds/mlu")
    laid_over = dict(second.arguments)
    assert (laid_over["lr"], laid_over["use_flash_attn"], laid_over["bf16"]) == (0.25, False, True)
    assert "build_dir" not in laid_over
    assert dict(first.arguments)["lr"] == 1e-4


def test_a_chip_gives_defaults_that_the_user_overrules() -> None:
    tree = train_tree(experiment__runner__device_type="cpu", train__system__distributed_backend="nccl")
    arguments = dict(only(plan(tree)).arguments)
    assert arguments["distributed_backend"] == "nccl"
    assert arguments["transformer_impl"] == "local"


def test_other_backends_have_no_folders_of_megatrons() -> None:
    tree = train_tree(experiment__task={"type": "train", "backend": "robotics", "entrypoint": "t.py"})
    job = plan(tree)
    assert (job.checkpoint_dir, job.load_dir) == (None, None)
    assert "save" not in dict(only(job).arguments)
    assert only(job).path_dirs == ("/opt/flagscale",)


def test_options_of_torchrun_pass_through() -> None:
    runner = {"nproc_per_node": 2, "max_restarts": 3, "standalone": True, "no_python": False, "role": "x"}
    argv = only(plan(train_tree(experiment__runner=runner))).argv
    assert argv[1:6] == ("--standalone", "--max-restarts", "3", "--role", "x")


def test_every_option_is_one_that_torchrun_has() -> None:
    from torch.distributed.run import get_args_parser

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    ours = {"--" + name.replace("_", "-") for name in PASSED_TO_TORCHRUN}
    used = {word for word in only(plan(train_tree())).argv if isinstance(word, str) and word.startswith("--")}
    assert (ours | used) <= known


def test_a_module_is_no_file() -> None:
    assert only(plan(train_tree(experiment__runner__module=True))).entrypoint is None


def test_an_entry_point_is_required() -> None:
    config = load(train_tree())
    bare = config.experiment.model_copy(update={"task": config.experiment.task.model_copy(update={"entrypoint": None})})
    object.__setattr__(config, "experiment", bare)
    with pytest.raises(UserError, match=r"experiment\.task\.entrypoint: is missing"):
        plan_train(config, config.hosts, SITE)


def test_a_site_without_a_bin_dir_leaves_the_path_alone() -> None:
    job = plan_config(load(train_tree()), Site("/r"))
    assert only(job).bin_dirs == ()
    assert only(job).path_dirs == ("/r",)
