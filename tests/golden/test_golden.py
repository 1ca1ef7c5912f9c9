"""Golden scripts: what each example's default configuration runs, byte for byte, at a made-up site.

A change of a script is a diff to be read: `pytest tests/golden --rewrite-golden`, then `git diff tests/golden`.
"""

from pathlib import Path

import pytest
from factories import CWD, ROOT

from flagscale.runner.config.compose import compose_config
from flagscale.runner.config.load import load_config
from flagscale.runner.plan.registry import plan_config
from flagscale.runner.plan.site import Site
from flagscale.runner.render.script import render_script

GOLDEN = Path(__file__).parent
SITE = Site("/flagscale", None, {"megatron": "/flagscale/third_party/Megatron-LM/src"})
MULTI_HOST = {"qwen3_30b_a3b": "qwen3/conf/train_30b_a3b.yaml"}
"""beside the defaults, which all run on one host"""

CASES = {
    path.parent.parent.name: str(path.relative_to(ROOT / "examples"))
    for path in sorted(ROOT.glob("examples/*/conf/train.yaml"))
} | MULTI_HOST


def render_scripts(experiment: Path) -> dict[str, str]:
    """File name -> script. The hostfile is read where it lies, since the made-up working folder has none."""
    hostfile = experiment.parent / "hostfile.txt"
    overrides = [] if experiment.stem == "train" else [f"experiment.runner.hostfile={hostfile}"]
    config = load_config(compose_config(experiment.parent, experiment.stem, overrides), CWD)
    plan = plan_config(config, SITE)
    return {
        f"{host.host.name}.sh": render_script(plan, host, process) for host in plan.hosts for process in host.processes
    }


@pytest.mark.parametrize("case", CASES)
def test_script_is_golden(case: str, request: pytest.FixtureRequest) -> None:
    folder = GOLDEN / case
    scripts = render_scripts(ROOT / "examples" / CASES[case])
    if request.config.getoption("--rewrite-golden"):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("*.sh"):
            stale.unlink()
        for name, text in scripts.items():
            (folder / name).write_text(text)
    assert {path.name: path.read_text() for path in folder.glob("*.sh")} == scripts


def test_no_golden_script_is_left_over() -> None:
    assert {path.parent.name for path in GOLDEN.glob("*/*.sh")} == set(CASES)


def test_golden_scripts_name_no_real_place() -> None:
    for path in GOLDEN.glob("*/*.sh"):
        assert str(ROOT) not in path.read_text(), path
