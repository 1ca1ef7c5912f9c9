"""A patch set on disk: `hardware/<Vendor_Chip>/<backend>/series.yaml` and one `<path>.patch` for each touched file.

A patch is text that explains itself (Why, How, Upstream, Remove-when) and then a diff that plain `git apply` takes. The
series says what release it was made for, and the SHA-256 of every file before and after: a file that is not what its
patch was made for is found before anything is tried, and a result that is not what its author saw is never kept.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale.errors import Fault, UserError, find_nearest
from flagscale.patch.diffs import Change, read_changes, read_name, show_name
from flagscale.patch.tree import OWN_NAMES

SERIES_FILE = "series.yaml"
SERIES_VERSION = 1
SUFFIX = ".patch"
HEADER_FIELDS = ("Why", "How", "Upstream", "Remove-when")
ENCRYPTED_SUFFIX = ".encrypted"
KEYS = {"version", "backend", "pin", "tasks", "models", "contact", "patches"}
COMMON = "Common"

Hashes = dict[str, str | None]
"""Name -> SHA-256 of the content; None where there is no file."""


@dataclass(frozen=True, slots=True)
class Header:
    """Why a patch is there, how it does it, what upstream says to it (a link, or why none), when it can go."""

    why: str
    how: str
    upstream: str
    remove_when: str

    def render(self) -> str:
        values = (self.why, self.how, self.upstream, self.remove_when)
        rows = ((name, "\n  ".join(value.splitlines())) for name, value in zip(HEADER_FIELDS, values, strict=True))
        return "".join(f"{name}: {value}\n" for name, value in rows) + "\n"


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch: its file below the series' folder, header, diff, and what its files are before and after."""

    name: str
    header: Header
    diff: bytes
    base: Hashes
    result: Hashes
    changes: tuple[Change, ...]

    @property
    def names(self) -> set[str]:
        """Every file that is changed, by its name before and its name after."""
        return {name for change in self.changes for name in (change.old, change.new) if name is not None}


@dataclass(frozen=True, slots=True)
class Series:
    """A patch set: what it was made for, and its patches in order.

    name: `<Vendor_Chip>/<backend>`
    version, digest: the release of the backend, and the digest of its pin or its commit
    """

    name: str
    backend: str
    version: str
    digest: str
    tasks: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    contact: str = ""
    patches: tuple[Patch, ...] = field(default=(), repr=False)

    @property
    def stream(self) -> bytes:
        """All diffs, as one `git apply` takes them."""
        return b"".join(patch.diff for patch in self.patches)

    @property
    def made_for(self) -> str:
        return f"{self.backend} {self.version}"


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_layers(layers: Sequence[Series]) -> str:
    """The digest of patch sets that lie over each other, lowest first: over their names and all diffs."""
    names = json.dumps([layer.name for layer in layers]).encode()
    return hash_bytes(names + b"".join(layer.stream for layer in layers))


def parse_patch(text: bytes) -> tuple[dict[str, str], bytes]:
    """Split a patch file into its header fields and its diff."""
    found = re.search(rb"^(diff --git |--- )", text, re.MULTILINE)
    if not found:
        return {}, b""
    head = text[: found.start()].decode(errors="replace")
    fields: dict[str, str] = {}
    last = None
    for line in head.splitlines():
        name, colon, value = line.partition(":")
        if colon and name in HEADER_FIELDS:
            fields[name], last = value.strip(), name
        elif last and line.startswith(" "):
            fields[last] += "\n" + line.strip()
    return fields, text[found.start() :]


def load_patch(folder: Path, name: str, base: Hashes, result: Hashes, faults: list[Fault]) -> Patch | None:
    """Read one patch; what is wrong with it is added to `faults`."""
    where = str(folder / name)
    try:
        text = (folder / name).read_bytes()
    except FileNotFoundError:
        faults.append(Fault("", "there is no such patch, though the series lists it", where=where))
        return None
    fields, diff = parse_patch(text)
    if not diff.startswith(b"diff --git "):
        faults.append(Fault("", "holds no diff in git's format", "lines that `git diff` writes", where=where))
        return None
    missing = [field for field in HEADER_FIELDS if not fields.get(field)]
    if missing:
        faults.append(
            Fault("", f"the header lacks {', '.join(missing)}", "a line `Why: ..` above the diff", where=where)
        )
        return None
    if not diff.endswith(b"\n"):
        diff += b"\n"
    patch = Patch(name, Header(*(fields[field] for field in HEADER_FIELDS)), diff, base, result, read_changes(diff))
    faults += _check_names(patch, where)
    return patch


