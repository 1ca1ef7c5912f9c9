"""Where a training begins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flagscale.runner.config.hostfile import Host
from flagscale.runner.launch.folder import RUN_VERSION, ref_of
from flagscale.runner.launch.resume import Checkpoint, describe_beginning, find_arguments, find_checkpoint
from flagscale.runner.launch.startup import describe_launch
from flagscale.runner.monitor.summary import describe_nothing_left
from flagscale.runner.plan.job import HostPlan, JobPlan, ProcessSpec

RUN_ID = "20260101T000000-abcd"


def make_plan(load_dir: Path | str | None, **arguments: Any) -> JobPlan:
    torchrun = ProcessSpec("torchrun", ("torchrun",), "/", arguments=tuple(arguments.items()), num_ranks=2)
    host = HostPlan(Host("localhost", 2), 0, (ProcessSpec("before", ("true",), "/"), torchrun))
    plan = JobPlan("train", "megatron", "small", "/exp", "/exp/logs", (host,))
    return replace(plan, load_dir=None if load_dir is None else str(load_dir))


def save(folder: Path, latest: str) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(latest)


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000060").mkdir()  # half written: nothing names it yet
    assert find_checkpoint(tmp_path) is None
    save(tmp_path, "40\n")
    assert find_checkpoint(tmp_path) == Checkpoint(tmp_path / "iter_0000040", 40)
    save(tmp_path, "release")
    assert find_checkpoint(tmp_path) == Checkpoint(tmp_path / "release", None)
    save(tmp_path, " \n")
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "missing") is None


def test_a_plan_says_how_its_training_begins(tmp_path: Path) -> None:
    def describe(**arguments: Any) -> str | None:
        return describe_beginning(make_plan(tmp_path, **arguments))

    assert describe() == f"starts from scratch: no checkpoint in {tmp_path}"
    save(tmp_path, "40")
    at = f"{tmp_path}/iter_0000040"
    assert describe() == f"resumes from iteration 40 ({at})"
    assert describe(train_iters=100) == f"resumes from iteration 40 ({at})"
    assert describe(train_iters=40) == f"resumes from iteration 40 ({at}), of 40: nothing is left"
    assert describe(finetune=True) == f"starts at iteration 0 with the weights of {at}"
    assert describe(**{"ckpt-step": 20}) == f"resumes from iteration 20 ({tmp_path}/iter_0000020)"
    save(tmp_path, "release")
    assert describe() == f"starts at iteration 0 with the weights of {tmp_path}/release"


@pytest.mark.parametrize("load_dir", [None, "msc://bucket/checkpoints"])
def test_what_cannot_be_looked_into_is_not_guessed(load_dir: str | None) -> None:
    assert describe_beginning(make_plan(load_dir)) is None


def test_the_arguments_are_those_of_the_ranks() -> None:
    assert dict(find_arguments(make_plan(None, **{"train-iters": 3}))) == {"train_iters": 3}
    host = HostPlan(Host("localhost", 1), 0, (ProcessSpec("main", ("true",), "/", arguments=(("a", 1),)),))
    assert dict(find_arguments(replace(make_plan(None), hosts=(host,)))) == {}


def test_a_launch_in_words(tmp_path: Path) -> None:
    exp_dir = tmp_path / "exp"
    plan = replace(make_plan(tmp_path), exp_dir=str(exp_dir), log_dir=f"{exp_dir}/logs")
    folder = exp_dir / "runs" / RUN_ID
    folder.mkdir(parents=True)
    tree = {"path": "/src", "kind": "patched", "series": ["A/b"], "digest": "f00ba4" * 8, "changed": ["a.py (edited)"]}
    (folder / "job.json").write_text(json.dumps({"version": RUN_VERSION, "trees": [tree]}))
    assert describe_launch(ref_of(plan, RUN_ID), plan, foreground=False).splitlines() == [
        f"run {RUN_ID}: small, train with megatron, 2 ranks on localhost",
        "  source    /src: patched by A/b (f00ba4f00ba4), changed: a.py (edited)",
        f"  outputs   {exp_dir}",
        f"  log       {exp_dir}/logs/host_0_localhost.output",
        f"  training  starts from scratch: no checkpoint in {tmp_path}",
        f"  follow    flagscale logs -f {RUN_ID}",
        f"  stop      flagscale stop {RUN_ID}",
    ]
    served = replace(plan, task="serve", backend="", exp_name="", hosts=(plan.hosts[0],) * 2)
    assert describe_launch(ref_of(served, RUN_ID), served, foreground=True).splitlines() == [
        f"run {RUN_ID}: serve, 4 ranks on 2 hosts",
        "  source    /src: patched by A/b (f00ba4f00ba4), changed: a.py (edited)",
        f"  outputs   {exp_dir}",
        f"  log       {exp_dir}/logs",
        f"  stop      Ctrl-C, or elsewhere flagscale stop {RUN_ID}",
    ]


def test_nothing_left_names_the_key_to_change() -> None:
    checkpoint = Checkpoint(Path("/exp/checkpoints/iter_0000100"), 100)
    config = {"experiment": {"auto_tuner": {"train_iters": 5}}, "train": {"model": {"train-iters": 100}}}
    assert describe_nothing_left(config, checkpoint) == (
        "nothing left to train: the checkpoint is at iteration 100 of 100 (/exp/checkpoints/iter_0000100); "
        "for more: train.model.train-iters=200"
    )
    assert "of 60 " in str(describe_nothing_left({"train": {"train_iters": 60}}, checkpoint))
    assert describe_nothing_left({"train": {"train_iters": 101}}, checkpoint) is None
    assert describe_nothing_left({"train": {"train_samples": 9}}, checkpoint) is None
    assert describe_nothing_left({"serve": []}, checkpoint) is None
    assert describe_nothing_left(config, Checkpoint(Path("/exp/checkpoints/release"), None)) is None
