"""FlagScale's patch folders as patch sets: one plain diff a file, with `diff.yaml` beside them and a history above.

What FlagScale writes does not say what its files were before, nor why a patch is there. So a tree of the release that
the patches were made on is needed: they are applied to it, which proves them and gives the hashes of every file before
and after. The reasons stay the author's to add: a header says where the patch comes from until then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.errors import PatchError, UserError
from flagscale.patch.build import Files, read_base
from flagscale.patch.diffs import read_changes, show_name
from flagscale.patch.export import make_patches
from flagscale.patch.git import try_patches
from flagscale.patch.pins import Pin
from flagscale.patch.series import SUFFIX, Header, Series, find_encrypted
from flagscale.patch.state import load_record

DIFF_FILE = "diff.yaml"
HISTORY_FILE = "patch_history.yaml"


@dataclass(frozen=True, slots=True)
class Origin:
    """What FlagScale says of a folder of patches.

    device: `Metax_C550`
    commit: of FlagScale, which the patches were made on
    version, backend_commit: of the backend, where they were written down
    """

    device: str
    commit: str = ""
    version: str = ""
    backend_commit: str = ""
    tasks: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    contact: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """The series, and the patches that were left out because they do not fit the tree."""

    series: Series
    left: tuple[str, ...] = ()


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: expected a mapping, as FlagScale's patch.py writes it")
    return row


def _as_words(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),) if value else ()


def find_commit(history: dict[str, Any], device: str, backend: str, tasks: tuple[str, ...]) -> str:
    """The last commit of FlagScale in the history for this device, backend and one of the tasks; "" for none."""
    by_task = history.get(device)
    if not isinstance(by_task, dict):
        return ""
    for task in tasks or tuple(by_task):
        by_backends = by_task.get(task)
        for backends, commits in by_backends.items() if isinstance(by_backends, dict) else ():
            if backend in str(backends).split("+") and commits:
                return str(_as_words(commits)[-1])
    return ""


def load_origin(folder: Path, backend: str) -> Origin:
    """Read diff.yaml in the folder or the one above, and patch_history.yaml above that; both may be missing.

    Raises:
        UserError: one of them is not what FlagScale writes.
    """
    row = _load_yaml(folder / DIFF_FILE) or _load_yaml(folder.parent / DIFF_FILE)
    device = str(row.get("device_type") or folder.parent.name)
    tasks = _as_words(row.get("task"))
    versions, commits = (
        found if isinstance(found := row.get(name), dict) else {} for name in ("backends_version", "backends_commit")
    )
    history = _load_yaml(folder.parent.parent / HISTORY_FILE)
    return Origin(
        device=device,
        commit=str(row.get("commit") or find_commit(history, device, backend, tasks)),
        version=str(versions.get(backend) or ""),
        backend_commit=str(commits.get(backend) or ""),
        tasks=tasks,
        models=_as_words(row.get("models")),
        contact=str(row.get("contact") or ""),
    )


def _load_diffs(folder: Path) -> dict[str, bytes]:
    """Name of each patch below the folder -> its diff.

    Raises:
        UserError: some are encrypted, or there are none.
    """
    if encrypted := find_encrypted(folder):
        raise UserError(
            f"{folder}: {len(encrypted)} patches are encrypted ({encrypted[0].relative_to(folder)}, ..), and nothing "
            "was imported: what cannot be read cannot be checked or reviewed. Decrypt them with FlagScale and the "
            "author's key, or ask the author for the plain ones."
        )
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob(f"*{SUFFIX}"))}
    if not found:
        raise UserError(f"{folder}: holds no {SUFFIX} file; expected FlagScale's hardware/<Vendor_Chip>/<backend>")
    diffs = {name: path.read_bytes() for name, path in found.items()}
    empty = [name for name, diff in diffs.items() if not diff.startswith(b"diff --git ")]
    if empty:
        raise UserError(f"{folder}: no diff in git's format: {', '.join(empty)}")
    return {name: diff if diff.endswith(b"\n") else diff + b"\n" for name, diff in diffs.items()}


def import_series(folder: Path, tree: Path, pin: Pin, *, version: str | None = None, partial: bool = False) -> Imported:
    """Make a patch set of FlagScale's patches in `folder`, as they change `tree`.

    tree: the release of the backend that the patches were made on, whose pin is `pin`
    version: which release that is; None leaves it to diff.yaml, then to the pin
    partial: leave out what does not fit

    Raises:
        UserError: the folder is not FlagScale's, or its patches are encrypted.
        PatchError: patches do not fit the tree; all of them are named.
    """
    origin, diffs = load_origin(folder, pin.name), _load_diffs(folder)
    changes = {name: read_changes(diff) for name, diff in diffs.items()}
    names = {end for found in changes.values() for change in found for end in (change.old, change.new) if end}
    old: Files = read_base(tree, load_record(tree), names)
    attempt = try_patches(old, list(diffs.values()))
    left = tuple(name for index, name in enumerate(diffs) if index in attempt.rejected)
    if left and not partial:
        raise PatchError(
            f"{tree}: {len(left)} of {len(diffs)} patches do not fit; nothing was imported\n  "
            + "\n  ".join(map(show_name, left))
            + _hint(origin)
        )
    if len(left) == len(diffs):
        raise PatchError(f"{tree}: none of {len(diffs)} patches fits; nothing was imported{_hint(origin)}")
    dropped = {end for name in left for change in changes[name] for end in (change.old, change.new) if end}
    taken = {name: content for name, content in old.items() if name not in dropped}
    made = {name: content for name, content in attempt.results.items() if name not in dropped}
    draft = Series(
        name=f"{origin.device}/{pin.name}",
        backend=pin.backend,
        version=version or origin.version or pin.version,
        digest=origin.backend_commit or pin.digest,
        tasks=origin.tasks,
        models=origin.models,
        contact=origin.contact,
        patches=make_patches(taken, made, {}, explain_origin(origin)),
    )
    return Imported(draft, left)


def explain_origin(origin: Origin) -> Header:
    """A header that says where a patch comes from and what its author has still to say."""
    at = f" (commit {origin.commit})" if origin.commit else ""
    return Header(
        why=f"FlagScale carries it for {origin.device}{at}; its author wrote no reason down.",
        how="See the diff.",
        upstream="unknown: FlagScale's format has no place for it.",
        remove_when=f"{origin.device} runs without it, or its author says when.",
    )


def _hint(origin: Origin) -> str:
    made_for = origin.backend_commit or origin.version
    return f"\nthey were made for {made_for}: give a tree of that with --tree" if made_for else ""
