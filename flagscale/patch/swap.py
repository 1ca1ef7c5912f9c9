"""A new tree in place of an old one, in one step of the kernel.

The new tree is built beside the old one from hard links, so it costs one link a file and no copy, and is exchanged with
it by renameat2(RENAME_EXCHANGE): whoever opens a path finds the old tree or the new one, and a kill at any moment
leaves one of them, with at most a work folder `.<name>.flagscale` beside it, which the next command removes. A journal
of single files would need no second tree, but between its first file and its last a reader reads a mixture.

The price: tree and work folder must lie on one Linux file system that can exchange folders (ext4, xfs, btrfs, tmpfs;
not NFS, and not a folder in a lower layer of an overlay), and a shell that stands in the tree has to enter it anew.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.state import Record, load_record
from flagscale.patch.tree import CACHE_DIR, STATE_DIR, Digest, read_digest

AT_FDCWD = -100
RENAME_EXCHANGE = 2
BUILDING = "building"
BASE_DIR = f"{STATE_DIR}/base"

Linked = dict[str, os.stat_result]
"""Files of a tree that a new one has too, by the very inode, with what they were when that was made."""

Seen = dict[str, tuple[int, int]]
"""Inode and time of the last change (of content or anything else) of files."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A tree that nobody else patches: `lock` is open as long as we, or a git that we started, are at work."""

    tree: Path
    lock: int

    @property
    def work(self) -> Path:
        return self.tree.parent / f".{self.tree.name}.flagscale"


