"""A set of files is written whole or not at all, whatever stands in the way of whichever of them."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.errors import FlagScaleError
from flagscale.runner.launch.files import NewFile, write_all

NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "f/g/h", "f/g/i"])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@settings(max_examples=80, deadline=None)
@given(
    names=st.lists(NAMES, unique=True, min_size=1),
    old=st.lists(NAMES, unique=True),
    folders=st.lists(st.sampled_from(["a", "c", "f", "x/y"]), unique=True),
    blocked=st.lists(st.sampled_from(["a", "c", "c/d", "f", "f/g"]), unique=True, max_size=2),
)
def test_all_or_nothing(names: list[str], old: list[str], folders: list[str], blocked: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = Path(base)
        for name in blocked:  # a file where a folder may be wanted
            if not any(root.joinpath(name).parent.is_relative_to(root / other) for other in blocked if other != name):
                root.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
                root.joinpath(name).write_bytes(b"in the way")
        for name in old:
            path = root / name
            if not path.exists() and all(not parent.is_file() for parent in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"old")
        before = snapshot(root)
        files = [NewFile(root / name, name.encode()) for name in names]
        fault: FlagScaleError | None = None
        try:
            write_all(files, [root / name for name in folders])
        except FlagScaleError as error:
            fault = error
        if fault is not None:
            assert str(root) in str(fault)
            assert snapshot(root) == before
        else:
            after = snapshot(root)
            assert {name: after[name] for name in names} == {name: name.encode() for name in names}
            assert all((root / name).is_dir() for name in folders)
            written = {*names, *folders, *(str(up) for name in (*names, *folders) for up in Path(name).parents)}
            assert {name: after[name] for name in set(after) - written} == {
                name: before[name] for name in set(before) - written
            }
