"""A backend's source tree: fetched at its pin, checked, kept beside the pin, and known to be untouched or not.

The tree is a fetched archive of the package index and no submodule: a checkout stays small, a fetch needs neither git
nor an account, and what is on disk can be compared, file by file, with what the pin promises. The price is a manifest
of our own (`.flagscale-source.json`), which is what makes the second fetch free and an edit visible.

Whatever moment a fetch is cut off at, the folder holds either the tree it held before, or the new one, or nothing.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.errors import SourceError
from flagscale.patch.extension import Extension, build_extension
from flagscale.patch.index import Progress, download, ignore_progress

MANIFEST = ".flagscale-source.json"
MANIFEST_VERSION = 1
SUFFIXES_OF_PYTHON = (".pyc", ".so")


@dataclass(frozen=True, slots=True)
class Pin:
    """Which source a backend is, down to the byte.

    sha256, size_bytes: of the archive
    commit: upstream's, where it is known
    unpack: the folders of the archive that are put on the path
    """

    name: str
    repository: str
    tag: str
    project: str
    version: str
    archive: str
    sha256: str
    size_bytes: int
    unpack: tuple[str, ...]
    commit: str | None = None
    extensions: tuple[Extension, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What lies in the folder.

    state: absent; ready; unbuilt (a C++ module is missing for this Python); drifted (not what the pin promises)
    changed: what differs, each with how: `megatron/core/utils.py (edited)`
    other_pin: the files are those of a pin that the backend had before
    """

    state: Literal["absent", "ready", "unbuilt", "drifted"]
    changed: tuple[str, ...] = ()
    other_pin: bool = False


def load_pin(path: Path) -> Pin:
    """Read a pin.yaml.

    Raises:
        SourceError: there is none, or it lacks or misnames a field.
    """
    import yaml

    try:
        row: dict[str, Any] = yaml.safe_load(path.read_text())
        extensions = tuple(
            Extension(**{**extension, "sources": tuple(extension["sources"])})
            for extension in row.pop("extensions", ())
        )
        return Pin(**{**row, "unpack": tuple(row["unpack"]), "extensions": extensions})
    except FileNotFoundError:
        raise SourceError(f"{path}: no such pin") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{path}: not a pin: {error}") from None


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_tree(tree: Path) -> dict[str, str]:
    """Path below `tree` -> SHA-256, without what Python and the compiler leave."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and path.suffix not in SUFFIXES_OF_PYTHON)
    return {path.relative_to(tree).as_posix(): hash_file(path) for path in files if path.name != MANIFEST}


def _load_manifest(dest_dir: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((dest_dir / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("version") == MANIFEST_VERSION else None


def _write_manifest(dest_dir: Path, pin_digest: str, files: dict[str, str], built: dict[str, str]) -> None:
    row = {"version": MANIFEST_VERSION, "pin": pin_digest, "files": files, "built": built}
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
    manifest = _load_manifest(dest_dir)
    if manifest is None:
        return SourceStatus("drifted", (f"{MANIFEST} (missing: not fetched by this toolkit)",))
    changed = _differences(manifest["files"], _hash_tree(dest_dir))
    if manifest["pin"] != pin.digest:
        return SourceStatus("drifted", changed, other_pin=True)
    if changed:
        return SourceStatus("drifted", changed)
    unbuilt = tuple(f"{ext.built_path} (not built)" for ext in pin.extensions if not _is_built(ext, dest_dir, manifest))
    return SourceStatus("unbuilt", unbuilt) if unbuilt else SourceStatus("ready")


def _is_built(extension: Extension, dest_dir: Path, manifest: dict[str, Any]) -> bool:
    built = dest_dir / extension.built_path
    return built.is_file() and manifest["built"].get(extension.built_path) == hash_file(built)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
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


def _unpack(pin: Pin, archive: Path, tree: Path, progress: Progress) -> None:
    """Unpack the pin's folders into `tree`, without the archive's own top folder; tarfile's filter guards paths."""
    members = []
    try:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                below = member.name.partition("/")[2]
                if below.partition("/")[0] in pin.unpack and (member.isfile() or member.isdir()):
                    members.append(member.replace(name=below, deep=False))
            for done, member in enumerate(members, start=1):
                tar.extract(member, tree, filter="data")
                if done % 50 == 0 or done == len(members):
                    progress("unpack", done, len(members))
    except tarfile.TarError as error:
        raise SourceError(f"{archive.name} cannot be unpacked: {error}") from None
    if not members:
        raise SourceError(f"{archive.name} holds none of {', '.join(pin.unpack)}")


def _build(pin: Pin, tree: Path, progress: Progress) -> dict[str, str]:
    built: dict[str, str] = {}
    for done, extension in enumerate(pin.extensions):
        progress("build", done, len(pin.extensions))
        built[extension.built_path] = build_extension(extension, tree, pin.project)
    progress("build", len(pin.extensions), len(pin.extensions))
    return built


def _remove_leftovers(folder: Path) -> None:
    """What a fetch that was cut off has left; nobody else is at work here, for we hold the lock."""
    for pattern in (".new-src*", ".old-src*", ".build-*", ".*.part"):
        for path in sorted(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_to_overwrite(status: SourceStatus, dest_dir: Path) -> None:
    shown = "\n  ".join(status.changed[:10])
    more = f"\n  and {len(status.changed) - 10} more" if len(status.changed) > 10 else ""
    raise SourceError(
        f"{dest_dir} was changed since it was fetched:\n  {shown}{more}\n"
        "Keep your changes elsewhere, then fetch with --replace to discard them."
    )


def fetch_source(pin: Pin, dest_dir: Path, progress: Progress = ignore_progress, replace: bool = False) -> Path:
    """Make `dest_dir` hold the pinned source, ready to be put on PYTHONPATH, and return it.

    What is there and right is kept; a tree of an older pin is replaced if nobody touched it.

    progress: called with (step, done, total), the step one of download, unpack, build
    replace: discard a tree that someone has changed

    Raises:
        SourceError: the archive cannot be had or is not the pinned one, a module cannot be built, or someone has
            changed the tree.
    """
    folder = dest_dir.parent
    with _one_at_a_time(folder):
        _remove_leftovers(folder)
        status = source_status(pin, dest_dir)
        if status.state == "ready":
            return dest_dir
        if status.state == "unbuilt":
            manifest = _load_manifest(dest_dir) or {}
            built = manifest["built"] | _build(pin, dest_dir, progress)
            _write_manifest(dest_dir, pin.digest, manifest["files"], built)
            return dest_dir
        if status.changed and not replace:
            _refuse_to_overwrite(status, dest_dir)
        archive = _bring_archive(pin, folder, progress)
        fresh = folder / ".new-src"
        fresh.mkdir()
        _unpack(pin, archive, fresh, progress)
        _write_manifest(fresh, pin.digest, _hash_tree(fresh), _build(pin, fresh, progress))
        if dest_dir.exists():
            dest_dir.rename(folder / ".old-src")
        fresh.rename(dest_dir)
        _remove_leftovers(folder)
    return dest_dir
