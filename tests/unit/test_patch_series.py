"""Patch sets on disk: what is read, what is refused and how it is told, and what an export writes."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from patch_sets import BASE, HEADER, LINES, PATCHED, commit_all, edited, make_series, make_tree, read_bytes

from flagscale.errors import PatchError, UserError
from flagscale.patch.apply import Options, apply_series, revert_tree
from flagscale.patch.diffs import apply_plain, quote, read_changes, read_hunks, read_name, show_name
from flagscale.patch.export import export_series, find_changes
from flagscale.patch.git import make_diffs, merge_contents, try_patches
from flagscale.patch.package import below_package, find_package
from flagscale.patch.series import Header, Series, load_series, render_series
from flagscale.patch.state import read_state
from flagscale.patch.tree import EXECUTABLE, Content
from flagscale.patch.upstream import find_upstream, of_commit, of_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_series(tmp_path, "Toy_Chip/toy", BASE, PATCHED)
    return tmp_path / "hardware" / "Toy_Chip" / "toy"


def fault(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_series(folder)
    return str(caught.value)


def change_yaml(folder: Path, **changes: object) -> None:
    path = folder / "series.yaml"
    row = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in row.items() if value is not ...}))


def test_what_an_export_writes(folder: Path) -> None:
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "pkg/a.py.patch",
        "pkg/old.py.patch",
        "pkg/sub/new.py.patch",
        "series.yaml",
    ]
    text = (folder / "pkg" / "a.py.patch").read_text()
    assert text.startswith(
        "Why: to test\nHow: by an edit\nUpstream: none: a test\nRemove-when: the test is gone\n\ndiff --git"
    )
    series = load_series(folder)
    assert (series.name, series.made_for) == ("Toy_Chip/toy", "toy 1.0")
    assert [patch.name for patch in series.patches] == ["pkg/a.py.patch", "pkg/old.py.patch", "pkg/sub/new.py.patch"]
    assert series.patches[1].result == {"pkg/old.py": None}
    assert series.patches[2].base == {"pkg/sub/new.py": None}
    assert yaml.safe_load(render_series(series)) == yaml.safe_load((folder / "series.yaml").read_text())


def test_a_header_of_many_lines_is_kept(tmp_path: Path) -> None:
    header = Header("first\nsecond", "how", "https://example.org/1", "never\n- or later")
    series = make_series(tmp_path, "Toy_Chip/toy", BASE, PATCHED, header)
    assert {patch.header for patch in series.patches} == {header}
    assert try_patches({}, []).results == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pach": 1}, "pach: is no key of a series; did you mean `patches`?"),
        ({"version": 2}, "version: 2 is unknown; expected 1"),
        ({"pin": "0.1"}, "pin: is no pin; expected version and digest"),
        ({"pin": ...}, "pin: is missing"),
        ({"patches": {}}, "patches: is no list"),
        ({"patches": [{"path": "x.patch"}]}, "patches[0]: is no entry"),
    ],
)
def test_a_series_file_that_is_wrong(folder: Path, changes: dict[str, object], says: str) -> None:
    change_yaml(folder, **changes)
    assert says in fault(folder)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    (folder / "pkg" / "a.py.patch").unlink()
    (folder / "stray.patch").write_text("x")
    text = (folder / "pkg" / "old.py.patch").read_text()
    (folder / "pkg" / "old.py.patch").write_text(text.replace("Why: to test\n", "").replace("How: by an edit", "How:"))
    (folder / "pkg" / "sub" / "new.py.patch").write_text("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n")
    told = fault(folder)
    assert "4 faults" in told
    assert "a.py.patch: there is no such patch, though the series lists it" in told
    assert "old.py.patch: the header lacks Why, How; expected a line `Why: ..` above the diff" in told
    assert "new.py.patch: holds no diff in git's format" in told
    assert "does not list `stray.patch`" in told


@pytest.mark.parametrize("name", ["../out.py", "/etc/passwd", ".git/config", "a/.git/hooks/x", ".flagscale-patch/x"])
def test_a_patch_stays_in_its_tree(folder: Path, name: str) -> None:
    path = folder / "pkg" / "sub" / "new.py.patch"
    path.write_text(path.read_text().replace("pkg/sub/new.py", name))
    assert f"changes `{name}`, which is no file of the source" in fault(folder)


def test_hashes_and_diff_must_be_of_the_same_files(folder: Path) -> None:
    path = folder / "pkg" / "sub" / "new.py.patch"
    path.write_text(path.read_text().replace("pkg/sub/new.py", "pkg/sub/other.py"))
    assert "patches.base: lists other files than the diff; expected pkg/sub/other.py" in fault(folder)


def test_two_patches_for_one_file(folder: Path) -> None:
    shutil.copy(folder / "pkg" / "a.py.patch", folder / "again.patch")
    rows = yaml.safe_load((folder / "series.yaml").read_text())["patches"]
    change_yaml(folder, patches=[*rows, rows[0] | {"path": "again.patch"}])
    assert "again.patch: changes pkg/a.py, as pkg/a.py.patch does" in fault(folder)


def test_encrypted_patches_are_refused(folder: Path) -> None:
    (folder / "pkg" / "b.py.patch.encrypted").write_bytes(b"\0" * 600)
    assert "1 patches are encrypted (b.py.patch.encrypted, ..)" in fault(folder)
    assert "ask their author for the plain ones" in fault(folder)


@pytest.mark.parametrize("text", ["[", "text", "\0"])
def test_no_yaml(folder: Path, text: str) -> None:
    (folder / "series.yaml").write_text(text)
    assert "series.yaml" in fault(folder)


def test_no_series(tmp_path: Path) -> None:
    assert "no patch set: there is no series.yaml in it" in fault(tmp_path)


class TestExport:
    def export(self, tree: Path, folder: Path, header: Header | None = None, lower: tuple[Series, ...] = ()) -> Series:
        upstream = find_upstream(tree)
        assert upstream
        draft = Series("Toy_Chip/toy", "toy", "1.0", "none")
        return export_series(tree, folder, draft, upstream, lower, header).series

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        tree = make_tree(tmp_path / "tree", BASE)
        commit_all(tree, "upstream")
        return tree

    def test_new_patches_need_a_header_and_old_ones_keep_theirs(self, tree: Path, folder: Path) -> None:
        apply_series(tree, [load_series(folder)])
        (tree / "pkg" / "b.py").write_text("b = 2\n")
        with pytest.raises(UserError, match=r"a patch says why it is there; these are new:\n  pkg/b.py\n"):
            self.export(tree, folder)
        other = Header("b", "b", "b", "b")
        made = self.export(tree, folder, other)
        assert {patch.name: patch.header for patch in made.patches} == {
            "pkg/a.py.patch": HEADER,
            "pkg/b.py.patch": other,
            "pkg/old.py.patch": HEADER,
            "pkg/sub/new.py.patch": HEADER,
        }
        assert load_series(folder) == made

    def test_exporting_again_changes_nothing(self, tree: Path, folder: Path) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        apply_series(tree, [load_series(folder)])
        self.export(tree, folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_patch_that_is_taken_back_is_removed_and_other_files_stay(self, tree: Path, folder: Path) -> None:
        (folder / "README.md").write_text("mine\n")
        apply_series(tree, [load_series(folder)])
        (tree / "pkg" / "sub" / "new.py").unlink()
        upstream = find_upstream(tree)
        assert upstream
        made = export_series(tree, folder, Series("Toy_Chip/toy", "toy", "1.0", "none"), upstream)
        assert made.removed == ("pkg/sub/new.py.patch",)
        assert not (folder / "pkg" / "sub").exists()
        assert (folder / "README.md").read_text() == "mine\n"

    def test_patches_that_the_tree_does_not_have_are_not_lost(self, tree: Path, folder: Path) -> None:
        (tree / "README").write_text("mine\n")
        with pytest.raises(PatchError, match=r"has 3 patches that are not in .* and would be lost"):
            self.export(tree, folder, HEADER)
        assert len(load_series(folder).patches) == 3

    def test_a_tree_that_was_exported_from_can_be_applied_to(self, tree: Path, tmp_path: Path) -> None:
        """The edits are what the series makes: they are adopted, and nothing has to be stashed."""
        (tree / "pkg" / "a.py").write_bytes(PATCHED["pkg/a.py"])
        (tree / "pkg" / "old.py").unlink()
        (tree / "extra.py").write_text("extra\n")
        made = self.export(tree, tmp_path / "hardware" / "Toy_Chip" / "new", HEADER)
        outcome = apply_series(tree, [made])
        assert outcome.stash is None
        assert read_state(tree).kind == "patched"
        revert_tree(tree)
        assert read_bytes(tree) == BASE

    def test_a_layer_below_is_left_out(self, tree: Path, tmp_path: Path) -> None:
        common = make_series(tmp_path, "Common/toy", BASE, edited(pkg__a_dot_py=LINES + b"common\n"))
        apply_series(tree, [common])
        (tree / "pkg" / "a.py").write_bytes(LINES + b"common\nvendor\n")
        made = self.export(tree, tmp_path / "hardware" / "Toy_Chip" / "toy", HEADER, (common,))
        assert [patch.name for patch in made.patches] == ["pkg/a.py.patch"]
        assert b"+vendor\n" in made.stream
        assert b"+common\n" not in made.stream
        outcome = apply_series(tree, [common, made], Options(stash=True))
        assert outcome.notes == ()
        assert read_bytes(tree)["pkg/a.py"] == LINES + b"common\nvendor\n"

    def test_nothing_to_export(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(PatchError, match="nothing differs from upstream"):
            self.export(tree, tmp_path / "hardware" / "Toy_Chip" / "toy")

    def test_ignored_files_caches_and_builds_are_no_part_of_it(self, tree: Path) -> None:
        (tree / ".git" / "info" / "exclude").write_text("*.log\n")
        for name in ("run.log", "ext.so", "pkg/__pycache__/a.pyc"):
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_bytes(b"x")
        (tree / "README").write_text("mine\n")
        upstream = find_upstream(tree)
        assert upstream
        _, new = find_changes(tree, upstream)
        assert list(new) == ["README"]

    def test_upstream_from_a_commit_or_a_folder(self, tree: Path, tmp_path: Path) -> None:
        (tree / "README").write_text("mine\n")
        commit_all(tree, "mine")
        first = of_commit(tree, "HEAD~1")
        assert set(find_changes(tree, first)[1]) == {"README"}
        untouched = make_tree(tmp_path / "untouched", BASE)
        assert set(find_changes(tree, of_folder(untouched))[1]) == {"README"}
        with pytest.raises(UserError, match="no commit of"):
            of_commit(tree, "nonsense")

    def test_upstreams_bytes_that_nobody_has(self, tmp_path: Path) -> None:
        package = make_package(tmp_path)
        (package / "core.py").write_text("edited\n")
        upstream = find_upstream(package)
        assert upstream
        with pytest.raises(PatchError, match=r"upstream's bytes of edited files are not known; .*: core.py"):
            find_changes(package, upstream)


def make_package(root: Path) -> Path:
    """An installed package `toy_package`, with the RECORD that pip leaves."""
    import base64
    import hashlib

    site = root / "site-packages"
    package = make_tree(site / "toy_package", {"__init__.py": b"", "core.py": b"ANSWER = 42\n"})
    rows = []
    for path in sorted(package.iterdir()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        rows.append(f"toy_package/{path.name},sha256={digest},{path.stat().st_size}\n")
    info = site / "toy_dist-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("".join(rows) + "toy_dist-1.0.dist-info/RECORD,,\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-dist\nVersion: 1.0\n")
    return package


class TestPackage:
    def test_a_package_is_patched_and_comes_back(self, tmp_path: Path) -> None:
        package = make_package(tmp_path)
        assert read_state(package).kind == "clean"
        old = {"toy_package/core.py": b"ANSWER = 42\n"}
        new = {"toy_package/core.py": b"ANSWER = 43\n", "toy_package/more.py": b"MORE = 1\n"}
        series = below_package(make_series(tmp_path, "Toy_Chip/toy", old, new), "toy_package")
        before = {path: path.read_bytes() for path in package.iterdir()}
        apply_series(package, [series])
        assert (package / "core.py").read_text() == "ANSWER = 43\n"
        assert read_state(package).kind == "patched"
        (package / "__init__.py").write_text("drift\n")
        assert read_state(package).changed == ("__init__.py (edited)",)
        (package / "__init__.py").write_text("")
        revert_tree(package)
        assert {path: path.read_bytes() for path in package.iterdir()} == before
        assert read_state(package).kind == "clean"

    def test_renames_quotes_and_binaries_move_below_the_package(self, tmp_path: Path) -> None:
        old = {'p/ö "x".txt': Content(0o100644, b"same\n" * 9), "p/b.bin": Content(0o100644, b"\0" * 9)}
        new = {"p/sub/new name.txt": Content(0o100644, b"same\n" * 9), "p/b.bin": Content(EXECUTABLE, b"\1" * 9)}
        series = below_package(make_series(tmp_path, "Toy_Chip/toy", old, new), "p")
        tree = make_tree(tmp_path / "p", {name.removeprefix("p/"): content for name, content in old.items()})
        apply_series(tree, [series])
        assert read_bytes(tree) == {name.removeprefix("p/"): content.data for name, content in new.items()}

    def test_files_that_a_package_does_not_have(self, tmp_path: Path) -> None:
        series = make_series(tmp_path, "Toy_Chip/toy", {"setup.py": b"1\n"}, {"setup.py": b"2\n"})
        with pytest.raises(UserError, match=r"can only be applied to its source: setup.py"):
            below_package(series, "toy_package")

    def test_finding_a_package(self) -> None:
        assert find_package("yaml") == Path(yaml.__file__).parent
        for name, says in (
            ("no_such", "no such package"),
            ("a-b", "no such package"),
            ("typing_extensions", "a single file"),
        ):
            with pytest.raises(UserError, match=says):
                find_package(name)


class TestDiffs:
    @pytest.mark.parametrize("name", ["a", "ö", 'q"', "tab\t", "\udcff", "new\nline", '"quoted"'])
    def test_names_are_shown_and_read_back(self, name: str) -> None:
        assert read_name(show_name(name)) == name
        assert show_name(name).isprintable()
        assert quote(name).isascii()

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b"a\n", b"b\n"),
            (LINES, LINES.replace(b"line 5\n", b"") + b"end\n"),
            (LINES + b"end", LINES.replace(b"line 5\n", b"") + b"end"),
            (b"1\r\n2\r3\n", b"1\r\n2\rx\n"),
            (b"", b"x\n"),
            (b"x\n", b""),
        ],
    )
    def test_plain_changes_are_made_as_git_makes_them(self, old: bytes, new: bytes) -> None:
        (diff,) = make_diffs({"f": Content(0o100644, old)}, {"f": Content(0o100644, new)})
        assert apply_plain(old, diff) == new
        assert apply_plain(b"other\n" + new, diff) != b"other\n" + new

    def test_an_edit_between_the_lines_of_a_hunk_is_not_taken_for_the_old_file(self) -> None:
        """The result has the hunk's lines, so its hash would be the promised one, and the edit would be gone."""
        new = LINES.replace(b"line 5\n", b"five\n")
        (diff,) = make_diffs({"f": Content(0o100644, LINES)}, {"f": Content(0o100644, new)})
        assert apply_plain(LINES, diff) == new
        for line in (b"line 4\n", b"line 5\n", b"line 7\n"):
            assert apply_plain(LINES.replace(line, b"an edit\n"), diff) is None

    def test_all_else_is_left_to_git(self) -> None:
        old = {"f": Content(0o100644, b"a\n"), "b": Content(0o100644, b"\0")}
        new = {"f": Content(EXECUTABLE, b"b\n"), "b": Content(0o100644, b"\0\1"), "n": Content(0o100644, b"n\n")}
        diffs = make_diffs(old, new)
        assert [apply_plain(b"a\n", diff) for diff in diffs] == [None] * 3
        (no_end,) = make_diffs({"f": Content(0o100644, b"a\n")}, {"f": Content(0o100644, b"a")})
        assert apply_plain(b"a\n", no_end) is None
        assert [len(read_changes(diff)) for diff in diffs] == [1, 1, 1]

    def test_hunks(self) -> None:
        new = LINES.replace(b"line 5\n", b"five\n").replace(b"line 25\n", b"")
        (diff,) = make_diffs({"f": Content(0o100644, LINES)}, {"f": Content(0o100644, new)})
        first, second = read_hunks(diff)
        assert (first.start, first.before[3], first.after[3]) == (2, b"line 5", b"five")
        assert (second.start, len(second.before), len(second.after)) == (22, 7, 6)

    def test_a_merge_of_binaries_is_a_conflict(self) -> None:
        assert merge_contents(b"\0a", b"\0b", b"\0c", ("x", "y", "z")) == (b"\0a", 1)
        assert merge_contents(b"a\nb\nc\n", b"a\nb\nc\n", b"a\nB\nc\n", ("x", "y", "z")) == (b"a\nB\nc\n", 0)


def test_shipped_patches_stand_as_an_export_writes_them() -> None:
    """So that the next export changes those alone whose files were edited: git's names of blobs are whole."""
    patches = sorted((Path(__file__).parents[2] / "hardware").rglob("*.patch"))
    assert patches
    for path in patches:
        names = re.findall(rb"^index (\w+)\.\.(\w+)", path.read_bytes(), re.MULTILINE)
        assert names, path
        assert all(len(name) == 40 for pair in names for name in pair), path
