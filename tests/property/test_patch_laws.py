"""Laws of patches over random trees and random edits of every kind.

Export then apply is identity; apply then revert is identity, byte for byte; twice is once.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_sets import HEADER, make_tree, read_tree, snapshot

from flagscale.patch.apply import apply_series, revert_tree
from flagscale.patch.export import export_series
from flagscale.patch.git import make_diffs, try_patches
from flagscale.patch.series import Series, load_series
from flagscale.patch.state import read_state
from flagscale.patch.tree import EXECUTABLE, REGULAR, SYMLINK, Content
from flagscale.patch.upstream import of_folder

DRAFT = Series("Toy_Chip/toy", "toy", "1.0", "none")

PARTS = st.sampled_from([
    b"a", b"b.py", b"c d", b"\xff\xfe", "ü".encode(), b'q"u', b"tab\t", b"back\\slash", b"new\nline", b"-x",
    b"a.patch", b"series.yaml", b"b.py.rej", b".gitignore", b".gitattributes", b"git~1", b"%s", b"con", b"'", b" lead",
])  # fmt: skip
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(lambda parts: os.fsdecode(b"/".join(parts)))
LINES = st.sampled_from([
    b"", b"one", b"two", b"  three", "vier ä".encode(), b"\xe9 latin", b"@@ -1 +1 @@", b"--- a/x",
    b"diff --git a/x b/x", b"-- ", b"* text eol=crlf",
])  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n", b"\r"])
TEXTS = st.builds(
    lambda rows, tail: b"".join(line + end for line, end in rows) + tail,
    st.lists(st.tuples(LINES, ENDS), max_size=12),
    st.sampled_from([b"", b"no end of line"]),
)
BINARY = st.binary(max_size=40).map(lambda data: b"\0" + data)
TARGETS = st.sampled_from(
    [b"gone", b"../gone", b"/nowhere", b"\xff"]
)  # git cannot make a folder of a link that is a loop
CONTENTS = st.one_of(
    st.builds(Content, st.sampled_from([REGULAR, REGULAR, EXECUTABLE]), st.one_of(TEXTS, TEXTS, BINARY)),
    st.builds(Content, st.just(SYMLINK), TARGETS),
)
Files = dict[str, Content]


def without_clashes(files: Files) -> Files:
    """Leave out a file whose name is a folder of another's."""
    folders = {str(above) for name in files for above in Path(name).parents}
    return {name: content for name, content in files.items() if name not in folders}


TREES = st.dictionaries(NAMES, CONTENTS, max_size=8).map(without_clashes)


@st.composite
def edits(draw: st.DrawFn) -> tuple[Files, Files]:
    """A tree before and after somebody's edits; files that were not edited stay."""
    old = draw(TREES)
    new = dict(old)
    for name in sorted(old):
        kind = draw(st.sampled_from(["keep", "keep", "delete", "replace", "append", "mode", "move"]))
        was = old[name]
        if kind == "delete":
            del new[name]
        elif kind == "replace":
            new[name] = draw(CONTENTS)
        elif kind == "append" and was.mode != SYMLINK:
            new[name] = Content(was.mode, was.data + draw(TEXTS))
        elif kind == "mode" and was.mode != SYMLINK:
            new[name] = Content(EXECUTABLE if was.mode == REGULAR else REGULAR, was.data)
        elif kind == "move":
            new[draw(NAMES)] = new.pop(name)
    new |= draw(st.dictionaries(NAMES, CONTENTS, max_size=3))
    return old, without_clashes(new)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(edits())
def test_diffs_make_the_new_files_of_the_old_and_the_old_of_the_new(pair: tuple[Files, Files]) -> None:
    old, new = pair
    diffs = make_diffs(old, new)
    forth = try_patches(old, diffs)
    assert (forth.results, forth.rejected) == (new, {})
    back = try_patches(new, diffs, reverse=True)
    assert (back.results, back.rejected) == (old, {})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(edits())
def test_export_then_apply_and_apply_then_revert_are_identity(place: Path, pair: tuple[Files, Files]) -> None:
    old, new = pair
    root = Path(tempfile.mkdtemp(dir=place))
    pristine, edited = make_tree(root / "pristine", old), make_tree(root / "edited", new)
    tree = shutil.copytree(pristine, root / "tree", symlinks=True)
    folder = root / "hardware" / "Toy_Chip" / "toy"
    if old == new:
        return
    export_series(edited, folder, DRAFT, of_folder(pristine), header=HEADER)
    series = load_series(folder)
    before = snapshot(tree)

    assert apply_series(tree, [series]).changed
    assert read_tree(tree) == new
    assert read_state(tree).kind == "patched"
    patched = snapshot(tree)
    assert not apply_series(tree, [series]).changed
    assert snapshot(tree) == patched

    assert revert_tree(tree).changed
    assert snapshot(tree) == before
    assert not revert_tree(tree).changed
    assert sorted(path.name for path in root.iterdir()) == ["edited", "hardware", "pristine", "tree"]
    shutil.rmtree(root)