def _check_names(patch: Patch, where: str) -> list[Fault]:
    names = patch.names
    outside = sorted(n for n in names if n.startswith("/") or {"..", ".git"} & set(n.split("/")))
    ours = sorted(name for name in names if name.split("/")[0] in OWN_NAMES)
    faults = [Fault("", f"changes `{name}`, which is no file of the source", where=where) for name in outside + ours]
    for side, hashes in (("base", patch.base), ("result", patch.result)):
        if not faults and set(hashes) != names:
            listed = ", ".join(sorted(names))
            faults.append(Fault(f"patches.{side}", "lists other files than the diff", listed, where=where))
    return faults


def find_encrypted(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{ENCRYPTED_SUFFIX}"))


def load_series(folder: Path) -> Series:
    """Read a patch set.

    Raises:
        UserError: all that is wrong with it, at once.
    """
    if encrypted := find_encrypted(folder):
        raise UserError(
            f"{folder}: {len(encrypted)} patches are encrypted ({encrypted[0].name}, ..). Encrypted patches can be "
            "neither read nor verified, and are not taken; ask their author for the plain ones."
        )
    path = folder / SERIES_FILE
    row = _load_yaml(path)
    faults = _check_keys(row, str(path))
    patches: list[Patch] = []
    if not faults:
        for entry in row["patches"]:
            base, result = ({read_name(name): sha for name, sha in entry[side].items()} for side in ("base", "result"))
            patch = load_patch(folder, read_name(entry["path"]), base, result, faults)
            patches += [patch] if patch else []
        faults += _check_together(folder, row["patches"], patches)
    if faults:
        count = f"{len(faults)} faults:\n  " if len(faults) > 1 else ""
        raise UserError(f"{folder}: " + count + "\n  ".join(map(str, faults)))
    pin = row["pin"]
    lists = {key: tuple(map(str, row.get(key) or ())) for key in ("tasks", "models")}
    return Series(
        name=f"{folder.parent.name}/{folder.name}",
        backend=str(row["backend"]),
        version=str(pin["version"]),
        digest=str(pin["digest"]),
        contact=str(row.get("contact") or ""),
        patches=tuple(patches),
        **lists,
    )


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        row = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no patch set: there is no {path.name} in it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: not a series: expected keys {', '.join(sorted(KEYS))}")
    return row


def _check_keys(row: dict[str, Any], where: str) -> list[Fault]:
    faults = [
        Fault(str(key), "is no key of a series", suggestion=find_nearest(str(key), KEYS), where=where)
        for key in row.keys() - KEYS
    ]
    faults += [
        Fault(key, "is missing", where=where) for key in ("version", "backend", "pin", "patches") if key not in row
    ]
    if row.get("version", SERIES_VERSION) != SERIES_VERSION:
        faults.append(Fault("version", f"{row['version']} is unknown", str(SERIES_VERSION), where=where))
    pin = row.get("pin")
    if "pin" in row and not (isinstance(pin, dict) and {"version", "digest"} <= set(pin)):
        faults.append(Fault("pin", "is no pin", "version and digest", where=where))
    if "patches" in row and not isinstance(row["patches"], list):
        faults.append(Fault("patches", "is no list", "a list of path, base, result", where=where))
    for index, entry in enumerate(row["patches"] if isinstance(row.get("patches"), list) else ()):
        if not isinstance(entry, dict) or set(entry) != {"path", "base", "result"} or not _has_types(entry):
            faults.append(Fault(f"patches[{index}]", "is no entry", "path, base and result", where=where))
    return faults


def _has_types(entry: dict[str, Any]) -> bool:
    return isinstance(entry["path"], str) and isinstance(entry["base"], dict) and isinstance(entry["result"], dict)


def _check_together(folder: Path, entries: Sequence[dict[str, Any]], patches: Sequence[Patch]) -> list[Fault]:
    """Every patch of the folder is listed, once, and no file is changed by two."""
    listed = [read_name(entry["path"]) for entry in entries]
    present = {os.fsdecode(path.relative_to(folder)) for path in folder.rglob(f"*{SUFFIX}") if path.is_file()}
    faults = [
        Fault("patches", f"does not list `{name}`, which is in the folder", where=str(folder / SERIES_FILE))
        for name in sorted(present - set(listed))
    ]
    owners: dict[str, str] = {}
    for patch in patches:
        for name in sorted(patch.names):
            if name in owners:
                faults.append(
                    Fault("", f"changes {name}, as {owners[name]} does", "one", where=str(folder / patch.name))
                )
            owners[name] = patch.name
    return faults


def render_series(series: Series) -> str:
    """The text of series.yaml."""
    import yaml

    row = {
        "version": SERIES_VERSION,
        "backend": series.backend,
        "pin": {"version": series.version, "digest": series.digest},
        "tasks": list(series.tasks),
        "models": list(series.models),
        "contact": series.contact,
        "patches": [
            {
                "path": show_name(patch.name),
                "base": {show_name(name): sha for name, sha in patch.base.items()},
                "result": {show_name(name): sha for name, sha in patch.result.items()},
            }
            for patch in series.patches
        ],
    }
    return yaml.safe_dump(row, sort_keys=False, width=1000)
