"""The files of a source archive or a wheel, put into a folder: only those that the pin names, nothing outside it."""

import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flagscale.errors import SourceError
from flagscale.patch.index import Progress
from flagscale.patch.pins import Pin

DERIVED_SUFFIXES = (".pyc", ".so")
"""What an interpreter or a compiler makes: no source, and in a wheel good for one interpreter only."""


class _Member(NamedTuple):
    name: str
    put: Callable[[], None]


def _place_of(name: str, pin: Pin) -> str | None:
    """Where a member goes below the tree, or None for one that stays in the archive, as another git's files do. A wheel
    has no folder on top."""
    below = name if pin.archive.endswith(".whl") else name.partition("/")[2]
    if pin.top:
        if not below.startswith(pin.top + "/"):
            return None
        below = below.removeprefix(pin.top + "/")
    wanted = ".git" not in below.split("/") and (not pin.unpack or below.partition("/")[0] in pin.unpack)
    return below if below and wanted and not below.endswith(DERIVED_SUFFIXES) else None


def _open_tar(tar: tarfile.TarFile, pin: Pin, tree: Path) -> list[_Member]:
    def put(member: tarfile.TarInfo) -> Callable[[], None]:
        return lambda: tar.extract(member, tree, filter="data")

    places = ((_place_of(member.name, pin), member) for member in tar.getmembers())
    return [
        _Member(place, put(member.replace(name=place, deep=False)))
        for place, member in places
        if place and (member.isfile() or member.issym())
    ]


def _open_wheel(wheel: zipfile.ZipFile, pin: Pin, tree: Path) -> list[_Member]:
    def put(info: zipfile.ZipInfo, place: str) -> Callable[[], None]:
        def write() -> None:
            dst = tree / place
            if not dst.resolve().is_relative_to(tree.resolve()):
                raise tarfile.OutsideDestinationError(tarfile.TarInfo(place), str(dst))
            dst.parent.mkdir(parents=True, exist_ok=True)
            dst.write_bytes(wheel.read(info))
            dst.chmod(0o755 if info.external_attr >> 16 & stat.S_IXUSR else 0o644)

        return write

    places = ((_place_of(info.filename, pin), info) for info in wheel.infolist() if not info.is_dir())
    return [_Member(place, put(info, place)) for place, info in places if place]


def _put_all(members: Sequence[_Member], progress: Progress) -> None:
    for done, member in enumerate(members, start=1):
        member.put()
        if done % 50 == 0 or done == len(members):
            progress("unpack", done, len(members))


def unpack(pin: Pin, archive: Path, tree: Path, progress: Progress) -> None:
    """Put what the pin names of `archive` into the folder `tree`.

    Raises:
        SourceError: the archive is damaged, holds nothing of it, or wants to write elsewhere.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                members = _open_wheel(wheel, pin, tree)
                _put_all(members, progress)
        else:
            with tarfile.open(archive) as tar:
                members = _open_tar(tar, pin, tree)
                _put_all(members, progress)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"{archive.name} cannot be unpacked: {error}") from None
    if not members:
        raise SourceError(f"{archive.name} holds none of {', '.join(pin.unpack) or pin.top or 'what it should'}")