@contextmanager
def hold_tree(tree: Path) -> Iterator[Hold]:
    """Wait until nobody else patches a tree of that folder, and remove what a killed command left.

    The lock is on the folder above the tree; the kernel lets go of it when its last holder dies.

    Raises:
        PatchError: the folder above cannot be written to.
    """
    tree = tree.resolve()
    if not os.access(tree.parent, os.W_OK):
        raise PatchError(f"{tree.parent}: cannot be written to, and the new tree is built there, beside the old one")
    lock = os.open(tree.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hold = Hold(tree, lock)
        remove_leftovers(hold)
        yield hold
    except PermissionError as error:
        raise PatchError(f"{error.filename}: {error.strerror}; nothing was changed") from None
    finally:
        os.close(lock)


def walk(tree: Path) -> tuple[list[str], dict[str, "os.DirEntry[str]"]]:
    """The folders (outermost first) and the files of a tree, all of them but those of `.flagscale-patch`.

    Here and below, paths are plain strings: it is all done for thousands of files.
    """
    folders: list[str] = []
    files: dict[str, os.DirEntry[str]] = {}
    todo = [""]
    while todo:
        below = todo.pop()
        with os.scandir(f"{tree}/{below}") as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                if name == STATE_DIR:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    todo.append(name + "/")
                else:
                    files[name] = entry
    return folders, files


def link_file(src: str, dst: str) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(src, dst, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copy2(src, dst, follow_symlinks=False)


def link_tree(src: Path, dst: Path, is_left: Callable[[str], bool]) -> tuple[list[str], Linked]:
    """Make `dst`, with the folders of `src` and with links to its files but those that are left out.

    Returns the folders, outermost first, and the files that were linked.
    """
    linked: Linked = {}
    folders, files = walk(src)
    dst.mkdir()
    start, end = f"{src}/", f"{dst}/"
    for name in folders:
        os.mkdir(end + name)  # noqa: PTH102
    for name, entry in files.items():
        if not is_left(name):
            linked[name] = entry.stat(follow_symlinks=False)
            link_file(start + name, end + name)
    return folders, linked


def copy_folder_modes(src: Path, dst: Path, folders: Iterable[str]) -> None:
    """Give folders of `dst` the modes of `src`; times stay, because Python's importer looks for news by them."""
    old, new = str(src), str(dst)
    for name in ("", *folders):
        wanted = stat.S_IMODE(os.stat(f"{old}/{name}").st_mode)  # noqa: PTH116
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_IMODE(os.stat(f"{new}/{name}/").st_mode) != wanted:  # noqa: PTH116
                os.chmod(f"{new}/{name}/", wanted)  # noqa: PTH101


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places, in one step.

    Raises:
        PatchError: this system or this file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise PatchError("exchanging two folders needs Linux with glibc 2.28 or newer")
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    why = {
        errno.EBUSY: "it is a mount point",
        errno.EXDEV: "it lies in a lower layer of an overlay file system",
        errno.EINVAL: "its file system cannot exchange folders",
    }.get(code, os.strerror(code))
    raise PatchError(
        f"{other}: cannot be replaced in one step: {why}. Nothing was changed. Copy the folder to a place of its own "
        "on a local disk (`cp -a`), or in an image build put a copy into its place in a layer before this one."
    )


@contextmanager
def rebuild(hold: Hold) -> Iterator[Path]:
    """Yield the path at which to build the new tree; it takes the old one's place if the block ends without error."""
    fresh = hold.work / "tree"
    hold.work.mkdir()
    with contextlib.ExitStack() as undo:
        # it looks which of the trees is there: Ctrl-C may come when they have just changed places
        undo.callback(remove_leftovers, hold)
        (hold.work / BUILDING).touch()
        yield fresh
        (hold.work / BUILDING).unlink()
        exchange(fresh, hold.tree)
        undo.pop_all()


def _remove_tree(folder: Path) -> None:
    """Remove a folder of ours, also where folders in it are write-protected."""
    _open_folders(folder, walk(folder)[0])
    shutil.rmtree(folder)


def _open_folders(top: Path, folders: Iterable[str]) -> None:
    start = str(top)
    for name in ("", *folders):
        if not os.access(f"{start}/{name}", os.W_OK | os.X_OK):
            (top / name).chmod(0o700)


def remove_old(hold: Hold, linked: Linked, made: Callable[[str], bool]) -> Path | None:
    """Remove the tree whose place was taken; what is in no other place is kept, and the path to it returned.

    A file goes if the new tree has it too (the very inode, or a copy), or if `made(name)` says that it is of our
    making. Any other was written into the old tree while the new one was built.

    linked: what is known to be in the new tree; other files are looked up there
    """
    old = hold.work / "tree"
    folders, files = walk(old)
    base = hold.tree / BASE_DIR
    kept_inodes = {entry.inode() for entry in os.scandir(base)} if base.is_dir() else set()
    has_copy = _make_has_copy(old, hold.tree)
    _open_folders(old, folders)
    start = str(old)
    for name, entry in files.items():
        inode = entry.inode()
        is_linked = inode in kept_inodes or (name in linked and inode == linked[name].st_ino)
        if is_linked or made(name) or has_copy(name):
            os.unlink(f"{start}/{name}")  # noqa: PTH108
    for name in reversed(folders):
        with contextlib.suppress(OSError):  # what is kept is in it
            os.rmdir(f"{start}/{name}")  # noqa: PTH106
    if (old / STATE_DIR).exists():
        _remove_tree(old / STATE_DIR)
    kept = None
    if any(old.iterdir()):
        numbers = (number for number in range(1, 1_000_000))
        kept = next(p for n in numbers if not (p := hold.tree.parent / f"{hold.tree.name}.kept-{n}").exists())
        old.rename(kept)
    else:
        old.rmdir()
    hold.work.rmdir()
    return kept


def _make_has_copy(old: Path, new: Path) -> Callable[[str], bool]:
    """Whether the new tree has a file of the old one: under its name, or among those that it keeps."""

    @functools.cache
    def kept() -> set[Digest | None]:
        base = new / BASE_DIR
        return {read_digest(base, path.name) for path in base.iterdir()} - {None} if base.is_dir() else set()

    def has_copy(name: str) -> bool:
        found = read_digest(old, name)
        return found is not None and (found == read_digest(new, name) or found in kept())

    return has_copy


def remove_leftovers(hold: Hold) -> None:
    """Remove what a killed command left beside the tree."""
    if not hold.work.exists():
        return
    if not (hold.work / "tree").exists() or (hold.work / BUILDING).exists():
        _remove_tree(hold.work)
        return
    remove_old(hold, {}, made_by_record(hold.work / "tree"))


def see_results(tree: Path, record: Record | None) -> Seen:
    """What the touched files are now, to know later that they are still what they were compared as."""
    found = {}
    start = str(tree)
    for name in record.touched if record else ():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            now = os.lstat(f"{start}/{name}")
            found[name] = (now.st_ino, now.st_ctime_ns)
    return found


def made_by_record(old: Path, seen: Seen | None = None) -> Callable[[str], bool]:
    """Whether a file of a tree is of our making: what its record says was made, or a cache of that.

    seen: files that were found to be what the record says
    """
    record = load_record(old)
    touched = record.touched if record else {}
    start = str(old)

    def made(name: str) -> bool:
        if name not in touched:
            return cached_source(name) in touched
        if seen and name in seen:
            now = os.lstat(f"{start}/{name}")
            if seen[name] == (now.st_ino, now.st_ctime_ns):
                return True
        return read_digest(old, name) == touched[name].result

    return made


def cached_source(name: str) -> str | None:
    """`a/b.py` for `a/__pycache__/b.cpython-311.pyc`, what Python keeps of it; None for any other file."""
    folder, slash, cache = name.rpartition(f"{CACHE_DIR}/")
    return f"{folder}{cache.partition('.')[0]}.py" if slash and cache.endswith(".pyc") else None


def caches_of(tree: Path, names: Set[str]) -> list[str]:
    """The caches that lie in the tree for the Python files of these names."""
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".py")}
    found = []
    for folder in sorted(folders):
        below = f"{folder}/{CACHE_DIR}" if folder else CACHE_DIR
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found += [f"{below}/{cache}" for cache in sorted(os.listdir(f"{tree}/{below}"))]  # noqa: PTH208
    return [name for name in found if cached_source(name) in names]
