"""The sbatch script of each shape of job, byte for byte, and what sbatch and bash make of one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from factories import CWD, plan, train_tree

from flagscale.runner.launch.dry import render_dry_run
from flagscale.runner.launch.slurm_script import bind_values, render_sbatch
from flagscale.runner.plan.job import JobPlan
from flagscale.runner.render.script import render_script

GOLDEN = Path(__file__).parent / "slurm"
RUN_ID = "20260101T000000-abcd"
SLURM: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "nnodes": 4,
        "nproc_per_node": 8,
        "master_addr": "head.cluster",
        "master_port": 29500,
        "slurm": {
            "partition": "gpu",
            "account": "lab one",
            "qos": "high",
            "time": "1-12:00:00",
            "nodelist": "a[1-3],b7",
            "options": {"gpus-per-node": 8, "cpus_per_task": 32, "exclusive": True, "mail-user": False},
        },
    },
    "any_first_node": {"nnodes": 2, "master_port": 29500},
}


def make_plan(name: str) -> JobPlan:
    nodes = SLURM[name].get("nnodes", 1) * SLURM[name].get("nproc_per_node", 2)
    runner = {"type": "slurm", "nproc_per_node": 2, **SLURM[name]}
    model = {"train__model__global_batch_size": nodes * 2}
    exp_dir = "out/it's %j" if name == "everything" else "outputs"
    secrets = ["TOKEN"] if name == "everything" else []
    changes = {"experiment__runner": runner, "experiment__exp_dir": exp_dir, "experiment__secrets": secrets}
    return plan(train_tree(**changes, **model), CWD)


def render_all(name: str) -> dict[str, str]:
    """The batch script, and the script of the first node as Slurm's job will run it."""
    job = make_plan(name)
    values = bind_values(RUN_ID)
    first = job.hosts[0]
    return {
        f"{name}.sbatch": render_sbatch(job, RUN_ID, "/opt/venv/bin/python"),
        f"{name}.node0": render_script(job, first, first.processes[0], values),
    }


@pytest.mark.parametrize("name", SLURM)
def test_the_scripts_are_golden(name: str, request: pytest.FixtureRequest) -> None:
    texts = render_all(name)
    if request.config.getoption("--rewrite-golden"):
        GOLDEN.mkdir(exist_ok=True)
        for file, text in texts.items():
            (GOLDEN / file).write_text(text)
    assert {file: (GOLDEN / file).read_text() for file in texts} == texts


@pytest.mark.parametrize("name", SLURM)
def test_bash_can_read_the_script(name: str) -> None:
    for text in render_all(name).values():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_shows_the_script_and_what_only_slurm_knows() -> None:
    text = render_dry_run(make_plan("any_first_node"))
    assert "#SBATCH --job-name=" in text
    assert "--nodes=2" in text
    assert "<master_addr: chosen at launch>:29500" in text
    assert "host_1_node1" in text
