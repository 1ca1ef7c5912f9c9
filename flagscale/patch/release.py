"""The files of a backend's releases, to try patches on: from archives of the package index, folders, or git.

An archive is read in one pass and never unpacked to disk: of a release only the Python sources and the files that
patches touch are kept, in memory.
"""

import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from flagscale.errors import SourceError, UserError
from flagscale.patch.index import IndexSettings, download, list_archives, load_index_settings
from flagscale.patch.source import hash_file
from flagscale.patch.tree import EXECUTABLE, REGULAR, SYMLINK, Content, is_derived, list_files, read_content
from flagscale.patch.upstream import of_commit, run_git


@dataclass(frozen=True, slots=True)
class Place:
    """Where a release's files are.

    label: what it is called: the version, the folder, the commit
    path: an archive, a folder, or a folder whose git has `commit`
    top: the folder of the archive that is the tree, below the archive's own; "" is all of it
    """

    label: str
    path: Path
    commit: str | None = None
    top: str = ""

    @property
    def digest(self) -> str:
        """The commit, or the SHA-256 of the archive; empty for a folder."""
        return self.commit or (hash_file(self.path) if self.path.is_file() else "")


@dataclass(frozen=True, slots=True)
class Release:
    """A release: the names of all its files, and the contents of its Python sources and of what was asked for."""

    label: str
    names: frozenset[str]
    files: dict[str, Content]

    @property
    def python(self) -> Iterator[bytes]:
        return (found.data for name, found in self.files.items() if name.endswith(".py") and found.mode != SYMLINK)


def choose_archive(project: str, version: str, names: Set[str]) -> str | None:
    """The archive of a release with its sources: the source archive, else a wheel, pure Python before others."""
    stem = "[-_.]+".join(map(re.escape, re.split(r"[-_.]+", project)))
    head = re.compile(rf"{stem}-{re.escape(version)}(\.tar\.gz|\.zip|-.*\.whl)", re.IGNORECASE)
    found = [name for name in names if head.fullmatch(name)]
    return min(found, key=lambda name: (name.endswith(".whl"), "none-any" not in name, name), default=None)


class Index:
    """What the package index has of a project; pip's settings and the index are asked once, when it is needed."""

    def __init__(self, project: str) -> None:
        self.project = project

    @cached_property
    def settings(self) -> IndexSettings:
        return load_index_settings()

    @cached_property
    def archives(self) -> dict[str, str]:
        return list_archives(self.project, self.settings)


def bring_release(index: Index, version: str, cache: Path) -> Path:
    """The archive of a release in the folder `cache`, downloaded if it is not there.

    Raises:
        SourceError: there is no such release, or it cannot be fetched.
    """
    cache.mkdir(parents=True, exist_ok=True)
    here = choose_archive(index.project, version, {path.name for path in cache.iterdir()})
    if here:
        return cache / here
    name = choose_archive(index.project, version, index.archives.keys())
    if name is None:
        pattern = re.compile(r"-(\d[^-]*?)(?:\.tar\.gz|\.zip|-.*\.whl)$")
        known = sorted({found[1] for name in index.archives if (found := pattern.search(name))}, key=_version_key)
        raise SourceError(f"{index.project} has no release {version}; the newest are {', '.join(known[-8:])}")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as folder:
        part = Path(folder) / name
        download(index.project, version, name, part, settings=index.settings)
        part.replace(cache / name)
    return cache / name


def _version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.findall(r"\d+|[a-z]+", version)
    return tuple((0, int(part), "") if part.isdigit() else (-1, 0, part) for part in parts)


def find_place(word: str, tree: Path | None = None) -> Place | None:
    """A release that is at hand: an archive or a folder of that path, or a commit or tag of the tree's git."""
    path = Path(word)
    if path.exists():
        return Place(word, path.resolve())
    if tree and (tree / ".git").exists():
        found = run_git(tree, "rev-parse", "--verify", "--quiet", f"{word}^{{commit}}").stdout.decode().strip()
        return Place(word, tree, found) if found else None
    if "/" in word:
        raise UserError(f"{word}: there is no such archive or folder")
    return None


def load_release(place: Place, wanted: Set[str]) -> Release:
    """Read a release: all Python files, those of the names in `wanted`, and those that share a file name with them.

    Raises:
        SourceError: the archive is damaged.
    """
    kin = {name.rpartition("/")[2] for name in wanted}

    def is_kept(name: str) -> bool:
        return name.endswith(".py") or name in wanted or name.rpartition("/")[2] in kin

    if place.commit:
        return _read_commit(place, place.commit, is_kept)
    if place.path.is_dir():
        names = frozenset(name for name, _ in list_files(place.path))
        kept = {name: read_content(place.path, name) for name in names if is_kept(name)}
        return Release(place.label, names, {name: content for name, content in kept.items() if content})
    names_found: set[str] = set()
    files: dict[str, Content] = {}
    try:
        for name, read in _members(place):
            names_found.add(name)
            if is_kept(name) and (content := read()):
                files[name] = content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise SourceError(f"{place.path} cannot be read: {error}; delete it to fetch it again") from None
    return Release(place.label, frozenset(names_found), files)


def _members(place: Place) -> Iterator[tuple[str, Callable[[], Content | None]]]:
    """The source files of an archive by their names in the tree, each with how to read it."""
    if place.path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(place.path) as wheel:
            for info in wheel.infolist():
                name = _name_below(info.filename, place)
                if name and not info.is_dir():
                    mode = EXECUTABLE if info.external_attr >> 16 & 0o100 else REGULAR
                    yield name, partial(_read_zipped, wheel, info, mode)
        return
    with tarfile.open(place.path) as tar:
        for member in tar:
            name = _name_below(member.name, place)
            if name and (member.isfile() or member.issym()):
                yield name, partial(_read_tarred, tar, member)


def _name_below(name: str, place: Place) -> str | None:
    below = name if place.path.suffix == ".whl" else name.partition("/")[2]
    if place.top and not below.startswith(f"{place.top}/"):
        return None
    below = below.removeprefix(f"{place.top}/") if place.top else below
    return None if is_derived(below) else below


def _read_zipped(wheel: zipfile.ZipFile, info: zipfile.ZipInfo, mode: int) -> Content:
    return Content(mode, wheel.read(info))


def _read_tarred(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Content | None:
    if member.issym():
        return Content(SYMLINK, os.fsencode(member.linkname))
    file = tar.extractfile(member)
    return Content(EXECUTABLE if member.mode & 0o100 else REGULAR, file.read()) if file else None


def _read_commit(place: Place, commit: str, is_kept: Callable[[str], bool]) -> Release:
    upstream = of_commit(place.path, commit)
    kept = sorted(name for name in upstream.hashes if is_kept(name))
    asked = "".join(f"{upstream.hashes[name]}\n" for name in kept).encode()
    rest = memoryview(run_git(place.path, "cat-file", "--batch", stdin=asked).stdout)
    files: dict[str, Content] = {}
    at = 0
    for name in kept:
        end = bytes(rest[at : at + 100]).index(b"\n") + at
        size = int(bytes(rest[at:end]).rsplit(b" ", 1)[1])
        files[name] = Content(upstream.modes[name], bytes(rest[end + 1 : end + 1 + size]))
        at = end + size + 2
    return Release(place.label, frozenset(upstream.hashes), files)
