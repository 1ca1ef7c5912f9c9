"""Stacks of processes that live, by the real py-spy; nothing where there is none, and no endless waiting."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale.runner.launch import stacks
from flagscale.runner.launch.stacks import find_py_spy, save_stacks

CODE = """
import time
def wait_for_godot():
    print("here", flush=True)
    time.sleep(600)
wait_for_godot()
"""


@pytest.mark.skipif(find_py_spy() is None, reason="py-spy is not installed")
def test_a_stack_names_the_function_that_waits(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        saved = save_stacks({3: child.pid, 4: 2**22}, tmp_path / "stacks")
        child.kill()
    if not saved:
        pytest.skip("the kernel lets nobody look into processes here")
    assert saved == [3]
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["rank_3.txt"]
    assert "wait_for_godot" in (tmp_path / "stacks" / "rank_3.txt").read_text()


def write_program(path: Path, code: str) -> None:
    path.write_text("#!/bin/sh\n" + code)
    path.chmod(0o755)


def test_what_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "py-spy"
    write_program(slow, '[ "$3" = 1 ] && echo stack && exit 0\n[ "$3" = 2 ] && exit 1\nexec sleep 600\n')
    monkeypatch.setattr(stacks, "find_py_spy", lambda: str(slow))
    begin = time.monotonic()
    assert save_stacks({1: 1, 2: 2, 3: 3}, tmp_path / "out", 1.0) == [1]
    assert time.monotonic() - begin < 60
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rank_1.txt"]


def test_without_py_spy_or_ranks_or_room_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save_stacks({}, tmp_path / "out") == []
    assert save_stacks({1: 1}, Path("/proc/no/out")) == []
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    assert save_stacks({1: 1}, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_py_spy_is_found_beside_the_interpreter_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_program(tmp_path / name / "py-spy", "")
    monkeypatch.setenv("PATH", str(tmp_path / "b"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a" / "python"))
    assert find_py_spy() == str(tmp_path / "a" / "py-spy")
    (tmp_path / "a" / "py-spy").unlink()
    assert find_py_spy() == str(tmp_path / "b" / "py-spy")
    (tmp_path / "b" / "py-spy").unlink()
    assert find_py_spy() is None
