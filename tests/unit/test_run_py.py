"""`python run.py`: Hydra's command line over the whole launcher, as real processes from other folders."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import ROOT, compress_tree, run_py, run_python, train_tree, write_config

PROGRAM = """\
import json, os, sys
print(json.dumps([os.environ["TOKEN"][::-1], os.environ["GREETING"], sys.argv[1:]]))
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "conf", train_tree())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder in which the command is typed."""
    folder = tmp_path / "typed here"
    folder.mkdir()
    return folder


def test_a_dry_run_prints_and_touches_nothing(config: Path, here: Path) -> None:
    done = run_py(config, "action=dryrun", "+train.model.seed=7", "~experiment.envs.GREETING", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# demo: train with megatron on 1 host(s), 2 ranks\n")
    assert f"# outputs: {here}/outputs\n" in done.stdout
    assert "--seed 7" in done.stdout
    assert "GREETING" not in done.stdout
    assert f"cd -- {ROOT} || exit 1" in done.stdout
    assert list(here.iterdir()) == []


def test_the_verb_that_starts_jobs_heeds_an_action_that_is_named(config: Path, here: Path) -> None:
    """Whoever types `action=dryrun` wants nothing to start."""
    code = "import sys; from flagscale.cli import main; sys.exit(main())"
    done = run_python("-c", code, "run", str(config), "action=dryrun", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# demo: train with megatron on 1 host(s), 2 ranks\n")
    assert list(here.iterdir()) == []


def test_the_config_path_is_relative_to_run_py_and_the_rest_to_the_folder(config: Path, here: Path) -> None:
    (here / "hosts").write_text("a slots=2\nb slots=2\n")
    words = ("--config-path", os.path.relpath(config.parent, ROOT), "--config-name", "exp")
    more = ("action=dryrun", "+experiment.runner.hostfile=hosts", "experiment.exp_dir=../out")
    done = run_python(ROOT / "run.py", *words, *more, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "on 2 host(s), 4 ranks" in done.stdout
    assert f"# outputs: {here.parent}/out\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["action=rnu"], "override `action=rnu`: action: there is no action `rnu`; did you mean `run`?"),
        (["action=auto_tune"], "action: this release has no tuner"),
        (["experiment.runer.nnodes=1"], "did you mean `runner`?"),
        (["+experiment.task.backend=x"], "Could not append to config"),
        (["experiment.task.backend=megatorn"], "did you mean `megatron`?"),
        (["+train.model.num_leyers=1"], "did you mean `num_layers`?"),
        (["train.model.num_layers=${nope}"], "`${nope}` cannot be resolved"),
        (["train.model.num_layers=???"], "a value that you must give"),
        (["train.model.num_layers=[1"], "override `train.model.num_layers=[1`: cannot be read"),
        (["+experiment.runner.hostfile=nowhere"], "No such file"),
        (["train=big"], "Could not find 'train/big'"),
        (["~nothing"], "Could not delete from config"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(config: Path, here: Path, words: list[str], says: str) -> None:
    done = run_py(config, *words, cwd=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--config-path is missing"),
        (["--config-path", "nowhere", "--config-name", "exp"], "nowhere"),
        (["--config-path", "{conf}", "--config-name", "exq"], "did you mean `exp`?"),
        (["--config-path", "{conf}", "--config-name", "broken"], "broken.yaml:2: "),
        (["--config-path", "{conf}", "--config-name", "broken", "--cfg", "job"], "broken.yaml:2: "),
        (["--config-path", "{conf}", "--config-name", "exp", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_configurations_that_cannot_be_composed(config: Path, here: Path, argv: list[str], says: str) -> None:
    (config.parent / "broken.yaml").write_text("a: [1, 2\nb: 3\n")
    done = run_python(ROOT / "run.py", *(word.format(conf=config.parent) for word in argv), cwd=here)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


def test_hydras_own_features(config: Path, here: Path) -> None:
    shown = run_py(config, "--cfg", "job", "experiment.exp_name=x", cwd=here)
    assert yaml.safe_load(shown.stdout)["experiment"]["exp_name"] == "x"
    assert "Powered by Hydra" in run_py(config, "--help", cwd=here).stdout
    assert list(here.iterdir()) == []
    swept = run_py(config, "-m", "action=dryrun", "experiment.exp_name=one,two", "hydra.sweep.dir=sweep", cwd=here)
    assert swept.returncode == 0, swept.stderr
    assert [line for line in swept.stdout.splitlines() if "train with megatron" in line] == [
        f"# {name}: train with megatron on 1 host(s), 2 ranks" for name in ("one", "two")
    ]
    assert run_py(config, "-m", "action=dryrun,rnu", "hydra.sweep.dir=sweep", cwd=here).returncode == 2


def run_job(config: Path, here: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_py(config, *words, cwd=here, env={"FLAGSCALE_STATE_DIR": str(here.parent / "state"), **env})


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A real job that tells what it was given."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tree: dict[str, Any] = compress_tree(
        experiment__task={"type": "compress", "entrypoint": str(program)},
        experiment__secrets=["TOKEN"],
        experiment__envs={"TOKEN": "${oc.env:MY_TOKEN}", "GREETING": "it's $(so)", "CODE": 0},
    )
    return write_config(tmp_path / "conf", tree)


def test_a_real_job_gets_its_secret_and_nobody_else_does(job: Path, here: Path) -> None:
    done = run_job(job, here, "action=test", MY_TOKEN="hunter2-of-all")
    assert done.returncode == 0, done.stderr
    outputs = here / "outputs"
    told = (outputs / "compress_logs" / "host_0_localhost.output").read_text()
    assert f'["{"hunter2-of-all"[::-1]}", "it\'s $(so)", ["--config-path=' in told
    records = {path.name: path for path in (outputs / "hydra" / ".hydra").iterdir()}
    assert sorted(records) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in records.values()} == {0o600}
    assert yaml.safe_load(records["config.yaml"].read_text())["experiment"]["envs"]["TOKEN"] == "***"
    assert yaml.safe_load(records["overrides.yaml"].read_text()) == ["action=test"]
    assert yaml.safe_load(records["hydra.yaml"].read_text())["hydra"]["job"]["config_name"] == "exp"
    holders = [path for path in here.parent.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert holders == []
    assert "hunter2" not in done.stdout + done.stderr


def test_the_exit_code_of_a_job_that_fails_is_told(job: Path, here: Path) -> None:
    done = run_job(job, here, "action=test", "experiment.envs.CODE=3", MY_TOKEN="hunter2-of-all")
    assert done.returncode != 0
    assert "3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_place_of_the_folder_is_a_mistake(job: Path, here: Path) -> None:
    (here / "outputs").write_text("a file")
    done = run_job(job, here, "action=run", MY_TOKEN="hunter2-of-all")
    assert done.returncode == 2
    assert "is a file; expected a folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in here.iterdir()] == ["outputs"]


def test_a_secret_that_is_not_set_is_a_mistake(job: Path, here: Path) -> None:
    done = run_job(job, here, "action=run", "experiment.envs.TOKEN=${oc.env:MY_TOKEN,null}")
    assert done.returncode == 2
    assert "MY_TOKEN" in done.stderr
    assert list(here.iterdir()) == []


def test_the_script_is_short() -> None:
    assert len((ROOT / "run.py").read_text().splitlines()) < 40
    assert sys.version_info >= (3, 11)
