"""The script: its shape, and what a real bash makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import host_plan, job_plan, process

from flagscale.runner.plan.job import AtLaunch
from flagscale.runner.render.script import render_script

DUMP = """\
#!{python}
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}))
"""


def write_stub(folder: Path, name: str = "stub") -> None:
    """A program that tells what it was given."""
    (folder / name).write_text(DUMP.format(python=sys.executable))
    (folder / name).chmod(0o755)


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(["bash"], input=script, env=whole, capture_output=True, text=True, timeout=60)


def told(script: str, **env: str) -> Any:
    done = run(script, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_order_of_a_script() -> None:
    item = process("torchrun", "--a", "1", cwd="/r", env=(("A", "x y"),), path_dirs=("/p",), bin_dirs=("/b",))
    host = host_plan(item, make_dirs=("/d",), before_start="source env.sh\n")
    assert (
        render_script(job_plan(host, exp_name="e\nrm -rf x"), host, item)
        == """\
#!/usr/bin/env bash
# stub on host_0_localhost of e rm -rf x
cd -- /r || exit 1
export PATH=/b${PATH:+:$PATH}
mkdir -p -- /d || exit 1
source env.sh

status=$?; [ "$status" -eq 0 ] || {
  echo "before_start failed with exit code $status" >&2; exit "$status"
}
cd -- /r || exit 1
export A='x y'
export PYTHONPATH=/p${PYTHONPATH:+:$PYTHONPATH}
exec torchrun \\
  --a 1
"""
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / 'it\'s a "root" $(touch oops) `x` *'
    folder.mkdir()
    write_stub(folder)
    return folder


def test_folders_with_nasty_names(root: Path) -> None:
    made = root / "-n $HOME\nnew" / "deep"
    host = host_plan(process("stub", cwd=str(root), bin_dirs=(str(root),), path_dirs=(str(root), "/b c")),
                     make_dirs=(str(made),))  # fmt: skip
    seen = told(render_script(job_plan(host), host, host.processes[0]))
    assert seen["cwd"] == str(root)
    assert made.is_dir()
    assert seen["env"]["PYTHONPATH"] == f"{root}:/b c"
    assert seen["env"]["PATH"].split(":")[0] == str(root)
    assert not (root / "oops").exists()


def test_what_the_process_needs_stays_before_what_the_user_puts_on_a_path(root: Path) -> None:
    env = (("PYTHONPATH", "/mine:/too"), ("PATH", "/usr/bin:/bin"))
    host = host_plan(process("stub", cwd=str(root), bin_dirs=(str(root),), path_dirs=("/p",), env=env))
    seen = told(render_script(job_plan(host), host, host.processes[0]))
    assert seen["env"]["PYTHONPATH"] == "/p:/mine:/too"
    assert seen["env"]["PATH"] == f"{root}:/usr/bin:/bin"


def test_an_empty_pythonpath_adds_no_empty_entry(root: Path) -> None:
    host = host_plan(
        process("stub", cwd=str(root), bin_dirs=(str(root),), path_dirs=("/p",), env=(("PYTHONPATH", ""),))
    )
    assert told(render_script(job_plan(host), host, host.processes[0]))["env"]["PYTHONPATH"] == "/p"


@pytest.mark.parametrize(
    ("before", "code"),
    [("false", 1), ("source /no/such/file", 1), ("(exit 7)", 7), ("exit 9", 9), ("true && (exit 3) \\", 3)],
)
def test_a_failing_before_start_ends_the_script(root: Path, before: str, code: int) -> None:
    host = host_plan(process("stub", cwd=str(root), bin_dirs=(str(root),)), before_start=before)
    done = run(render_script(job_plan(host), host, host.processes[0]))
    assert done.returncode == code
    assert done.stdout == ""
    if before != "exit 9":
        assert f"before_start failed with exit code {code}" in done.stderr


@pytest.mark.parametrize("before", ["export FROM_USER=1; cd /", "set -eu; export FROM_USER=1", "export FROM_USER=1 \\",
                                    "export FROM_USER=1 # comment", "true\n\nexport FROM_USER=1\n\n"])  # fmt: skip
def test_before_start_may_change_its_environment_and_not_our_folder(root: Path, before: str) -> None:
    host = host_plan(process("stub", cwd=str(root), bin_dirs=(str(root),), path_dirs=("/p",)), before_start=before)
    seen = told(render_script(job_plan(host), host, host.processes[0]))
    assert seen["env"]["FROM_USER"] == "1"
    assert seen["cwd"] == str(root)


def test_a_folder_that_is_missing_or_cannot_be_made_ends_the_script(root: Path) -> None:
    missing = host_plan(process("stub", cwd="/no/such/folder"))
    assert run(render_script(job_plan(missing), missing, missing.processes[0])).returncode == 1
    (root / "file").touch()
    blocked = host_plan(process("stub", cwd=str(root), bin_dirs=(str(root),)), make_dirs=(str(root / "file" / "x"),))
    assert run(render_script(job_plan(blocked), blocked, blocked.processes[0])).returncode == 1


def test_what_was_chosen_at_launch_is_put_in(root: Path) -> None:
    words = (AtLaunch("master_port", "h:"), AtLaunch("run_id", "/d/", "/x"))
    env = (("PORT", AtLaunch("master_port")),)
    host = host_plan(process("stub", *words, cwd=str(root), bin_dirs=(str(root),), env=env))
    seen = told(render_script(job_plan(host), host, host.processes[0], {"master_port": "29500", "run_id": "r1"}))
    assert seen["argv"] == ["h:29500", "/d/r1/x"]
    assert seen["env"]["PORT"] == "29500"
    shown = render_script(job_plan(host), host, host.processes[0])
    assert "'h:<master_port: chosen at launch>'" in shown
    assert "export PORT='<master_port: chosen at launch>'" in shown
