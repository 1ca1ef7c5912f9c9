"""Every shipped example before Megatron's own judge: its parser and `validate_args`, for the world that it asks for.

The catalogue knows names and types; only Megatron knows what goes together. One process judges all examples, since
importing Megatron costs more than judging them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS, name_of
from factories import ROOT

from flagscale import env
from flagscale.cli import main as flagscale
from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import load_config
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site
from flagscale.runner.render.argv import RENDERERS

pytestmark = pytest.mark.engine

Row = dict[str, Any]


@pytest.fixture(scope="module")
def megatron() -> Path:
    source = env.source_dir("Megatron-LM", "Generic_CPU")
    if not (source / "megatron" / "training").is_dir():
        assert flagscale(["source", "fetch", "megatron"]) == 0
    return source


def row_of(experiment: Path, *overrides: str) -> Row:
    """What `flagscale.train.validate` reads: the arguments behind the entry point, as the first host renders them."""
    config = load_config(compose_config(experiment.parent, experiment.stem, overrides), ROOT)
    plan = plan_config(config, Site("/flagscale"))
    argv = RENDERERS["megatron"](plan.hosts[0].processes[0].arguments)
    name = "+".join((name_of(experiment), *overrides))
    return {"name": name, "world_size": plan.num_ranks, "argv": without_fused_kernels(argv)}


def without_fused_kernels(argv: tuple[str, ...]) -> list[str]:
    """Megatron imports these two kernels of Transformer Engine when it checks, and a CPU machine has none to import."""
    words = [word for word in argv if word != "--moe-permute-fusion"]
    return words if "--no-rope-fusion" in words else [*words, "--no-rope-fusion"]


def shipped_rows() -> list[Row]:
    rows = [row_of(experiment) for experiment in EXPERIMENTS]
    return [*rows, row_of(ROOT / "examples/qwen3/conf/train.yaml", "train=0_6b")]


def validate(rows: list[Row], megatron: Path) -> tuple[int, list[Row]]:
    """(exit code, one answer for each row) of one process that judges them all."""
    done = subprocess.run(
        [sys.executable, "-m", "flagscale.train.validate", "--stdin"],
        input="".join(json.dumps(row) + "\n" for row in rows),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{megatron}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_megatron_accepts_the_arguments_of_every_example(megatron: Path) -> None:
    rows = shipped_rows()
    code, answers = validate(rows, megatron)
    assert {row["name"]: row["error"] for row in answers} == {row["name"]: None for row in rows}
    assert code == 0


def test_megatron_would_refuse_an_example_that_is_wrong(megatron: Path) -> None:
    good = row_of(ROOT / "examples/deepseek_v3/conf/train.yaml")
    bad = {**good, "name": "bad", "argv": [*good["argv"], "--group-query-attention"]}
    code, (first, second) = validate([good, bad], megatron)
    assert code == 2
    assert (first["valid"], second["valid"], second["name"]) == (True, False, "bad")
    assert "multi latent attention" in second["error"]
