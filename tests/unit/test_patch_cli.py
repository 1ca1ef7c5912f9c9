"""`flagscale patch` and FlagScale's names for it, as a user types them: a contributor's way from edits to a release."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import ROOT, run_python
from patch_sets import BASE, LINES, PATCHED, commit_all, edited, git, make_series, make_tree, read_bytes

from flagscale.cli import main
from flagscale.patch.state import read_state

HEADER_WORDS = ("--why", "w", "--how", "h", "--upstream", "none: a test", "--remove-when", "never")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "tree", BASE)
    commit_all(tree, "upstream")
    return tree


@pytest.fixture
def words(tree: Path, tmp_path: Path) -> list[str]:
    """The words that name tree and patch set."""
    return ["vllm", "--tree", str(tree), "--hardware", str(tmp_path / "hardware"), "--device-type", "Toy_Chip"]


def flagscale(*typed: str) -> int:
    return main(["patch", *typed])


def tool(name: str, *typed: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "tools" / "patch" / f"{name}.py"), *typed)


def test_from_edits_to_a_fresh_tree(
    tree: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "pkg" / "a.py").write_bytes(PATCHED["pkg/a.py"])
    (tree / "pkg" / "old.py").unlink()
    assert flagscale("diff", "--tree", str(tree)) == 0
    assert "+line five\n" in capsys.readouterr().out
    assert flagscale("status", "--tree", str(tree)) == 1
    assert capsys.readouterr().out == f"{tree}: drifted\n  pkg/a.py (edited)\n  pkg/old.py (missing)\n"
    assert flagscale("export", *words, "--task", "inference", "--models", "m", "--contact", "me", *HEADER_WORDS) == 0
    folder = tmp_path / "hardware" / "Toy_Chip" / "vllm"
    assert capsys.readouterr().out == (
        f"2 patches for vllm {git(tree, 'rev-parse', '--short', 'HEAD').strip()} in {folder}\n"
        "  added pkg/a.py.patch\n  added pkg/old.py.patch\n"
    )
    assert "tasks:\n- inference\nmodels:\n- m\ncontact: me\n" in (folder / "series.yaml").read_text()

    fresh = make_tree(tmp_path / "fresh", BASE)
    words[2] = str(fresh)
    assert flagscale("apply", *words, "--dry-run") == 0
    shown = capsys.readouterr()
    assert "+line five\n" in shown.out
    assert read_bytes(fresh) == BASE
    assert flagscale("apply", *words, "--task", "inference") == 0
    assert capsys.readouterr().out == f"2 patches of Toy_Chip/vllm applied to {fresh}\n"
    assert flagscale("status", "--tree", str(fresh)) == 0
    digest = read_state(fresh).digest
    assert capsys.readouterr().out == f"{fresh}: patched by Toy_Chip/vllm ({digest[:12]})\n"
    assert flagscale("revert", "--tree", str(fresh)) == 0
    assert capsys.readouterr().out == f"{fresh} is as it was before patches\n"
    assert read_bytes(fresh) == BASE


def test_json(tree: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "README").write_text("mine\n")
    assert flagscale("export", *words, *HEADER_WORDS, "--json", "--version", "1.0") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["patches"], row["added"], row["removed"]) == (1, ["README.patch"], [])
    assert flagscale("apply", *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] is True
    assert flagscale("apply", *words, "--json", "--dry-run") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["changed"] is False
    assert "+mine" in row["diff"]
    assert flagscale("status", "--tree", str(tree), "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["series"], row["changed"]) == ("patched", ["Toy_Chip/vllm"], [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("status", "which tree? give a backend"),
        ("status vlm", "did you mean `vllm`?"),
        ("status --tree x --package y", "--tree and --package both name a tree"),
        ("apply vllm --tree TREE --hardware HW", "whose patches? give --device-type; there are: Toy_Chip"),
        ("apply vllm --tree TREE --hardware HW --device-type Toy_Chp", "did you mean `Toy_Chip`?"),
        ("apply --tree TREE --device-type Toy_Chip", "which backend's patches?"),
        (
            "apply vllm --tree TREE --hardware HW --device-type Toy_Chip --task rl",
            "Toy_Chip/vllm: for train, not for rl",
        ),
        ("export vllm --tree TREE", "where to? give --device-type"),
        ("export vllm --package yaml --device-type Toy_Chip", "export from the source tree"),
        ("export vllm --tree TREE --device-type Toy_Chip --why w", "a header has four lines"),
        ("verify vllm --package yaml --device-type Toy_Chip --against 1", "releases are tried on sources"),
        ("verify --tree TREE --series HW/Toy_Chip/vllm --against 9.9", "to try a version, name the backend"),
    ],
)
def test_what_cannot_be_meant(
    line: str, says: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_series(tmp_path, "Toy_Chip/vllm", BASE, PATCHED)
    series = tmp_path / "hardware" / "Toy_Chip" / "vllm" / "series.yaml"
    series.write_text(series.read_text().replace("tasks: []", "tasks: [train]"))
    typed = line.replace("TREE", str(tree)).replace("HW", str(tmp_path / "hardware")).split()
    assert flagscale(*typed) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert says in err


def test_conflicts_exit_with_1_and_rejects_are_told(
    tree: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_series(tmp_path, "Toy_Chip/vllm", BASE, PATCHED)
    (tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 5\n", b"line V\n"))
    commit_all(tree, "spell")
    assert flagscale("apply", *words) == 1
    assert "hunk 1 of 2, line 2 of pkg/a.py, expects" in capsys.readouterr().err
    assert flagscale("apply", *words, "--3way") == 1
    assert "a three-way merge leaves 1 place open" in capsys.readouterr().err
    assert flagscale("apply", *words, "--partial") == 1
    assert capsys.readouterr().out == (
        "pkg/a.py.patch: 1 hunks left, see .flagscale-patch/rejects/pkg/a.py.patch\n"
        f"2 patches of Toy_Chip/vllm applied to {tree}\n"
    )


def test_the_common_set_lies_below(
    tree: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_series(tmp_path, "Common/vllm", BASE, edited(README=b"common\n"))
    make_series(tmp_path, "Toy_Chip/vllm", BASE, PATCHED)
    assert flagscale("apply", *words) == 0
    assert read_state(tree).series == ("Common/vllm", "Toy_Chip/vllm")
    assert flagscale("apply", *words, "--no-common") == 0
    assert read_state(tree).series == ("Toy_Chip/vllm",)
    assert flagscale("apply", *words[:-1], "Common") == 0
    assert read_state(tree).series == ("Common/vllm",)
    assert read_bytes(tree) == edited(README=b"common\n")
    assert "applied to" in capsys.readouterr().out


def test_a_shell_that_stands_in_the_tree_is_told(tree: Path, words: list[str], tmp_path: Path) -> None:
    make_series(tmp_path, "Toy_Chip/vllm", BASE, PATCHED)
    words[2] = "."
    command = [sys.executable, "-c", "import sys; from flagscale.cli import main; sys.exit(main())", "patch"]
    typed = " ".join(f"'{word}'" for word in command)
    script = f"cd {tree}; {typed} apply {' '.join(words)}; {typed} status --tree .; cd .; cat pkg/sub/new.py"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [
        "this shell stands in the folder that was replaced: `cd .` enters the new one",
        f"{tree}: patched by Toy_Chip/vllm ({read_state(tree).digest[:12]})",
        "new = True",
    ]


def test_verify_and_rebase(tree: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_series(tmp_path, "Toy_Chip/vllm", BASE, PATCHED)
    (tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 2\n", b"line two\n"))
    commit_all(tree, "second")
    git(tree, "tag", "v2")
    (tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 5\n", b"line V\n"))
    commit_all(tree, "third")
    git(tree, "tag", "v3")
    assert flagscale("verify", *words, "--against", "HEAD~2", "v2", "--plot", str(tmp_path / "p.png")) == 0
    assert "v2 |" in capsys.readouterr().out
    assert (tmp_path / "p.png").exists()
    assert flagscale("verify", *words, "--against", "v3", "--notes") == 1
    assert "v3  pkg/a.py.patch: conflict: 1 place to merge by hand" in capsys.readouterr().out
    assert flagscale("verify", *words, "--against", "v2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["verdicts"]
    assert {row["patch"]: row["kind"] for row in rows}["pkg/a.py.patch"] == "three-way"

    folder = tmp_path / "hardware" / "Toy_Chip" / "vllm"
    assert flagscale("rebase", *words, "--onto", "v2", "--version", "2.0") == 0
    assert capsys.readouterr().out == f"{folder}: 3 patches, made for vllm 2.0\n"
    assert flagscale("verify", *words, "--against", "v2") == 0
    assert "3 clean" in capsys.readouterr().out
    assert flagscale("rebase", *words, "--onto", "v3") == 1
    out = capsys.readouterr().out
    assert "left    pkg/a.py.patch: conflict, 1 place to merge by hand\n" in out
    assert flagscale("rebase", *words, "--continue") == 1
    solved = PATCHED["pkg/a.py"].replace(b"line five", b"line five, V")
    (folder.parent / "vllm.rebase" / "new" / "pkg" / "a.py").write_bytes(solved)
    assert flagscale("rebase", *words, "--continue", "--json") == 0
    assert json.loads(capsys.readouterr().out)["patches"] == 3
    assert flagscale("rebase", *words, "--abort") == 2


def test_flagscales_names_for_it(tree: Path, tmp_path: Path) -> None:
    (tree / "README").write_text("mine\n")
    common = ("--backend", "vllm", "--tree", str(tree), "--hardware", str(tmp_path / "hardware"))
    done = tool("patch", *common, "--device-type", "Toy_Chip", "--task", "inference", *HEADER_WORDS)
    assert (done.returncode, done.stderr) == (0, "")
    git(tree, "checkout", "-q", ".")
    done = tool(
        "unpatch", *common, "--device-type", "Toy_Chip", "--task", "inference", "--no-force", "--backend-commit", "x"
    )
    assert done.returncode == 0
    assert done.stdout == f"1 patch of Toy_Chip/vllm applied to {tree}\n"
    assert "note: --no-force has no effect: it is always so" in done.stderr
    assert "note: --backend-commit has no effect" in done.stderr
    assert read_bytes(tree)["README"] == b"mine\n"
    done = tool("unpatch", *common, "--revert")
    assert done.returncode == 0
    assert read_bytes(tree) == BASE


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("patch", "--backend", "vllm", "--device-type", "toychip"), "expected Vendor_Chip"),
        (("patch", "--backend", "FlagScale"), "a chip's support in this toolkit is no patch set"),
        (("patch", "--backend", "vllm", "--key-path", "k"), "patches are never encrypted"),
        (("patch", "--backend", "vllm", "sglang", "--tree", "t"), "export them one by one"),
        (("unpatch", "--backend", "vllm", "--key-path", "k"), "encrypted patches are not taken"),
        (("unpatch", "--backend", "vllm", "--hardware", "none"), "no patches for vllm in none"),
    ],
)
def test_what_flagscales_names_refuse(typed: tuple[str, ...], says: str) -> None:
    done = tool(*typed)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_backend_means_the_tree_of_the_chip_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLAGSCALE_SOURCE_DIR", str(tmp_path))
    folder = tmp_path / "Megatron-LM"
    commit_all(make_tree(folder / "src", BASE), "upstream")

    def find_shown() -> str:
        flagscale("status", "megatron")
        return capsys.readouterr().out.partition(":")[0]

    assert find_shown() == str(folder / "src")
    make_tree(folder / "Toy_Chip" / ".flagscale-patch", BASE)
    assert find_shown() == str(folder / "Toy_Chip")
    make_tree(folder / "Other_Chip" / ".flagscale-patch", BASE)
    assert flagscale("status", "megatron") == 2
    assert "give --device-type; there are: Other_Chip, Toy_Chip" in capsys.readouterr().err
    flagscale("status", "megatron", "--device-type", "Toy_Chip")
    assert capsys.readouterr().out.startswith(f"{folder / 'Toy_Chip'}:")
