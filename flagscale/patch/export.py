"""From an edited tree to a patch set: what differs from upstream, one self-explaining patch a file.

The series' folder is replaced in one step, as trees are; what else lies in it stays. Headers of patches that were there
are kept, so exporting again after an edit changes only diffs and hashes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flagscale.errors import PatchError, UserError
from flagscale.patch.build import Files, read_base
from flagscale.patch.diffs import Change, read_changes, show_name
from flagscale.patch.fit import fit_by_hash, hash_of
from flagscale.patch.git import make_diffs, try_patches
from flagscale.patch.series import SERIES_FILE, SUFFIX, Header, Patch, Series, load_series, render_series
from flagscale.patch.state import load_record
from flagscale.patch.swap import hold_tree, link_tree, rebuild, remove_old, walk
from flagscale.patch.tree import folders_above, list_files, read_content
from flagscale.patch.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the series, and how it differs from the one that was there, by the patches' names."""

    series: Series
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def find_changes(tree: Path, upstream: Upstream) -> tuple[Files, Files]:
    """The files that differ from upstream, as upstream has them and as they are here.

    Raises:
        PatchError: upstream's bytes of an edited file cannot be had.
    """
    record = load_record(tree)
    present = {name for name, _ in list_files(tree)}
    promised = upstream.names()
    names = {name for name in promised if not upstream.matches(name, read_content(tree, name))}
    names |= upstream.without_ignored(present - promised)
    touched = set(record.touched) if record else set()
    old = read_base(tree, record, touched)
    lost = []
    for name in sorted((names - touched) & promised):
        original = upstream.read(name)
        if original is None:
            lost.append(name)
        else:
            old[name] = original
    if lost:
        raise PatchError(
            f"{tree}: upstream's bytes of edited files are not known; give them by --base <folder>: {', '.join(lost)}"
        )
    new = {name: content for name in names | touched if (content := read_content(tree, name))}
    return old, new


def add_lower(old: Files, lower: Sequence[Series]) -> Files:
    """The files as the layers below leave them.

    Raises:
        PatchError: the lower layers do not fit upstream's files.
    """
    names = {name for layer in lower for patch in layer.patches for name in patch.names}
    base = {name: content for name, content in old.items() if name in names}
    fit = fit_by_hash(base, lower)
    if fit is None:
        raise PatchError(f"{', '.join(layer.name for layer in lower)}: made for other files than upstream has here")
    for layer in lower:
        base = try_patches(base, [patch.diff for patch in layer.patches]).results
    return {name: content for name, content in old.items() if name not in names} | {
        name: content for name, content in base.items() if name in names
    }


def target_of(changes: Sequence[Change]) -> str:
    return changes[0].new or changes[0].old or ""


def make_patches(old: Files, new: Files, known: Mapping[str, Header], header: Header | None) -> tuple[Patch, ...]:
    """One patch for each file that differs; headers are those that are known, else `header`.

    Raises:
        UserError: a patch has no header.
    """
    patches = []
    unexplained = []
    for diff in make_diffs(old, new):
        changes = read_changes(diff)
        names = {name for change in changes for name in (change.old, change.new) if name is not None}
        name = target_of(changes)
        found = known.get(name) or header
        if found is None:
            unexplained.append(name)
            continue
        base, result = ({name: hash_of(files, name) for name in sorted(names)} for files in (old, new))
        patches.append(Patch(name + SUFFIX, found, diff, base, result, changes))
    if unexplained:
        listed = "\n  ".join(map(show_name, sorted(unexplained)))
        raise UserError(
            "a patch says why it is there; these are new:\n  "
            f"{listed}\ngive --why, --how, --upstream and --remove-when for them (and edit each header afterwards)"
        )
    return _with_free_names(patches)


def _with_free_names(patches: Sequence[Patch]) -> tuple[Patch, ...]:
    """Rename patches whose file would stand where a folder is: of `a` beside `a.patch/b`, of `series.yaml/b`."""
    folders = folders_above(patch.name for patch in patches)
    free = []
    for patch in patches:
        name = patch.name.removesuffix(SUFFIX) + ".file.patch" if patch.name in folders else patch.name
        if name.startswith(f"{SERIES_FILE}/"):
            name = name.replace("/", ".folder/", 1)
        free.append(replace(patch, name=name))
    return tuple(free)


def export_series(
    tree: Path,
    folder: Path,
    draft: Series,
    upstream: Upstream,
    lower: Sequence[Series] = (),
    header: Header | None = None,
) -> Exported:
    """Write what differs between `tree` and upstream as the patch set `folder`.

    draft: the series without its patches
    lower: layers below; they are left out of the diffs if they were applied to the tree
    header: of patches that are new

    Raises:
        PatchError: the tree has nothing to export, or a series is in the folder that was not applied to the tree.
        UserError: a patch would have no header.
    """
    before = load_series(folder) if (folder / SERIES_FILE).exists() else None
    record = load_record(tree)
    applied = record.series if record else ()
    if before and before.patches and before.name not in applied and not _holds(tree, before):
        raise PatchError(
            f"{folder}: has {len(before.patches)} patches that are not in {tree}, and would be lost. "
            f"Apply them first (`flagscale patch apply`), or export to another folder."
        )
    old, new = find_changes(tree, upstream)
    old = add_lower(old, [layer for layer in lower if layer.name in applied])
    known = {target_of(patch.changes): patch.header for patch in (before.patches if before else ())}
    series = replace(draft, patches=make_patches(old, new, known, header))
    if not series.patches:
        raise PatchError(f"{tree}: nothing differs from upstream, there is nothing to export")
    write_series(folder, series)
    was = {patch.name: patch.diff for patch in (before.patches if before else ())}
    now = {patch.name: patch.diff for patch in series.patches}
    return Exported(
        series,
        added=tuple(sorted(now.keys() - was.keys())),
        changed=tuple(sorted(name for name in now.keys() & was.keys() if now[name] != was[name])),
        removed=tuple(sorted(was.keys() - now.keys())),
    )


def _holds(tree: Path, series: Series) -> bool:
    """Whether the tree has all that the series makes, as the tree has from which it was exported."""
    return all(
        sha == (content.digest.sha256 if (content := read_content(tree, name)) else None)
        for patch in series.patches
        for name, sha in patch.result.items()
    )


def write_series(folder: Path, series: Series) -> None:
    """Make `folder` hold the patch set and nothing of the one before; other files in it stay."""
    listed: set[str] = set()
    if (folder / SERIES_FILE).exists():
        listed = {SERIES_FILE, *(patch.name for patch in load_series(folder).patches)}
    folder.mkdir(parents=True, exist_ok=True)
    with hold_tree(folder) as hold:
        with rebuild(hold) as fresh:
            link_tree(hold.tree, fresh, listed.__contains__)
            for patch in series.patches:
                path = fresh / patch.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(patch.header.render().encode() + patch.diff)
            (fresh / SERIES_FILE).write_text(render_series(series), encoding="utf-8")
            _remove_empty_folders(fresh)
        remove_old(hold, {}, listed.__contains__)


def _remove_empty_folders(folder: Path) -> None:
    for name in reversed(walk(folder)[0]):
        if not any((folder / name).iterdir()):
            (folder / name).rmdir()
