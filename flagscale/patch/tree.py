"""The files of a tree as patches see them: a git mode and content, whatever bytes their names are.

Names are `str` with undecodable bytes kept as surrogates (`os.fsdecode`), relative to the tree, with `/`. Directories,
owners and permissions other than "may be executed" are no part of a patch; caches that Python and compilers make are
no part of the source.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
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
    path = tree / name
    try:
        mode = git_mode(path.lstat().st_mode)
        if mode is None or any((tree / above).is_symlink() for above in Path(name).parents[:-1]):
            return None
        return Content(mode, os.fsencode(path.readlink()) if mode == SYMLINK else path.read_bytes())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


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
