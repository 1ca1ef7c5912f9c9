"""A patch set on releases that it was not made for: every outcome, the matrix and the curve, and the rebase."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from patch_sets import HEADER, commit_all, make_series, make_tree, read_bytes

from flagscale.errors import PatchError, SourceError, UserError
from flagscale.patch.decay import (
    collect_symbols,
    plot_decay,
    render_matrix,
    render_notes,
    try_place,
    verify,
    wanted_names,
)
from flagscale.patch.index import IndexSettings
from flagscale.patch.rebase import abort_rebase, continue_rebase, rebase_series, work_folder
from flagscale.patch.release import Index, Place, bring_release, choose_archive, find_place, load_release
from flagscale.patch.series import Series, load_series
from flagscale.patch.symbols import find_changed, find_defined, find_unused
from flagscale.patch.tree import EXECUTABLE, SYMLINK, Content
from flagscale.patch.verify import Trial, Verdict, collect_bases


def function(name: str, body: str) -> str:
    return (
        f"def {name}(value):\n" + "".join(f"    step_{number} = value\n" for number in range(8)) + f"    {body}\n\n\n"
    )


def module(**bodies: str) -> bytes:
    return "".join(function(name, body) for name, body in bodies.items()).encode()


OLD = {
    "pkg/__init__.py": b"from pkg.use import main\n",
    "pkg/use.py": b"from pkg import core\n\n\ndef main():\n    core.one(1)\n    core.two(2)\n    core.three(3)\n",
    "pkg/core.py": module(one="return 1", two="return 2", three="return 3"),
    "pkg/moving.py": module(four="return 4", five="return 5"),
    "pkg/leaving.py": module(six="return 6"),
    "pkg/taken.py": module(seven="return 7", main="return 0"),
}
NEW = OLD | {
    "pkg/core.py": module(one="return 1", two="return 2 + 2", three="return 3"),
    "pkg/moving.py": module(four="return 4 + 4", five="return 5"),
    "pkg/leaving.py": module(six="return 6 + 6"),
    "pkg/taken.py": module(seven="return 7 + 7", main="return 0"),
    "pkg/made.py": b"MADE = 1\n",
}
BEFORE_TWO = b"    step_6 = value\n    step_7 = value\n    return 2\n"
SHIFTED = OLD | {"pkg/core.py": b"import os\n" * 5 + OLD["pkg/core.py"]}
LATER = {
    **OLD,
    "pkg/core.py": OLD["pkg/core.py"].replace(BEFORE_TWO, BEFORE_TWO.replace(b"step_6 = value", b"step_6 = other")),
    "pkg/taken.py": NEW["pkg/taken.py"],
    "pkg/inner/moving.py": OLD["pkg/moving.py"] + b"# moved\n",
}
del LATER["pkg/moving.py"], LATER["pkg/leaving.py"]
LAST = LATER | {
    "pkg/core.py": OLD["pkg/core.py"].replace(b"    return 2\n", b"    return two_of_upstream\n"),
    "pkg/made.py": b"OTHER = 1\n",
}


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return make_series(tmp_path, "Toy_Chip/toy", OLD, NEW)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "home", OLD)


def try_on(tmp_path: Path, files: Mapping[str, bytes], *layers: Series, home: Path | None = None) -> list[Trial]:
    number = len(list(tmp_path.glob("release-*")))
    place = Place(f"{number}.0", make_tree(tmp_path / f"release-{number}", files))
    bases = collect_bases(layers, lambda name, _sha: OLD.get(name))
    return try_place(place, layers, bases, collect_symbols(layers, bases, Place("home", home) if home else None))


def kinds(trials: list[Trial]) -> dict[str, str]:
    return {trial.verdict.patch.removesuffix(".py.patch"): trial.verdict.kind for trial in trials}


def test_every_outcome(tmp_path: Path, series: Series, home: Path) -> None:
    assert set(kinds(try_on(tmp_path, OLD, series, home=home)).values()) == {"clean"}
    assert set(kinds(try_on(tmp_path, SHIFTED, series, home=home)).values()) == {"clean"}
    assert set(kinds(try_on(tmp_path, NEW, series, home=home)).values()) == {"already upstream"}
    later = try_on(tmp_path, LATER, series, home=home)
    assert kinds(later) == {
        "pkg/core": "three-way",
        "pkg/leaving": "obsolete",
        "pkg/made": "clean",
        "pkg/moving": "three-way",
        "pkg/taken": "already upstream",
    }
    notes = {trial.verdict.patch: trial.verdict.note for trial in later}
    assert notes["pkg/leaving.py.patch"] == "pkg/leaving.py is gone"
    assert notes["pkg/moving.py.patch"] == "pkg/moving.py moved to pkg/inner/moving.py"
    last = try_on(tmp_path, LAST, series, home=home)
    assert kinds(last)["pkg/core"] == "conflict"
    assert kinds(last)["pkg/made"] == "conflict"
    assert "1 place to merge by hand" in {trial.verdict.note for trial in last}


def test_what_a_trial_leaves(tmp_path: Path, series: Series, home: Path) -> None:
    by_name = {trial.verdict.patch: trial for trial in try_on(tmp_path, LATER, series, home=home)}
    moved = by_name["pkg/moving.py.patch"].after
    assert moved["pkg/inner/moving.py"] == Content(0o100644, NEW["pkg/moving.py"] + b"# moved\n")
    assert "pkg/moving.py" not in moved
    core = by_name["pkg/core.py.patch"].after["pkg/core.py"]
    assert core
    assert b"step_6 = other" in core.data
    assert b"return 2 + 2" in core.data


def test_without_a_base_nothing_is_merged(tmp_path: Path, series: Series) -> None:
    place = Place("later", make_tree(tmp_path / "later", LATER))
    trials = try_place(place, [series], {}, {})
    assert kinds(trials)["pkg/core"] == "conflict"
    assert kinds(trials)["pkg/moving"] == "obsolete"
    assert "are not at hand to merge with" in trials[0].verdict.note


def test_code_that_nobody_calls_any_more(tmp_path: Path, home: Path) -> None:
    series = make_series(tmp_path, "Toy_Chip/toy", OLD, OLD | {"pkg/core.py": NEW["pkg/core.py"]})
    unused = OLD | {"pkg/use.py": OLD["pkg/use.py"].replace(b"    core.two(2)\n", b"")}
    (trial,) = try_on(tmp_path, unused, series, home=home)
    assert (trial.verdict.kind, trial.verdict.note) == ("obsolete", "nobody uses two any more")
    assert kinds(try_on(tmp_path, unused, series))["pkg/core"] == "clean", "whether it was used before is not known"


def test_a_function_that_is_gone(tmp_path: Path, home: Path) -> None:
    series = make_series(tmp_path, "Toy_Chip/toy", OLD, OLD | {"pkg/core.py": NEW["pkg/core.py"]})
    gone = OLD | {"pkg/core.py": module(one="return 1", three="return 3")}
    (trial,) = try_on(tmp_path, gone, series, home=home)
    assert (trial.verdict.kind, trial.verdict.note) == ("obsolete", "two is gone")


def test_a_result_that_is_no_python(tmp_path: Path) -> None:
    """The hunk fits, a line further up has opened a bracket."""
    old = OLD | {"pkg/core.py": OLD["pkg/core.py"].replace(b"return 2", b"return (2)")}
    new = old | {"pkg/core.py": old["pkg/core.py"].replace(b"return (2)", b"return (2 +")}
    series = make_series(tmp_path, "Toy_Chip/toy", old, new)
    (trial,) = try_on(tmp_path, old, series)
    assert trial.verdict.kind == "conflict"
    assert "pkg/core.py is no Python any more" in trial.verdict.note


def test_layers_are_tried_one_over_the_other(tmp_path: Path, home: Path) -> None:
    common = make_series(tmp_path, "Common/toy", OLD, NEW)
    last = NEW | {"pkg/core.py": NEW["pkg/core.py"].replace(b"return 2 + 2", b"return 2 + 2 + 2")}
    vendor = make_series(tmp_path, "Toy_Chip/toy", NEW, last)
    trials = try_on(tmp_path, SHIFTED, common, vendor, home=home)
    assert {trial.verdict.kind for trial in trials} == {"clean"}
    assert trials[-1].verdict.series == "Toy_Chip/toy"
    after = trials[-1].after["pkg/core.py"]
    assert after
    assert b"return 2 + 2 + 2" in after.data


def test_the_matrix_the_curve_and_the_picture(tmp_path: Path, series: Series, home: Path) -> None:
    places = [Place(label, make_tree(tmp_path / label, files)) for label, files in (("1.0", OLD), ("2.0", LATER))]
    bases = collect_bases([series], lambda name, _sha: OLD.get(name))
    columns = verify([series], places, bases, Place("home", home))
    lines = render_matrix(columns).splitlines()
    assert lines[0].split() == ["1.0", "2.0"]
    assert lines[1].split() == ["pkg/core.py.patch", "+", "3"]
    assert lines[7] == "+ clean  3 three-way  X conflict  u already upstream  o obsolete"
    assert lines[9] == f"1.0 |{'#' * 40}| 100%  5 clean"
    assert lines[10].startswith(
        f"2.0 |{'#' * 24}{' ' * 16}|  60%  1 clean, 2 three-way, 1 already upstream, 1 obsolete"
    )
    assert "2.0  pkg/leaving.py.patch: obsolete: pkg/leaving.py is gone" in render_notes(columns)
    picture = tmp_path / "decay.png"
    plot_decay(columns, "Toy_Chip/toy, made for 1.0", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert verify([series], places[:1], bases) == columns[:1]


class TestRebase:
    def start(self, tmp_path: Path, files: Mapping[str, bytes], home: Path) -> Path:
        folder = tmp_path / "hardware" / "Toy_Chip" / "toy"
        self.done = rebase_series(folder, try_on(tmp_path, files, load_series(folder), home=home), "2.0", "digest")
        return folder

    @pytest.mark.usefixtures("series")
    def test_all_of_it_carries_over(self, tmp_path: Path, home: Path) -> None:
        folder = self.start(tmp_path, SHIFTED, home)
        made = load_series(folder)
        assert self.done.series == made
        assert (self.done.work, self.done.dropped) == (None, ())
        assert (made.version, made.digest, len(made.patches)) == ("2.0", "digest", 5)
        assert {patch.header for patch in made.patches} == {HEADER}
        assert set(kinds(try_on(tmp_path, SHIFTED, made)).values()) == {"clean"}

    @pytest.mark.usefixtures("series")
    def test_what_is_left_is_solved_by_a_person(self, tmp_path: Path, home: Path) -> None:
        before = load_series(tmp_path / "hardware" / "Toy_Chip" / "toy")
        folder = self.start(tmp_path, LAST, home)
        assert load_series(folder) == before
        work = work_folder(folder)
        assert self.done.work == work
        assert self.done.dropped == ("pkg/taken.py.patch: already upstream",)
        assert [line.partition(":")[0] for line in self.done.todo] == [
            "pkg/core.py.patch", "pkg/leaving.py.patch", "pkg/made.py.patch"]  # fmt: skip
        assert b"<<<<<<< here" in (work / "new" / "pkg" / "core.py").read_bytes()
        assert (work / "patches" / "pkg" / "leaving.py.patch").read_text().startswith("Why: to test\n")
        with pytest.raises(PatchError, match=r"these files still have conflict markers:\n.*core.py"):
            continue_rebase(folder)
        with pytest.raises(UserError, match="a rebase is under way"):
            self.start(tmp_path, LAST, home)
        solved = LAST["pkg/core.py"].replace(b"two_of_upstream", b"two_of_upstream + 2")
        (work / "new" / "pkg" / "core.py").write_bytes(solved)
        done = continue_rebase(folder)
        assert not work.exists()
        assert set(done.dropped) == {
            "pkg/taken.py.patch: already upstream",
            "pkg/leaving.py.patch: nothing is left of it",
            "pkg/moving.py.patch: nothing is left of it",
        }
        made = load_series(folder)
        assert {patch.name for patch in made.patches} == {
            "pkg/core.py.patch", "pkg/inner/moving.py.patch", "pkg/made.py.patch"}  # fmt: skip
        assert b"+    return two_of_upstream + 2\n" in made.stream
        assert set(kinds(try_on(tmp_path, LAST, made)).values()) == {"clean"}

    @pytest.mark.usefixtures("series")
    def test_a_rebase_is_forgotten(self, tmp_path: Path, home: Path) -> None:
        folder = self.start(tmp_path, LAST, home)
        abort_rebase(folder)
        assert not work_folder(folder).exists()
        for command in (abort_rebase, continue_rebase):
            with pytest.raises(UserError, match="no rebase of it is under way"):
                command(folder)

    @pytest.mark.usefixtures("series")
    def test_a_series_that_upstream_has_taken(self, tmp_path: Path, home: Path) -> None:
        with pytest.raises(PatchError, match="upstream has all of it"):
            self.start(tmp_path, NEW, home)


class TestPlaces:
    def archive(self, folder: Path, name: str = "toy-1.0.tar.gz", files: Mapping[str, bytes] = OLD) -> Path:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / name, "w:gz") as tar:
            for file, data in files.items():
                member = tarfile.TarInfo(f"toy-1.0/src/{file}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("toy-1.0/src/link.py")
            link.type, link.linkname = tarfile.SYMTYPE, "pkg/core.py"
            tar.addfile(link)
        return folder / name

    def test_a_source_archive(self, tmp_path: Path) -> None:
        place = Place("1.0", self.archive(tmp_path / "shelf"), top="src")
        release = load_release(place, frozenset())
        assert release.names == {*OLD, "link.py"}
        assert {name: content.data for name, content in release.files.items() if name != "link.py"} == OLD
        assert release.files["link.py"] == Content(SYMLINK, b"pkg/core.py")
        assert len(list(release.python)) == len(OLD)
        assert len(place.digest) == 64

    def test_a_wheel(self, tmp_path: Path) -> None:
        path = tmp_path / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            info = zipfile.ZipInfo("pkg/run.sh")
            info.external_attr = 0o100755 << 16
            wheel.writestr(info, b"#!")
            wheel.writestr("pkg/a.so", b"x")
        release = load_release(Place("1.0", path), frozenset(["pkg/run.sh"]))
        assert release.files == {"pkg/run.sh": Content(EXECUTABLE, b"#!")}
        assert release.names == {"pkg/run.sh"}

    def test_a_folder_a_commit_and_neither(self, tmp_path: Path) -> None:
        tree = make_tree(tmp_path / "tree", OLD)
        commit_all(tree, "first")
        (tree / "pkg" / "core.py").write_text("edited\n")
        place = find_place("HEAD", tree)
        assert place
        assert len(place.digest) == 40
        assert {name: content.data for name, content in load_release(place, frozenset()).files.items()} == OLD
        folder = find_place(str(tree))
        assert folder
        assert folder.digest == ""
        assert (
            load_release(folder, frozenset()).files["pkg/core.py"].data
            == b"edited\n"
            == read_bytes(tree)["pkg/core.py"]
        )
        assert find_place("v1", tree) is None
        assert find_place("1.0") is None
        with pytest.raises(UserError, match="there is no such archive or folder"):
            find_place("./none.tar.gz")

    def test_a_damaged_archive_is_told(self, tmp_path: Path) -> None:
        path = self.archive(tmp_path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(SourceError, match=r"cannot be read: .*; delete it to fetch it again"):
            load_release(Place("1.0", path), frozenset())

    def test_the_archive_of_a_version(self) -> None:
        names = {"a_b-1.0-cp311-cp311-linux_x86_64.whl", "a_b-1.0-py3-none-any.whl", "a-b-1.0.1.tar.gz", "A.B-2.0.zip"}
        assert choose_archive("a-b", "1.0", names) == "a_b-1.0-py3-none-any.whl"
        assert choose_archive("a-b", "1.0", names | {"a-b-1.0.tar.gz"}) == "a-b-1.0.tar.gz"
        assert choose_archive("a-b", "2.0", names) == "A.B-2.0.zip"
        assert choose_archive("a-b", "3.0", names) is None

    def test_a_release_is_brought_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf = tmp_path / "shelf"
        self.archive(shelf)
        settings = IndexSettings(indexes=(), find_links=(str(shelf),))
        monkeypatch.setattr("flagscale.patch.release.load_index_settings", lambda: settings)
        path = bring_release(Index("toy"), "1.0", tmp_path / "cache")
        assert path == tmp_path / "cache" / "toy-1.0.tar.gz"
        monkeypatch.setattr("flagscale.patch.release.load_index_settings", lambda: pytest.fail("asked again"))
        assert bring_release(Index("toy"), "1.0", tmp_path / "cache") == path
        monkeypatch.setattr("flagscale.patch.release.load_index_settings", lambda: settings)
        with pytest.raises(SourceError, match=r"toy has no release 9.9; the newest are 1.0"):
            bring_release(Index("toy"), "9.9", tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy-1.0.tar.gz"]


class TestSymbols:
    SOURCE = (
        b"class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n\n\n"
        b"def h():\n    return 3\n"
    )

    def test_what_a_file_defines(self) -> None:
        assert find_defined(self.SOURCE) == {"A", "A.f", "A.g", "h"}
        assert find_defined(b"def (") == frozenset()

    def test_what_a_diff_changes(self) -> None:
        diff = b"@@ -4,4 +4,5 @@\n \n     def g(self):\n+        x = 1\n         return 2\n \n"
        assert find_changed(self.SOURCE, diff) == {"A.g"}
        assert find_changed(b"def (", diff) == frozenset()
        assert find_changed(b"x = 1\n", b"@@ -1 +1 @@\n-x = 1\n+x = 2\n") == frozenset()

    def test_who_uses_a_name(self) -> None:
        files = [b"from m import h\n", b"a.g()\n", b"NAMES = ['m.Table']\n", b"def unused(): pass\n", b"broken ("]
        names = ["h", "A.g", "A.unused", "A.__init__", "Table", "broken"]
        assert find_unused(names, files) == {"A.unused", "broken"}

    def test_names_that_end_alike_are_used_or_unused_together(self) -> None:
        assert find_unused(["A.f", "B.f"], [b"def f(): pass\n"]) == {"A.f", "B.f"}
        assert find_unused(["A.f", "B.f"], [b"def f(): pass\n", b"f()\n"]) == frozenset()
        assert find_unused(["A.f"], [b"def f_long(): pass\n", b"f_long()\n", b"'\\ud800'; f = 1\n"]) == frozenset()
        assert find_unused(["grün"], ["def grün(): pass\n".encode()]) == {"grün"}


def test_names_and_verdicts_as_json(series: Series) -> None:
    assert wanted_names([series]) == {"pkg/core.py", "pkg/leaving.py", "pkg/made.py", "pkg/moving.py", "pkg/taken.py"}
    assert json.dumps(Verdict("s", "p", "r", "clean").kind) == '"clean"'
