"""The files of a tree as patches see them: a git mode and content, whatever bytes their names are.

Names are `str` with undecodable bytes kept as surrogates (`os.fsdecode`), relative to the tree, with `/`. Directories,
owners and permissions other than "may be executed" are no part of a patch; caches that Python and compilers make are
no part of the source.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

STATE_DIR = ".flagscale-patch"
"""The folder in a patched tree that holds its record and the files as they were."""

SOURCE_MANIFEST = ".flagscale-source.json"
"""What `flagscale source fetch` leaves in a tree."""

OWN_NAMES = frozenset({STATE_DIR, SOURCE_MANIFEST, ".git"})
CACHE_DIR = "__pycache__"
DERIVED_SUFFIXES = (".pyc", ".so")

REGULAR, EXECUTABLE, SYMLINK = 0o100644, 0o100755, 0o120000


@dataclass(frozen=True, slots=True)
class Content:
    """A file: its git mode (0o100644, 0o100755, 0o120000) and its bytes; of a symlink, where it points."""

    mode: int
    data: bytes

    @property
    def digest(self) -> "Digest":
        return Digest(self.mode, hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True, slots=True)
class Digest:
    """A file known by its git mode and the SHA-256 of its content."""

    mode: int
    sha256: str


def git_mode(mode: int) -> int | None:
    """The git mode of an `st_mode`, or None for what git does not keep (directories, sockets, ..)."""
    if stat.S_ISLNK(mode):
        return SYMLINK
    if stat.S_ISREG(mode):
        return EXECUTABLE if mode & 0o100 else REGULAR
    return None


def read_content(tree: Path, name: str) -> Content | None:
    """The file of a tree; None where there is no file or symlink of that name, or only beyond a symlink."""
    return read_contents(tree, [name]).get(name)


def read_contents(tree: Path, names: Iterable[str]) -> dict[str, Content]:
    """Those of the files that are there: see `read_content`. Strings and bare calls, for there may be thousands."""
    found: dict[str, Content] = {}
    folders: set[str] = set()
    top = str(tree)
    for name in names:
        try:
            if not _is_beyond_link(top, name, folders) and (content := _read(f"{top}/{name}")):
                found[name] = content
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
    return found


def _read(path: str) -> Content | None:
    mode = git_mode(os.lstat(path).st_mode)
    if mode is None:
        return None
    if mode == SYMLINK:
        return Content(mode, os.fsencode(os.readlink(path)))  # noqa: PTH115
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return Content(mode, file.readall())


def _is_beyond_link(tree: str, name: str, folders: set[str]) -> bool:
    """Whether a folder above the file is a symlink; `folders` are known to be none, and grow."""
    above = name.rpartition("/")[0]
    while above and above not in folders:
        if stat.S_ISLNK(os.lstat(f"{tree}/{above}").st_mode):
            return True
        folders.add(above)
        above = above.rpartition("/")[0]
    return False


def read_digest(tree: Path, name: str) -> Digest | None:
    content = read_content(tree, name)
    return content.digest if content else None


def write_content(path: Path, content: Content) -> None:
    """Make the file at `path`, where there is none, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content.mode == SYMLINK:
        path.symlink_to(os.fsdecode(content.data))
        return
    with path.open("xb") as file:
        file.write(content.data)
    if content.mode == EXECUTABLE:
        path.chmod(path.stat().st_mode | 0o111)


def folders_above(names: Iterable[str]) -> set[str]:
    """Every folder that a file of these names lies in."""
    found: set[str] = set()
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found


def is_derived(name: str) -> bool:
    """Whether a file is a cache or a product of an interpreter or a compiler."""
    return name.endswith(DERIVED_SUFFIXES) or CACHE_DIR in name.split("/")


def list_files(tree: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """(name, lstat) of every file of the source: without caches, git's folder and what is ours."""
    with os.scandir(tree / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if name in OWN_NAMES or entry.name == CACHE_DIR:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from list_files(tree, name + "/")
            elif not entry.name.endswith(DERIVED_SUFFIXES):
                yield name, entry.stat(follow_symlinks=False)
