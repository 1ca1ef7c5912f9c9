"""Writing a set of files whole: all of them, or none and nothing left behind.

Every file is first written beside its place, down to the disk, and only when all are there are they renamed. A full
disk or a folder that cannot be written is met in the first half, where undoing is deleting what is new.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import FlagScaleError, LaunchError, UserError

FEW_FILES, MOST_FLUSHES = 8, 16
_OUR_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class NewFile:
    """mode: as of chmod."""

    path: Path
    content: bytes
    mode: int = 0o644


def explain_os_error(path: Path, error: OSError) -> FlagScaleError:
    """What the user can do about a path that could not be written."""
    if error.errno in _OUR_FAULTS:
        return LaunchError(
            f"cannot write {path}: {os.strerror(error.errno or 0)}; nothing was started, nothing was left"
        )
    blocker = next((folder for folder in (path, *path.parents) if folder.exists() and not folder.is_dir()), None)
    if blocker is not None and error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"cannot write {path}: {blocker} is a file; expected a folder")
    return UserError(f"cannot write {path}: {error.strerror or error}; expected a folder that you may write")


def make_folder(path: Path, mode: int = 0o777) -> list[Path]:
    """Make `path` and its parents; returns the folders that are new, outermost first.

    Raises:
        UserError, LaunchError: naming the path.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=mode)
                made.append(folder)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except OSError as error:
        remove_folders(made)
        raise explain_os_error(path, error) from None
    return made


def remove_folders(folders: Sequence[Path]) -> None:
    """Remove those that are empty, innermost first."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _write_draft(file: NewFile, draft: Path) -> None:
    if file.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file.path))
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, file.mode)
    with os.fdopen(fd, "wb") as out:
        out.write(file.content)
        os.fchmod(fd, file.mode)


def _flush(path: Path) -> None:
    """Down to the disk, which may only then say that it is full."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flush_all(paths: Sequence[Path]) -> None:
    """At once, where there are many: a disk takes a hundred small files together in the time of a few."""
    if len(paths) <= FEW_FILES:
        for path in paths:
            _flush(path)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(MOST_FLUSHES) as pool:
        list(pool.map(_flush, paths))


@dataclass(frozen=True, slots=True)
class Written:
    """What a writing made that was not there before: all that undoing it takes away."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]

    def undo(self) -> None:
        for path in self.files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        remove_folders(self.folders)


def write_all(files: Sequence[NewFile], folders: Sequence[Path] = ()) -> Written:
    """Write every file and make every folder, or nothing.

    Raises:
        UserError: a path cannot be written by this user, or a file stands where a folder should.
        LaunchError: the disk is full.
    """
    made: list[Path] = []
    drafts: list[Path] = []
    new: list[Path] = []

    current = Path()
    try:
        for folder in (*(file.path.parent for file in files), *folders):
            made += make_folder(folder)
        for file in files:
            current = file.path
            drafts.append(file.path.with_name(f".{file.path.name}.{os.getpid()}.new"))
            _write_draft(file, drafts[-1])
        current = files[0].path.parent if files else current
        _flush_all(drafts)
        for file, draft in zip(files, drafts, strict=True):
            current = file.path
            if not file.path.exists():
                new.append(file.path)
            draft.replace(file.path)
    except OSError as error:
        Written((*drafts, *new), tuple(made)).undo()
        raise explain_os_error(current, error) from None
    except FlagScaleError:
        Written((*drafts, *new), tuple(made)).undo()
        raise
    return Written(tuple(new), tuple(made))


@contextlib.contextmanager
def hold_lock(exp_dir: Path) -> Iterator[None]:
    """Only one launch at a time looks at an experiment folder and writes into it.

    Raises:
        LaunchError: another launch is at it.
    """
    path = exp_dir / "runs" / "lock"
    make_folder(path.parent)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise explain_os_error(path, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LaunchError(
            f"another launch is writing into {exp_dir} at this moment; try again when it is done"
        ) from None
    finally:
        os.close(fd)
