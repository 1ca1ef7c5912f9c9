"""A backend's source tree: fetched at its pin, checked, kept beside the pin, and known to be untouched or not.

The tree is a fetched archive of the package index and no submodule: a checkout stays small, a fetch needs no account,
and what is on disk can be compared, file by file, with what the pin promises. A manifest of our own
(`.flagscale-source.json`) makes the second fetch free and an edit visible, also where git ignores the file.

Whatever moment a fetch is cut off at, the folder holds either the tree it held before, or the new one, or nothing.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.errors import SourceError
from flagscale.patch.extension import Extension, build_extension
from flagscale.patch.gittree import archive_commit, commit_upstream, find_git
from flagscale.patch.index import Progress, download, ignore_progress
from flagscale.patch.pins import Pin
from flagscale.patch.unpack import DERIVED_SUFFIXES, unpack

MANIFEST = ".flagscale-source.json"
MANIFEST_VERSION = 1
IGNORED = (MANIFEST, ".flagscale-patch/", "__pycache__/", *(f"*{suffix}" for suffix in DERIVED_SUFFIXES))
"""What git is told not to look at in a tree: what we, an interpreter or a compiler put there."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What lies in the folder.

    state: absent; ready; unbuilt (a C++ module is missing for this Python); drifted (not what the pin promises)
    changed: what differs, each with how: `megatron/core/utils.py (edited)`
    other_pin: the files are those of a pin that the backend had before
    commit: of the git tree; the same on every machine that fetched this pin
    """

    state: Literal["absent", "ready", "unbuilt", "drifted"]
    changed: tuple[str, ...] = ()
    other_pin: bool = False
    commit: str = ""


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(tree: Path) -> Iterator[Path]:
    """Every file of the source: without git's folder, and what we, Python and the compiler leave."""
    for folder, below, names in os.walk(tree):
        below[:] = sorted(set(below) - {".git", "__pycache__"})
        for name in sorted(names):
            if name != MANIFEST and not name.endswith(DERIVED_SUFFIXES):
                yield Path(folder, name)


def _hash_link(path: Path) -> str:
    return "link to " + os.readlink(path)  # noqa: PTH115  (a Path would drop a final slash)


def _hash_tree(tree: Path) -> dict[str, str]:
    """Path below `tree` -> SHA-256, or where a link points."""
    return {
        path.relative_to(tree).as_posix(): _hash_link(path) if path.is_symlink() else hash_file(path)
        for path in _list_files(tree)
    }


