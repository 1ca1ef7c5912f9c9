"""A kill at any moment leaves the old tree or the new one: SIGKILL at every step of a real process, and of its git."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from patch_sets import BASE, PATCHED, make_series, make_tree, snapshot

from flagscale.patch.apply import apply_series, revert_tree
from flagscale.patch.series import Series
from flagscale.patch.state import read_state

SECOND = {**BASE, "pkg/b.py": b"second = 2\n", "pkg/a.py": b"other\n"}
STEPS = ("os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "open", "os.symlink",
         "ctypes.dlopen", "os.scandir", "tempfile.mkdtemp", "shutil.rmtree", "subprocess.Popen")  # fmt: skip


def run_until_step(work: Callable[[], object], step: int) -> bool:
    """Fork, do `work` and be killed at its `step`-th file operation; whether the work came to its end before."""
    pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, _args: tuple[object, ...]) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFEXITED(status)


def content(tree: Path) -> dict[str, tuple[int, bytes]]:
    return {name: (row[0], row[3]) for name, row in snapshot(tree).items()}


def check_every_step(tree: Path, work: Callable[[], object], undo: Callable[[], object]) -> int:
    """Kill `work` at each of its steps; the tree is always the one before or the one after. Returns the steps."""
    before = content(tree)
    assert run_until_step(work, 10**9)
    after = content(tree)
    undo()
    assert before == content(tree) != after
    step = 0
    seen = set()
    while not run_until_step(work, step):
        found = content(tree)
        assert found in (before, after), f"a mixture after step {step}"
        seen.add(found == after)
        state = read_state(tree)
        assert state.kind != "drifted"
        if found == after:
            work()
            assert content(tree) == after
            undo()
            assert content(tree) == before
        step += 1
    assert seen == {False, True}
    undo()
    assert content(tree) == before
    assert not [path for path in tree.parent.iterdir() if path.name.startswith(".tree")], "leftovers"
    assert not list(tree.parent.glob("tree.kept*"))
    return step


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "tree", BASE)
    (tree / "pkg" / "__pycache__").mkdir()
    (tree / "pkg" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"cache of a")
    return tree


@pytest.fixture
def first(tmp_path: Path) -> Series:
    return make_series(tmp_path, "Toy_Chip/toy", BASE, PATCHED)


def test_apply_killed_at_every_step(tree: Path, first: Series) -> None:
    assert check_every_step(tree, lambda: apply_series(tree, [first]), lambda: revert_tree(tree)) > 40


def test_revert_killed_at_every_step(tree: Path, first: Series) -> None:
    apply_series(tree, [first])
    assert check_every_step(tree, lambda: revert_tree(tree), lambda: apply_series(tree, [first])) > 30


def test_a_change_of_series_killed_at_every_step(tree: Path, first: Series, tmp_path: Path) -> None:
    second = make_series(tmp_path, "Other_Chip/toy", BASE, SECOND)
    apply_series(tree, [first])
    assert check_every_step(tree, lambda: apply_series(tree, [second]), lambda: apply_series(tree, [first])) > 40


def test_kills_at_random_moments_of_the_command_and_its_git(tree: Path, first: Series, tmp_path: Path) -> None:
    """git lives on when the command is killed: it holds the lock, and what it still writes harms nobody."""
    files = {f"pkg/many/{number}.py": b"line\n" * 50 for number in range(300)}
    for name, data in files.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(data)
    series = make_series(
        tmp_path, "Big_Chip/toy", BASE | files, BASE | {name: data + b"x\n" for name, data in files.items()}
    )
    before = content(tree)
    apply_series(tree, [series])
    after = content(tree)
    revert_tree(tree)
    code = (
        "import sys; from pathlib import Path; from flagscale.patch.series import load_series\n"
        "from flagscale.patch.apply import apply_series, revert_tree\n"
        "tree, folder = map(Path, sys.argv[1:]); series = load_series(folder); print('go', flush=True)\n"
        "apply_series(tree, [series]); revert_tree(tree)"
    )
    words = [sys.executable, "-c", code, str(tree), str(tmp_path / "hardware" / "Big_Chip" / "toy")]
    chance = random.Random(4)
    for _ in range(12):
        child = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.random() * 0.25)
        child.kill()
        child.wait()
        child.stdout.close()
        assert content(tree) in (before, after)
    revert_tree(tree)
    assert content(tree) == before
    assert first.patches
