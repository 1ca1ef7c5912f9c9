"""Trees and patch sets that tests of flagscale/patch share."""

import os
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flagscale.patch.export import export_series
from flagscale.patch.series import Header, Series, load_series
from flagscale.patch.tree import Content, list_files, read_content, write_content
from flagscale.patch.upstream import of_folder

HEADER = Header("to test", "by an edit", "none: a test", "the test is gone")
Files = Mapping[str, Content | bytes]

LINES = "".join(f"line {number}\n" for number in range(1, 31)).encode()
BASE: dict[str, bytes] = {
    "pkg/__init__.py": b"",
    "pkg/a.py": LINES,
    "pkg/b.py": b"def first():\n    return 1\n\n\ndef second():\n    return first()\n",
    "pkg/old.py": b"gone = True\n",
    "README": b"read me\n",
}


def edited(**changes: bytes | None) -> dict[str, bytes]:
    """BASE with other files; a name is written with `__` for `/` and `_dot_` for `.`; None deletes."""
    files = dict(BASE)
    for key, data in changes.items():
        name = key.replace("__", "/").replace("_dot_", ".")
        files.pop(name, None)
        files |= {} if data is None else {name: data}
    return files


PATCHED = edited(
    pkg__a_dot_py=LINES.replace(b"line 5\n", b"line five\n").replace(b"line 25\n", b"line twenty-five\n"),
    pkg__old_dot_py=None,
    pkg__sub__new_dot_py=b"new = True\n",
)


def make_tree(path: Path, files: Files) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        write_content(path / name, Content(0o100644, content) if isinstance(content, bytes) else content)
    return path


def read_tree(path: Path) -> dict[str, Content]:
    return {name: content for name, _ in list_files(path) if (content := read_content(path, name))}


def read_bytes(path: Path) -> dict[str, bytes]:
    return {name: content.data for name, content in read_tree(path).items()}


def make_series(root: Path, name: str, old: Files, new: Files, header: Header = HEADER, version: str = "1.0") -> Series:
    """A patch set in `<root>/hardware/<name>` that makes `new` of `old`."""
    number = len(list(root.glob("made-*")))
    made = root / f"made-{number}"
    pristine, changed = make_tree(made / "old", old), make_tree(made / "new", new)
    folder = root / "hardware" / name
    export_series(changed, folder, Series(name, name.split("/")[-1], version, "none"), of_folder(pristine), (), header)
    return load_series(folder)


def snapshot(tree: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything of a tree but our record, folders and caches too: mode, inode, time of change, content."""
    found = {}
    for path in sorted([tree, *tree.rglob("*")]):
        if path == tree / ".flagscale-patch" or tree / ".flagscale-patch" in path.parents:
            continue
        seen = path.lstat()
        data = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        times = (0, 0) if stat.S_ISDIR(seen.st_mode) else (seen.st_ino, seen.st_mtime_ns)
        found[str(path.relative_to(tree))] = (seen.st_mode, *times, data)
    return found


def git(tree: Path, *words: str) -> str:
    """A git command in a tree, as somebody with a name."""
    command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main", *words]
    return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout


def commit_all(tree: Path, subject: str) -> None:
    if not (tree / ".git").exists():
        git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", subject)
