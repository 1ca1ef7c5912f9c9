"""Applying and reverting: what is refused and how it is told, edits kept, layers, three-way merges, rejects."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
from patch_sets import (
    BASE,
    HEADER,
    LINES,
    PATCHED,
    commit_all,
    edited,
    git,
    make_series,
    make_tree,
    read_bytes,
    snapshot,
)

from flagscale.errors import PatchError
from flagscale.patch.apply import Options, apply_series, revert_tree
from flagscale.patch.bases import find_in_history, make_find_base
from flagscale.patch.series import Series, hash_bytes
from flagscale.patch.state import read_state
from flagscale.patch.swap import exchange
from flagscale.patch.tree import Content, read_content
from flagscale.patch.upstream import find_upstream

OTHER_RELEASE = edited(pkg__a_dot_py=LINES.replace(b"line 15\n", b"line fifteen, by upstream\n"))
MOVED_LINES = edited(pkg__a_dot_py=b"new first\n" * 3 + LINES.replace(b"line 6\n", b"line six, by upstream\n"))


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return make_series(tmp_path, "Toy_Chip/toy", BASE, PATCHED)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", BASE)


@pytest.fixture
def git_tree(tree: Path) -> Path:
    commit_all(tree, "upstream")
    return tree


def refusal(tree: Path, *layers: Series, options: Options = Options()) -> str:  # noqa: B008
    """The message of an apply that is refused, and that changed nothing."""
    before = snapshot(tree)
    with pytest.raises(PatchError) as caught:
        apply_series(tree, layers, options)
    assert snapshot(tree) == before
    assert not (tree.parent / f".{tree.name}.flagscale").exists()
    return str(caught.value)


def test_apply_says_what_it_did_and_twice_is_once(tree: Path, series: Series) -> None:
    outcome = apply_series(tree, [series])
    assert outcome.changed
    assert outcome.diff.count(b"diff --git ") == 3
    assert read_bytes(tree) == PATCHED
    state = read_state(tree)
    assert (state.kind, state.series, state.changed) == ("patched", ("Toy_Chip/toy",), ())
    assert len(state.digest) == 64
    again = apply_series(tree, [series])
    assert not again.changed
    assert again.notes == ("the tree is as the series made it: nothing to do",)


def test_the_digest_is_the_same_on_every_host(tmp_path: Path, series: Series) -> None:
    trees = [make_tree(tmp_path / name, BASE) for name in ("one", "two")]
    for tree in trees:
        apply_series(tree, [series])
    assert len({read_state(tree).digest for tree in trees}) == 1


def test_a_dry_run_shows_the_diff_and_changes_nothing(tree: Path, series: Series) -> None:
    before = snapshot(tree)
    outcome = apply_series(tree, [series], Options(dry_run=True))
    assert b"+line five\n" in outcome.diff
    assert snapshot(tree) == before
    assert read_state(tree).kind == "unknown"
    apply_series(tree, [series])
    assert revert_tree(tree, dry_run=True).diff == outcome.diff
    assert read_state(tree).kind == "patched"


def test_another_series_takes_the_place_of_the_first(tree: Path, series: Series, tmp_path: Path) -> None:
    before = snapshot(tree)
    other = make_series(tmp_path, "Other_Chip/toy", BASE, edited(pkg__b_dot_py=b"other = 1\n"))
    apply_series(tree, [series])
    apply_series(tree, [other])
    assert read_bytes(tree) == edited(pkg__b_dot_py=b"other = 1\n")
    assert read_state(tree).series == ("Other_Chip/toy",)
    revert_tree(tree)
    assert snapshot(tree) == before


def test_modes_times_owners_and_caches_come_back(tree: Path, series: Series) -> None:
    (tree / "pkg" / "a.py").chmod(0o640)
    (tree / "pkg").chmod(0o750)
    cache = tree / "pkg" / "__pycache__" / "a.cpython-311.pyc"
    cache.parent.mkdir()
    cache.write_bytes(b"cache")
    os.utime(tree / "pkg" / "a.py", ns=(5, 5))
    before = snapshot(tree)
    apply_series(tree, [series])
    assert (tree / "pkg" / "a.py").stat().st_mode & 0o777 == 0o640
    assert (tree / "pkg").stat().st_mode & 0o777 == 0o750
    assert not cache.exists(), "a cache of the old file would be taken for one of the new"
    cache.write_bytes(b"cache of the patched file")
    (tree / "pkg" / "sub" / "__pycache__").mkdir()
    (tree / "pkg" / "sub" / "__pycache__" / "new.cpython-311.pyc").write_bytes(b"cache")
    assert read_state(tree).kind == "patched"
    revert_tree(tree)
    assert snapshot(tree) == before


def test_files_that_no_patch_touches_are_left_as_they_are(tree: Path, series: Series) -> None:
    (tree / "README").write_text("mine\n")
    (tree / "notes.txt").write_text("mine too\n")
    apply_series(tree, [series])
    assert read_bytes(tree) == {**PATCHED, "README": b"mine\n", "notes.txt": b"mine too\n"}
    revert_tree(tree)
    assert read_bytes(tree) == {**BASE, "README": b"mine\n", "notes.txt": b"mine too\n"}


def test_a_hand_edit_shows_as_drift_and_is_not_lost(tree: Path, series: Series, tmp_path: Path) -> None:
    before = snapshot(tree)
    apply_series(tree, [series])
    with (tree / "pkg" / "a.py").open("a") as file:
        file.write("by hand\n")
    assert read_state(tree).changed == ("pkg/a.py (edited)",)
    with pytest.raises(PatchError, match="--stash keeps the edits") as caught:
        revert_tree(tree)
    assert "pkg/a.py (edited)" in str(caught.value)
    outcome = revert_tree(tree, stash=True)
    assert outcome.stash == tmp_path / "tree.stash" / "1.patch"
    assert b"+by hand\n" in outcome.stash.read_bytes()
    assert snapshot(tree) == before
    assert outcome.kept is None


def test_the_stash_of_an_edit_can_be_put_back(tree: Path, series: Series) -> None:
    apply_series(tree, [series])
    (tree / "pkg" / "a.py").write_text("by hand\n")
    (tree / "pkg" / "sub" / "new.py").unlink()
    outcome = apply_series(tree, [series], Options(stash=True))
    assert outcome.stash
    assert read_bytes(tree) == PATCHED
    assert read_state(tree).kind == "patched"
    subprocess.run(["git", "apply", str(outcome.stash)], cwd=tree, check=True)
    assert (tree / "pkg" / "a.py").read_text() == "by hand\n"
    assert not (tree / "pkg" / "sub" / "new.py").exists()


def test_drift_in_files_that_no_patch_touches(tree: Path, series: Series) -> None:
    apply_series(tree, [series])
    (tree / "README").write_text("mine\n")
    (tree / "new.txt").write_text("new\n")
    (tree / "pkg" / "b.py").unlink()
    assert read_state(tree).changed == ("README (edited)", "new.txt (added)", "pkg/b.py (missing)")


def test_a_tree_that_was_copied_is_no_drift_where_upstream_is_known(git_tree: Path, series: Series) -> None:
    apply_series(git_tree, [series])
    for path in git_tree.rglob("*"):
        os.utime(path)
    assert read_state(git_tree).kind == "patched"


def test_local_edits_are_refused_by_name(git_tree: Path, series: Series) -> None:
    (git_tree / "pkg" / "a.py").write_bytes(LINES + b"mine\n")
    (git_tree / "pkg" / "sub").mkdir()
    (git_tree / "pkg" / "sub" / "new.py").write_text("mine\n")
    told = refusal(git_tree, series)
    assert "2 of 3 patches do not fit (made for toy 1.0); nothing was changed" in told
    assert "pkg/a.py.patch (Toy_Chip/toy): pkg/a.py was edited here; --stash keeps the edits as a patch" in told
    assert "pkg/sub/new.py.patch (Toy_Chip/toy): makes pkg/sub/new.py, which is there already" in told


def test_an_edit_in_a_hunk_is_not_laid_on_upstream(git_tree: Path, series: Series) -> None:
    (git_tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 2\n", b"mine\n"))
    told = refusal(git_tree, series)
    assert "pkg/a.py was edited here" in told
    assert "| mine" in told
    assert "changed upstream by" not in told


def test_local_edits_are_stashed_and_told_of_at_the_revert(git_tree: Path, series: Series) -> None:
    (git_tree / "pkg" / "a.py").write_bytes(LINES + b"mine\n")
    (git_tree / "pkg" / "sub").mkdir()
    (git_tree / "pkg" / "sub" / "new.py").write_text("mine\n")
    outcome = apply_series(git_tree, [series], Options(stash=True))
    assert outcome.stash
    assert outcome.kept is None
    assert read_bytes(git_tree) == PATCHED
    told = revert_tree(git_tree).notes
    assert told == (f"earlier edits are kept in {outcome.stash}; `git apply` brings them back",)
    assert read_bytes(git_tree) == BASE
    assert git(git_tree, "status", "--porcelain") == ""
    git(git_tree, "apply", str(outcome.stash))
    assert (git_tree / "pkg" / "sub" / "new.py").read_text() == "mine\n"
    assert (git_tree / "pkg" / "a.py").read_bytes() == LINES + b"mine\n"


def test_what_upstream_does_not_know_cannot_be_stashed(tree: Path, series: Series) -> None:
    (tree / "pkg" / "a.py").write_bytes(LINES + b"mine\n")
    assert "is not the file that it was made for, though its hunks fit" in refusal(
        tree, series, options=Options(stash=True)
    )


def test_a_hunk_that_does_not_fit_is_shown_with_what_stands_there(tmp_path: Path, series: Series) -> None:
    tree = make_tree(tmp_path / "moved", BASE)
    commit_all(tree, "First release")
    (tree / "pkg" / "a.py").write_bytes(MOVED_LINES["pkg/a.py"])
    commit_all(tree, "Spell the sixth line")
    told = refusal(tree, series)
    assert "hunk 1 of 2, line 2 of pkg/a.py, expects" in told
    assert "      2 | line 2\n" in told
    assert "and finds, from line 5 on" in told
    assert "      9 | line six, by upstream\n" in told
    assert "Spell the sixth line" in told.split("changed upstream by ")[1]
    assert "hunk 2" not in told


def test_a_file_that_is_gone_is_told_with_the_commit_that_took_it(tmp_path: Path, series: Series) -> None:
    tree = make_tree(tmp_path / "gone", BASE)
    commit_all(tree, "First release")
    (tree / "pkg" / "a.py").unlink()
    commit_all(tree, "Drop a.py")
    told = refusal(tree, series)
    assert "there is no pkg/a.py; removed upstream by " in told
    assert told.rstrip().endswith("Drop a.py")


def test_all_patches_that_do_not_fit_are_told_at_once(tmp_path: Path, series: Series) -> None:
    tree = make_tree(tmp_path / "other", edited(pkg__a_dot_py=b"other\n", pkg__old_dot_py=b"other\n"))
    told = refusal(tree, series)
    assert "2 of 3 patches do not fit" in told
    assert "pkg/a.py.patch" in told
    assert "pkg/old.py.patch" in told


def test_another_release_is_taken_only_when_asked(tmp_path: Path, series: Series) -> None:
    tree = make_tree(tmp_path / "other", OTHER_RELEASE)
    assert "is not the file that it was made for, though its hunks fit; --3way takes them" in refusal(tree, series)
    outcome = apply_series(tree, [series], Options(find_base=make_find_base([])))
    assert "every hunk fits" in outcome.notes[0]
    assert b"line fifteen, by upstream" in read_bytes(tree)["pkg/a.py"]
    assert b"line twenty-five" in read_bytes(tree)["pkg/a.py"]
    assert read_state(tree).kind == "patched"
    revert_tree(tree)
    assert read_bytes(tree) == OTHER_RELEASE


def test_a_three_way_merge_with_a_base_from_history(tmp_path: Path, series: Series) -> None:
    """Upstream changed a line between two lines of a hunk's context: no hunk fits, and nothing is in conflict."""
    tree = make_tree(tmp_path / "merge", BASE)
    commit_all(tree, "First release")
    (tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 2\n", b"line two, by upstream\n"))
    commit_all(tree, "Second release")
    assert "does not fit" in refusal(tree, series)
    outcome = apply_series(tree, [series], Options(find_base=make_find_base([tree])))
    assert "pkg/a.py.patch: merged with its base" in outcome.notes
    made = read_bytes(tree)["pkg/a.py"]
    assert b"line two, by upstream\nline 3\nline 4\nline five\n" in made


def test_a_conflict_stays_a_refusal(tmp_path: Path, series: Series) -> None:
    tree = make_tree(tmp_path / "conflict", BASE)
    commit_all(tree, "First release")
    (tree / "pkg" / "a.py").write_bytes(LINES.replace(b"line 5\n", b"line V\n"))
    commit_all(tree, "Second release")
    told = refusal(tree, series, options=Options(find_base=make_find_base([tree])))
    assert "a three-way merge leaves 1 place open" in told


def test_partial_keeps_what_fits_and_writes_the_rest(tmp_path: Path, series: Series) -> None:
    files = edited(pkg__a_dot_py=LINES.replace(b"line 5\n", b"line V\n"), pkg__old_dot_py=b"other\n")
    tree = make_tree(tmp_path / "partial", files)
    outcome = apply_series(tree, [series], Options(partial=True))
    assert outcome.rejects == (
        "pkg/a.py.patch: 1 hunks left, see .flagscale-patch/rejects/pkg/a.py.patch",
        "pkg/old.py.patch: all of it left, see .flagscale-patch/rejects/pkg/old.py.patch",
    )
    made = read_bytes(tree)
    assert b"line V\n" in made["pkg/a.py"]
    assert b"line twenty-five\n" in made["pkg/a.py"]
    assert made["pkg/sub/new.py"] == b"new = True\n"
    reject = (tree / ".flagscale-patch" / "rejects" / "pkg" / "a.py.patch").read_text()
    assert reject.startswith("Why: to test\n")
    assert "-line 5\n+line five\n" in reject
    assert "twenty-five" not in reject
    revert_tree(tree)
    assert read_bytes(tree) == files


def test_a_merge_that_breaks_python_is_refused(tmp_path: Path) -> None:
    old = {"m.py": b"".join(b"x%d = 1\n" % n for n in range(20))}
    new = {"m.py": old["m.py"].replace(b"x9 = 1\n", b"if x8:\n    x9 = 2\n")}
    series = make_series(tmp_path, "Toy_Chip/toy", old, new)
    other = {"m.py": old["m.py"].replace(b"x0 = 1\n", b"def f():\n").replace(b"\nx", b"\n    x")}
    tree = make_tree(tmp_path / "tree", other)
    commit_all(tree, "another release")
    base = {hash_bytes(old["m.py"]): old["m.py"]}
    refusal(tree, series, options=Options(find_base=lambda _name, sha: base.get(sha)))


class TestLayers:
    def common(self, root: Path) -> Series:
        return make_series(root, "Common/toy", BASE, edited(pkg__a_dot_py=LINES.replace(b"line 5\n", b"line five\n")))

    def test_layers_over_different_files(self, tree: Path, tmp_path: Path) -> None:
        vendor = make_series(tmp_path, "Toy_Chip/toy", BASE, edited(pkg__b_dot_py=b"b = 1\n"))
        apply_series(tree, [self.common(tmp_path), vendor])
        assert b"line five" in read_bytes(tree)["pkg/a.py"]
        assert read_bytes(tree)["pkg/b.py"] == b"b = 1\n"
        assert read_state(tree).series == ("Common/toy", "Toy_Chip/toy")

    def test_a_vendors_patch_goes_over_the_common_one(self, tree: Path, tmp_path: Path) -> None:
        changed = edited(pkg__a_dot_py=LINES.replace(b"line 25\n", b"line XXV\n"))
        vendor = make_series(tmp_path, "Toy_Chip/toy", BASE, changed)
        outcome = apply_series(tree, [self.common(tmp_path), vendor])
        assert outcome.notes == ("pkg/a.py.patch of Toy_Chip/toy was applied over Common/toy",)
        made = read_bytes(tree)["pkg/a.py"]
        assert b"line five\n" in made
        assert b"line XXV\n" in made
        revert_tree(tree)
        assert read_bytes(tree) == BASE

    def test_a_vendors_patch_that_was_made_over_the_common_one(self, tree: Path, tmp_path: Path) -> None:
        common = self.common(tmp_path)
        middle = edited(pkg__a_dot_py=LINES.replace(b"line 5\n", b"line five\n"))
        last = edited(pkg__a_dot_py=LINES.replace(b"line 5\n", b"line 5!\n"))
        vendor = make_series(tmp_path, "Toy_Chip/toy", middle, last)
        outcome = apply_series(tree, [common, vendor])
        assert outcome.notes == ()
        assert read_bytes(tree) == last
        revert_tree(tree)
        assert read_bytes(tree) == BASE

    def test_layers_that_change_the_same_lines_are_refused_by_name(self, tree: Path, tmp_path: Path) -> None:
        changed = edited(pkg__a_dot_py=LINES.replace(b"line 5\n", b"line V\n"))
        vendor = make_series(tmp_path, "Toy_Chip/toy", BASE, changed)
        told = refusal(tree, self.common(tmp_path), vendor)
        assert "pkg/a.py.patch (Toy_Chip/toy): changes the lines of pkg/a.py that Common/toy changes" in told

    def test_a_file_that_the_lower_layer_makes_and_the_upper_renames(self, tree: Path, tmp_path: Path) -> None:
        middle = edited(pkg__made_dot_py=LINES)
        common = make_series(tmp_path, "Common/toy", BASE, middle)
        last = edited(pkg__renamed_dot_py=LINES + b"more\n")
        vendor = make_series(tmp_path, "Toy_Chip/toy", middle, last)
        apply_series(tree, [common, vendor])
        assert read_bytes(tree) == last
        revert_tree(tree)
        assert read_bytes(tree) == BASE


def test_a_result_that_the_series_does_not_promise_is_never_kept(tree: Path, series: Series) -> None:
    patch = dataclasses.replace(series.patches[0], result={"pkg/a.py": "0" * 64})
    lying = dataclasses.replace(series, patches=(patch, *series.patches[1:]))
    assert "not what the series promises, nothing was changed: pkg/a.py" in refusal(tree, lying)
    common = make_series(tree.parent, "Common/toy", BASE, edited(pkg__a_dot_py=LINES.replace(b"line 15\n", b"XV\n")))
    lying = dataclasses.replace(common, patches=(dataclasses.replace(common.patches[0], result={"pkg/a.py": "0"}),))
    assert "makes something else of pkg/a.py than the series promises" in refusal(tree, lying, series)


def test_a_file_in_the_way_of_a_file_that_comes_back(tree: Path, tmp_path: Path) -> None:
    series = make_series(tmp_path, "Toy_Chip/toy", BASE, edited(README=None, README__new=b"x\n"))
    apply_series(tree, [series])
    (tree / "README" / "mine.txt").write_text("mine\n")
    with pytest.raises(PatchError, match="README is in the way of an upstream file"):
        revert_tree(tree)
    assert (tree / "README" / "mine.txt").read_text() == "mine\n"
    (tree / "README" / "mine.txt").unlink()
    revert_tree(tree)
    assert read_bytes(tree) == BASE


def test_what_somebody_writes_meanwhile_is_kept(
    tree: Path, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is written into the old tree between its linking and the exchange."""

    def write_then_exchange(one: Path, other: Path) -> None:
        (tree / "late.txt").write_text("late\n")
        (tree / "README").unlink()
        (tree / "README").write_text("rewritten\n")
        exchange(one, other)

    monkeypatch.setattr("flagscale.patch.swap.exchange", write_then_exchange)
    outcome = apply_series(tree, [series])
    assert outcome.kept == tmp_path / "tree.kept-1"
    assert read_bytes(outcome.kept) == {"late.txt": b"late\n", "README": b"rewritten\n"}


def test_ctrl_c_when_the_trees_have_just_changed_places_loses_nothing(
    tree: Path, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange_and_interrupt(one: Path, other: Path) -> None:
        (tree / "late.txt").write_text("late\n")
        exchange(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr("flagscale.patch.swap.exchange", exchange_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_series(tree, [series])
    assert read_bytes(tree) == PATCHED
    assert read_bytes(tmp_path / "tree.kept-1") == {"late.txt": b"late\n"}
    assert not (tmp_path / ".tree.flagscale").exists()


@pytest.mark.parametrize("is_patched", [False, True])
def test_trees_that_cannot_change_places_leave_nothing_behind(
    is_patched: bool, tree: Path, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_patched:
        apply_series(tree, [series])
    before, beside = read_bytes(tree), sorted(tmp_path.iterdir())

    def refuse(_one: Path, _other: Path) -> None:
        raise PatchError("cannot be replaced in one step")

    monkeypatch.setattr("flagscale.patch.swap.exchange", refuse)
    with pytest.raises(PatchError, match="in one step"):
        revert_tree(tree) if is_patched else apply_series(tree, [series])
    assert read_bytes(tree) == before
    assert sorted(tmp_path.iterdir()) == beside


def test_a_mount_point_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(PatchError, match="cannot be replaced in one step"):
        exchange(tmp_path / "one", Path("/proc"))


def test_no_tree_and_no_room_to_build_one(tmp_path: Path, series: Series) -> None:
    for command in (lambda: apply_series(tmp_path / "none", [series]), lambda: revert_tree(tmp_path / "none")):
        with pytest.raises(PatchError, match="there is no such folder"):
            command()


def test_a_tree_that_is_reached_by_a_link(tree: Path, series: Series, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    apply_series(tmp_path / "link", [series])
    assert (tmp_path / "link").is_symlink()
    assert read_bytes(tree) == PATCHED


def test_a_record_that_cannot_be_read_is_told(tree: Path, series: Series) -> None:
    apply_series(tree, [series])
    record = tree / ".flagscale-patch" / "state.json"
    row = json.loads(record.read_text())
    record.write_text(json.dumps(row | {"version": 99}))
    with pytest.raises(PatchError, match="written by another version"):
        read_state(tree)
    record.write_text("{")
    with pytest.raises(PatchError, match="not a record of a patched tree"):
        revert_tree(tree)


def test_a_base_in_history(git_tree: Path) -> None:
    (git_tree / "pkg" / "a.py").write_text("second\n")
    commit_all(git_tree, "second")
    upstream = find_upstream(git_tree)
    assert upstream
    assert find_in_history(upstream, "pkg/a.py", hash_bytes(LINES)) == LINES
    assert find_in_history(upstream, "pkg/a.py", "0" * 64) is None
    assert find_in_history(upstream, "nothing", "0" * 64) is None
    find = make_find_base([], [lambda name: LINES if name == "pkg/a.py" else None])
    assert find("pkg/a.py", hash_bytes(LINES)) == LINES
    assert find("pkg/a.py", "0" * 64) is None


def test_a_file_beyond_a_symlink_is_none(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert read_content(tmp_path, "link/f") is None
    assert read_content(tmp_path, "real/f") == Content(0o100644, b"x")
    assert read_content(tmp_path, "real") is None
    assert HEADER.render().endswith("\n\n")
