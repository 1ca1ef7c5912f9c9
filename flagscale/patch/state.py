"""What a tree was patched with, and whether it is still that: one light function for whoever starts a job.

A patched tree carries its own record (`.flagscale-patch/state.json`), which is swapped in together with the patched
files: tree and record never disagree. Files that a patch touched are compared by content. The others are compared by
size and time of change, and by content only where these differ and upstream's hashes are known (the manifest of a
fetched source, the RECORD of an installed package, git): a look costs one `lstat` a file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flagscale.errors import PatchError
from flagscale.patch.tree import STATE_DIR, Digest, list_files, read_contents
from flagscale.patch.upstream import Upstream, find_upstream

RECORD_VERSION = 1
STATE_FILE = "state.json"

Kind = Literal["absent", "clean", "patched", "drifted", "unknown"]


@dataclass(frozen=True, slots=True)
class PatchState:
    """What a tree is.

    kind: absent (no such folder, or an empty one); clean (upstream's bytes); patched (by `series`, nothing else);
        drifted (`changed` differs from upstream or from what the series made); unknown (never patched by us, and there
        is nothing to compare it with)
    series: the layers that were applied, lowest first: `Common/vllm`, `Huawei_Atlas800TA3/vllm`
    digest: SHA-256 over series, pin, names, modes and contents of all that the series made; "" without a series
    changed: `<path> (edited|missing|added)`
    """

    kind: Kind
    series: tuple[str, ...] = ()
    digest: str = ""
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Touched:
    """A file that a series changed: as it was and as it was left; None where there is no file."""

    base: Digest | None
    result: Digest | None


@dataclass(frozen=True, slots=True)
class Record:
    """What is written into a patched tree.

    pins: what the layers were made for: `vllm 0.9.1`
    patches: SHA-256 of the layers' names and diffs
    touched: by name
    kept: of the touched files and of Python's caches of them: the file in `.flagscale-patch/base` that it is kept in
    made_dirs: folders that the series made, outermost first
    lost_dirs: folders that were left empty and removed, outermost first, with their permissions
    listing: name -> size and mtime_ns of every other file
    stash: files outside the tree that keep local edits as patches
    """

    series: tuple[str, ...]
    pins: tuple[str, ...]
    patches: str
    touched: dict[str, Touched]
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    made_dirs: tuple[str, ...] = ()
    lost_dirs: tuple[tuple[str, int], ...] = ()
    listing: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    stash: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        made = [(name, dataclasses.astuple(touched)[1]) for name, touched in sorted(self.touched.items())]
        return hashlib.sha256(json.dumps([self.series, self.pins, made]).encode()).hexdigest()


def dump_record(record: Record) -> str:
    row: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    row["touched"] = {
        name: [_dump_digest(ends.base), _dump_digest(ends.result)] for name, ends in record.touched.items()
    }
    return json.dumps({"version": RECORD_VERSION, **row}, sort_keys=True) + "\n"


def _dump_digest(digest: Digest | None) -> list[object] | None:
    return [digest.mode, digest.sha256] if digest else None


def load_record(tree: Path) -> Record | None:
    """The record of a patched tree, or None for a tree without one.

    Raises:
        PatchError: the record cannot be read, or was written by a newer version.
    """
    path = tree / STATE_DIR / STATE_FILE
    try:
        row: dict[str, Any] = json.loads(path.read_text())
        if row["version"] != RECORD_VERSION:
            raise PatchError(f"{path}: written by another version of this toolkit (record {row['version']})")
        return Record(
            series=tuple(row["series"]),
            pins=tuple(row["pins"]),
            patches=row["patches"],
            touched={
                name: Touched(*(Digest(*side) if side else None for side in ends))
                for name, ends in row["touched"].items()
            },
            kept=row["kept"],
            made_dirs=tuple(row["made_dirs"]),
            lost_dirs=tuple((name, mode) for name, mode in row["lost_dirs"]),
            listing={name: (size, mtime) for name, (size, mtime) in row["listing"].items()},
            stash=tuple(row["stash"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"{path}: not a record of a patched tree: {error!r}") from None


def make_listing(tree: Path, touched: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and mtime_ns of every file but the touched ones."""
    listing = {name: (found.st_size, found.st_mtime_ns) for name, found in list_files(tree)}
    for name in touched:
        listing.pop(name, None)
    return listing


def find_edits(tree: Path, record: Record) -> tuple[str, ...]:
    """The touched files that are not as the series left them: `<path> (edited|missing|added)`."""
    found = {name: content.digest for name, content in read_contents(tree, record.touched).items()}
    differing = sorted(name for name, ends in record.touched.items() if found.get(name) != ends.result)
    return tuple(f"{name} ({_word(record.touched[name].result, found.get(name))})" for name in differing)


def _word(was: object, now: object) -> str:
    return "missing" if now is None else "added" if was is None else "edited"


def _find_strays(tree: Path, record: Record) -> list[str]:
    """The files that no patch touched and that changed all the same."""
    present = make_listing(tree, record.touched)
    differing = sorted(name for name in present.keys() | record.listing.keys()
                       if present.get(name) != record.listing.get(name))  # fmt: skip
    upstream = find_upstream(tree) if differing else None
    return [
        f"{name} ({_word(record.listing.get(name), present.get(name))})"
        for name in differing
        if not (name in present and upstream and upstream.is_same(name))
    ]


def _compare(tree: Path, upstream: Upstream) -> tuple[str, ...]:
    present = {name for name, _ in list_files(tree)}
    promised = upstream.names()
    words = dict.fromkeys(promised - present, "missing")
    words |= {name: "edited" for name in promised & present if not upstream.is_same(name)}
    words |= dict.fromkeys(upstream.without_ignored(present - promised), "added")
    return tuple(f"{name} ({words[name]})" for name in sorted(words))


def read_state(tree: Path) -> PatchState:
    """Say what the tree is: see `PatchState`.

    Raises:
        PatchError: the tree's record cannot be read.
    """
    if not tree.is_dir() or not any(tree.iterdir()):
        return PatchState("absent")
    record = load_record(tree)
    if record is None:
        upstream = find_upstream(tree)
        if upstream is None:
            return PatchState("unknown")
        changed = _compare(tree, upstream)
        return PatchState("drifted" if changed else "clean", changed=changed)
    changed = tuple(sorted((*find_edits(tree, record), *_find_strays(tree, record))))
    return PatchState("drifted" if changed else "patched", record.series, record.digest, changed)
