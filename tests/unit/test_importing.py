"""FlagScale's patch folders: taken over with their history, proved on a tree, refused when encrypted."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from flagscale.cli.patch import main as patch
from flagscale.errors import PatchError, UserError
from flagscale.patch.apply import apply_series
from flagscale.patch.importing import find_commit, import_series, load_origin
from flagscale.patch.pins import Pin
from flagscale.patch.series import load_series

PIN = Pin("Toy", "toy", "https://example.org/toy", "v1", "toy", "1.0", "toy-1.0.tar.gz", "0" * 64, 1)
BEFORE = {"toy/core.py": "ANSWER = 41\n", "toy/gone.py": "x = 1\n", "toy/same.py": "y = 2\n"}
AFTER = {"toy/core.py": "ANSWER = 42\n", "toy/new.py": "z = 3\n", "toy/same.py": "y = 2\n"}
DIFF = {
    "backends_commit": {"Toy": "b6553be1"},
    "backends_version": {"FlagScale": "0.8.0", "Toy": "0.9.1"},
    "commit": "13cc9f5c",
    "contact": "someone",
    "device_type": "Metax_C550",
    "models": ["qwen3"],
    "task": ["inference"],
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path / "toy-src", BEFORE)
    return tmp_path / "toy-src"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """FlagScale's hardware/Metax_C550/Toy, its diffs as its patch.py gets them from git."""
    work = tmp_path / "work"
    write(work, BEFORE)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *words], cwd=work, check=True)
    (work / "toy" / "gone.py").unlink()
    write(work, AFTER)
    subprocess.run([*git, "add", "-A"], cwd=work, check=True)
    folder = tmp_path / "flagscale" / "hardware" / "Metax_C550" / "Toy"
    for name in ("toy/core.py", "toy/gone.py", "toy/new.py"):
        diff = subprocess.run([*git, "diff", "--cached", "--", name], cwd=work, capture_output=True, check=True).stdout
        write(folder, {f"{name}.patch": diff.decode()})
    (folder / "diff.yaml").write_text(yaml.safe_dump(DIFF))
    return folder


def test_a_folder_becomes_a_patch_set_that_makes_the_same_tree(theirs: Path, tree: Path) -> None:
    got = import_series(theirs, tree, PIN)
    series = got.series
    assert got.left == ()
    assert (series.name, series.backend, series.version) == ("Metax_C550/Toy", "toy", "0.9.1")
    assert (series.digest, series.tasks, series.models) == ("b6553be1", ("inference",), ("qwen3",))
    assert {patch.name for patch in series.patches} == {f"toy/{name}.py.patch" for name in ("core", "gone", "new")}
    assert "13cc9f5c" in series.patches[0].header.why
    apply_series(tree, [series])
    assert {name for name in AFTER if (tree / name).read_text() == AFTER[name]} == set(AFTER)
    assert not (tree / "toy" / "gone.py").exists()


def test_the_verb_writes_it_once(
    theirs: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flagscale.patch.pins.find_pin", lambda _name, _folder: PIN)
    words = ["import", str(theirs), "--backend", "toy", "--tree", str(tree), "--hardware", str(tmp_path / "hardware")]
    assert patch(words) == 0
    assert "3 patches for toy 0.9.1" in capsys.readouterr().out
    assert len(load_series(tmp_path / "hardware" / "Metax_C550" / "Toy").patches) == 3
    with pytest.raises(UserError, match="nothing of it is overwritten"):
        patch(words)
    with pytest.raises(UserError, match="there is no such folder"):
        patch([*words[:5], str(tmp_path / "none")])


def test_what_does_not_fit_is_named_and_left_out_only_when_told(theirs: Path, tree: Path) -> None:
    (tree / "toy" / "core.py").write_text("ANSWER = 40\n")
    with pytest.raises(
        PatchError, match=r"1 of 3 patches do not fit(.|\n)*toy/core\.py\.patch(.|\n)*made for b6553be1"
    ):
        import_series(theirs, tree, PIN)
    got = import_series(theirs, tree, PIN, partial=True)
    assert got.left == ("toy/core.py.patch",)
    assert [entry.name for entry in got.series.patches] == ["toy/gone.py.patch", "toy/new.py.patch"]
    for name in BEFORE:
        (tree / name).unlink()
    (tree / "toy" / "new.py").write_text("there already\n")
    with pytest.raises(PatchError, match="none of 3 patches fits"):
        import_series(theirs, tree, PIN, partial=True)


def test_encrypted_patches_are_refused_with_a_clear_word(theirs: Path, tree: Path) -> None:
    (theirs / "toy" / "core.py.patch").rename(theirs / "toy" / "core.py.patch.encrypted")
    with pytest.raises(
        UserError, match=r"1 patches are encrypted \(toy/core\.py\.patch\.encrypted, \.\.\), and nothing"
    ):
        import_series(theirs, tree, PIN)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("toy/core.py.patch", "Binary files differ\n", r"no diff in git's format: toy/core\.py\.patch"),
        ("diff.yaml", "- a\n- b\n", r"diff\.yaml: expected a mapping"),
        ("diff.yaml", "a: [", r"diff\.yaml: not readable as YAML"),
    ],
)
def test_a_folder_that_is_not_flagscale_s_is_told(theirs: Path, tree: Path, name: str, text: str, message: str) -> None:
    (theirs / name).write_text(text)
    with pytest.raises(UserError, match=message):
        import_series(theirs, tree, PIN)


def test_a_folder_without_patches_is_told(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.patch file"):
        import_series(tmp_path / "empty", tree, PIN)


HISTORY = {
    "Metax_C550": {"inference": {"FlagScale+Toy": ["aaa", "bbb"], "FlagScale": ["ccc"]}, "train": {"Toy": ["ddd"]}},
    "Other": None,
}


@pytest.mark.parametrize(
    ("device", "tasks", "commit"),
    [
        ("Metax_C550", ("inference",), "bbb"),
        ("Metax_C550", ("train", "inference"), "ddd"),
        ("Metax_C550", (), "bbb"),
        ("Metax_C550", ("rl",), ""),
        ("Other", ("train",), ""),
        ("None_Such", (), ""),
    ],
)
def test_the_history_names_the_last_commit(device: str, tasks: tuple[str, ...], commit: str) -> None:
    assert find_commit(HISTORY, device, "Toy", tasks) == commit


def test_without_diff_yaml_the_folder_and_the_history_speak(theirs: Path, tree: Path) -> None:
    (theirs / "diff.yaml").unlink()
    (theirs.parent.parent / "patch_history.yaml").write_text(json.dumps(HISTORY))
    origin = load_origin(theirs, "Toy")
    assert (origin.device, origin.commit, origin.version) == ("Metax_C550", "bbb", "")
    assert import_series(theirs, tree, PIN).series.made_for == "toy 1.0"