def load_manifest(dest_dir: Path) -> dict[str, Any] | None:
    """What a fetch has written into a tree; None where there is none that this release can read."""
    try:
        manifest: dict[str, Any] = json.loads((dest_dir / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("version") == MANIFEST_VERSION else None


def _write_manifest(dest_dir: Path, pin: Pin, commit: str, files: dict[str, str], built: dict[str, str]) -> None:
    row = {"version": MANIFEST_VERSION, "pin": pin.digest, "commit": commit, "files": files, "built": built}
    part = dest_dir / (MANIFEST + ".part")
    part.write_text(json.dumps(row, indent=1, sort_keys=True) + "\n")
    part.replace(dest_dir / MANIFEST)


def _differences(promised: dict[str, str], present: dict[str, str]) -> tuple[str, ...]:
    words = dict.fromkeys(present.keys() - promised.keys(), "added")
    words |= dict.fromkeys(promised.keys() - present.keys(), "missing")
    words |= {name: "edited" for name in promised.keys() & present.keys() if promised[name] != present[name]}
    return tuple(f"{name} ({words[name]})" for name in sorted(words))


def source_status(pin: Pin, dest_dir: Path) -> SourceStatus:
    """Compare the folder with the pin: every file is hashed, which takes a tenth of a second for Megatron-LM."""
    if not dest_dir.is_dir() or not any(dest_dir.iterdir()):
        return SourceStatus("absent")
    manifest = load_manifest(dest_dir)
    if manifest is None:
        return SourceStatus("drifted", (f"{MANIFEST} (missing: not fetched by this toolkit)",))
    changed = _differences(manifest["files"], _hash_tree(dest_dir))
    if manifest["pin"] != pin.digest:
        return SourceStatus("drifted", changed, other_pin=True)
    commit: str = manifest["commit"]
    if changed:
        return SourceStatus("drifted", changed, commit=commit)
    unbuilt = tuple(f"{ext.built_path} (not built)" for ext in pin.extensions if not _is_built(ext, dest_dir, manifest))
    return SourceStatus("unbuilt" if unbuilt else "ready", unbuilt, commit=commit)


def _is_built(extension: Extension, dest_dir: Path, manifest: dict[str, Any]) -> bool:
    built = dest_dir / extension.built_path
    return built.is_file() and manifest["built"].get(extension.built_path) == hash_file(built)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when the holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bring_archive(pin: Pin, folder: Path, progress: Progress) -> Path:
    """The checked archive in `folder`: what lies there is used if its hash is right."""
    archive = folder / pin.archive
    if archive.is_file() and hash_file(archive) == pin.sha256:
        return archive
    part = folder / f".{pin.archive}.part"
    try:
        download(pin.project, pin.version, pin.archive, part, progress)
        found = hash_file(part)
        if found != pin.sha256:
            raise SourceError(
                f"{pin.archive} is not the pinned one: its SHA-256 is {found} ({part.stat().st_size} bytes), "
                f"expected {pin.sha256} ({pin.size_bytes} bytes)"
            )
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
    return archive


def _bring_commit(pin: Pin, repository: str, folder: Path, progress: Progress) -> Path:
    """The files of the pinned commit as an archive in `folder`."""
    if pin.commit is None:
        raise SourceError(
            f"the pin of {pin.name} does not say which commit {pin.version} is, so that no repository can be checked "
            "against it: fetch without --from-git"
        )
    archive = folder / f".{pin.name}.tar.part"
    progress("download", 0, 1)
    archive_commit(repository, pin.commit, pin.tag, archive)
    progress("download", 1, 1)
    return archive


def _build(pin: Pin, tree: Path, progress: Progress) -> dict[str, str]:
    built: dict[str, str] = {}
    for done, extension in enumerate(pin.extensions):
        progress("build", done, len(pin.extensions))
        built[extension.built_path] = build_extension(extension, tree, pin.project)
    progress("build", len(pin.extensions), len(pin.extensions))
    return built


def _remove_leftovers(folder: Path) -> None:
    """What a fetch that was cut off has left; nobody else is at work here, for we hold the lock."""
    for pattern in (".new-*", ".old-src*", ".build-*", ".*.part"):
        for path in sorted(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_to_overwrite(status: SourceStatus, dest_dir: Path) -> None:
    shown = "\n  ".join(status.changed[:10])
    more = f"\n  and {len(status.changed) - 10} more" if len(status.changed) > 10 else ""
    raise SourceError(
        f"{dest_dir} was changed since it was fetched:\n  {shown}{more}\n"
        "Keep your changes elsewhere, then fetch with --replace to discard them."
    )


def fetch_source(
    pin: Pin,
    dest_dir: Path,
    progress: Progress = ignore_progress,
    replace: bool = False,
    repository: str | None = None,
) -> Path:
    """Make `dest_dir` hold the pinned source, ready to be put on PYTHONPATH, and return it.

    What is there and right is kept; a tree of an older pin is replaced if nobody touched it.

    progress: called with (step, done, total), the step one of download, unpack, commit, build
    replace: discard a tree that someone has changed
    repository: of git, to take the pinned commit from, in place of the archive of the package index

    Raises:
        SourceError: the archive or the commit cannot be had or is not the pinned one, a module cannot be built, or
            someone has changed the tree.
    """
    find_git()
    folder = dest_dir.parent
    with one_at_a_time(folder):
        _remove_leftovers(folder)
        status = source_status(pin, dest_dir)
        if status.state == "ready":
            return dest_dir
        if status.state == "unbuilt":
            manifest = load_manifest(dest_dir) or {}
            built = manifest["built"] | _build(pin, dest_dir, progress)
            _write_manifest(dest_dir, pin, status.commit, manifest["files"], built)
            return dest_dir
        if status.changed and not replace:
            _refuse_to_overwrite(status, dest_dir)
        if repository is None:
            source, archive = pin, _bring_archive(pin, folder, progress)
        else:
            archive = _bring_commit(pin, repository, folder, progress)
            source = dataclasses.replace(pin, top="", archive=archive.name)
        fresh = folder / ".new-src"
        fresh.mkdir()
        unpack(source, archive, fresh, progress)
        progress("commit", 0, 1)
        commit = commit_upstream(fresh, f"{pin.project} {pin.version}", IGNORED)
        progress("commit", 1, 1)
        _write_manifest(fresh, pin, commit, _hash_tree(fresh), _build(pin, fresh, progress))
        if dest_dir.exists():
            dest_dir.rename(folder / ".old-src")
        fresh.rename(dest_dir)
        _remove_leftovers(folder)
    return dest_dir
