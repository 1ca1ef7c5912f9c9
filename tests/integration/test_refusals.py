"""What cannot be done is refused: the exit code, one clear message, no traceback, and nothing half written.

Launches go through `run.py` in a process of its own, as a user types them; the verbs through the command's own guard.
"""

import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from factories import ROOT
from factories import run_py as run_config
from local_jobs import plan_processes, plan_program, start, submit, wait_for

from flagscale.cli import main
from flagscale.errors import UserError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.monitor.follow import wait_job
from flagscale.runner.monitor.state import query_run
from flagscale.runner.monitor.stop import stop_run
from flagscale.runner.plan.job import ProcessSpec

TINY = ROOT / "examples" / "tiny" / "conf" / "train.yaml"
LABEL = "host_0_localhost"


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check_refusal(done: "subprocess.CompletedProcess[str]", exit_code: int, message: str) -> None:
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(f"error: {message}\n", done.stderr), done.stderr


def launch(exp_dir: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return run_config(TINY, f"experiment.exp_dir={exp_dir}", *words, cwd=exp_dir.parent)


# --- launches --------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        done = launch(tmp_path / "exp", f"+experiment.runner.master_port={port}")
    words = r" is taken by process \d+ \(.+\); choose another, or leave it out and a free one is chosen"
    check_refusal(done, 2, rf"port {port} \(`experiment.runner.master_port`\){words}")
    assert list_tree(tmp_path) == []


def test_an_experiment_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "exp").write_text("mine")
    done = launch(tmp_path / "exp")
    check_refusal(done, 2, f"cannot write {tmp_path}/exp/runs: {tmp_path}/exp is a file; expected a folder")
    assert list_tree(tmp_path) == ["exp"]
    assert (tmp_path / "exp").read_text() == "mine"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    (folder / "ballast").write_bytes(b"x" * (512 * 1024 - 4 * 4096))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(full_disk: Path, state_dir: Path) -> None:
    done = launch(full_disk / "exp")
    check_refusal(done, 1, f"its disk is full: 0 MiB are free in {full_disk}; expected 64 at least")
    assert list_tree(full_disk) == ["ballast"]
    assert not state_dir.exists()


def test_an_entry_point_that_is_missing(tmp_path: Path) -> None:
    done = launch(tmp_path / "exp", "experiment.task.entrypoint=./flagscale/train/train_gtp.py")
    path = ROOT / "flagscale" / "train"
    words = f"entry point {path}/train_gtp.py is missing; did you mean `{path}/train_gpt.py`\\?"
    check_refusal(done, 2, f"torchrun on localhost: {words}")
    assert list_tree(tmp_path) == []


def test_a_python_without_torchrun(tmp_path: Path) -> None:
    """An interpreter whose folder holds nothing else, with all the same modules."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    (tmp_path / "cwd").mkdir()
    argv = [python, ROOT / "run.py", "--config-path", TINY.parent, "--config-name", "train"]
    argv += [f"experiment.exp_dir={tmp_path}/cwd/exp", "experiment.cmds.before_start=null"]
    env = {"PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(argv, cwd=tmp_path / "cwd", env=env, capture_output=True, text=True)
    check_refusal(done, 2, "torchrun on localhost: program `torchrun` is not on the PATH")
    assert list_tree(tmp_path / "cwd") == []


def test_a_second_run_in_the_same_folder(tmp_path: Path) -> None:
    first = start(plan_program(tmp_path / "exp", "sleep", "600"))
    before = list_tree(tmp_path)
    done = launch(tmp_path / "exp")
    words = rf"since \S+ \S+; stop it with `flagscale stop {first.run_id}`, or use another `experiment.exp_dir`"
    check_refusal(done, 1, f"{tmp_path}/exp already holds a job that runs: {first.run_id}, {words}")
    assert list_tree(tmp_path) == before
    assert query_run(first).state == "running"
    stop_run(first, force=True)


def test_what_before_start_may_bring_is_no_fault_and_what_it_does_not_name_is(tmp_path: Path) -> None:
    script = ProcessSpec("main", ("no-such-program", "job.py"), str(tmp_path), entrypoint="job.py")
    bringing = "echo 'echo brought' > job.py; no-such-program() { exec bash \"$@\"; }; exec bash job.py"
    assert wait_job(submit(plan_processes(tmp_path / "exp", script, before_start=bringing))) == 0
    (tmp_path / "job.py").unlink()
    with pytest.raises(UserError) as caught:
        submit(plan_processes(tmp_path / "exp", script, before_start="true"))
    assert str(caught.value) == f"main on localhost: entry point {tmp_path}/job.py is missing"


# --- verbs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> RunRef:
    run = submit(plan_program(tmp_path / "exp", "echo", "word"))
    assert wait_job(run) == 0
    capsys.readouterr()
    return run


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def call(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.mark.parametrize("verb", ["status", "stop", "logs", "rerun"])
def test_a_run_that_nobody_knows(finished: RunRef, ask: Ask, verb: str) -> None:
    words = "expected a run id, the beginning of one, or an experiment folder; `flagscale list` shows all"
    assert ask(verb, "nosuch") == (2, "", f"error: no run `nosuch`: {words}\n")
    near = f"{finished.run_id[:-2]}zz"
    assert ask(verb, near)[2].endswith(f"did you mean `{finished.run_id}`?\n") or near == finished.run_id


def test_stopping_what_has_ended_changes_nothing(finished: RunRef, ask: Ask) -> None:
    before = list_tree(finished.exp_dir)
    for words in ((finished.run_id,), (finished.run_id, "--force"), ()):
        code, out, err = ask("stop", *words)
        assert (code, out) == (0, f"{finished.run_id}: succeeded before; nothing to stop\n")
        assert err == f"stopping {finished.run_id} ({finished.exp_dir})\n"
    assert list_tree(finished.exp_dir) == before
    assert query_run(finished).state == "succeeded"


@pytest.mark.parametrize("words", [(), ("-f",), ("-f", "--all"), ("-n", "3")])
def test_logs_that_were_deleted(finished: RunRef, ask: Ask, words: tuple[str, ...]) -> None:
    shutil.rmtree(finished.log_dir)
    output = finished.output_path(LABEL)
    message = f"error: run {finished.run_id}: its output {output} is gone; someone deleted it\n"
    assert ask("logs", finished.run_id, *words) == (1, "", message)
    assert ask("status", finished.run_id)[0] == 0
    assert ask("list")[0] == 0


@pytest.mark.parametrize("verb", ["rerun", "status", "logs", "stop"])
def test_an_experiment_that_was_deleted(finished: RunRef, ask: Ask, verb: str) -> None:
    shutil.rmtree(finished.exp_dir)
    path = finished.folder / "job.json"
    message = f"error: no run {finished.run_id} in {finished.exp_dir}: {path} is missing; the folder was deleted\n"
    assert ask(verb, finished.run_id) == (1, "", message)
    assert not finished.exp_dir.exists()


def test_a_rerun_whose_program_is_gone(tmp_path: Path, ask: Ask) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    run = submit(plan_program(tmp_path / "exp", str(script)))
    wait_for(lambda: query_run(run).has_ended)
    script.unlink()
    before = list_tree(tmp_path)
    code, out, err = ask("rerun", run.run_id)
    assert (code, out) == (2, "")
    assert err.endswith(f"error: main on localhost: program {script} is missing or may not be executed\n")
    assert list_tree(tmp_path) == before
