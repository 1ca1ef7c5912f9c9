"""Building the trees that take a tree's place: the one without patches, and from it the one with them.

A patched tree holds, below `.flagscale-patch`, the files as they were: links to the very inodes, so that content, mode,
owner and time come back. Applying to a patched tree starts from them too, which makes it one step from the old series
to the new one.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.diffs import Hunk, read_changes, show_name
from flagscale.patch.fit import Fit, Misfit
from flagscale.patch.git import apply_diff, try_patches
from flagscale.patch.state import STATE_FILE, Record, Touched, dump_record, make_listing
from flagscale.patch.swap import (
    BASE_DIR,
    Hold,
    cached_source,
    caches_of,
    copy_folder_modes,
    link_file,
    link_tree,
    walk,
)
from flagscale.patch.tree import (
    CACHE_DIR,
    REGULAR,
    STATE_DIR,
    Content,
    Digest,
    read_content,
    read_digest,
    write_content,
)

DIFF_FILE = "applied.diff"
REJECTS_DIR = f"{STATE_DIR}/rejects"

Files = dict[str, Content]


def read_base(tree: Path, record: Record | None, names: Iterable[str]) -> Files:
    """The files as they were before patches."""
    touched = record.touched if record else {}
    found = {}
    for name in names:
        content = read_content(tree / BASE_DIR if name in touched else tree, name)
        if content:
            found[name] = content
    return found


def read_result(tree: Path, record: Record) -> Files:
    """The patched files as the series made them, whatever was done to them since."""
    diff = load_diff(tree)
    results = try_patches(read_base(tree, record, record.touched), [diff] if diff else []).results
    return {name: content for name, content in results.items() if name in record.touched}


def load_diff(tree: Path) -> bytes:
    """The diff that was applied to a patched tree."""
    return (tree / STATE_DIR / DIFF_FILE).read_bytes()


def build_unpatched(tree: Path, fresh: Path, record: Record | None) -> None:
    """Build the tree without patches: links to what no patch touched, and to the files as they were.

    Raises:
        PatchError: a file of somebody's stands where a folder or file has to come back.
    """
    touched = record.touched if record else {}
    link_tree(tree, fresh, lambda name: name in touched or cached_source(name) in touched)
    if record:
        _remove_made_folders(fresh, record)
        try:
            link_tree(tree / BASE_DIR, fresh, lambda _name: False)
        except FileExistsError as error:
            name = Path(error.filename2 or error.filename).relative_to(fresh)
            raise PatchError(f"{tree / name} is in the way of an upstream file; move it elsewhere") from None
        copy_folder_modes(tree / BASE_DIR, fresh)
    copy_folder_modes(tree, fresh)


def _remove_made_folders(fresh: Path, record: Record) -> None:
    """Remove the folders that the series made, and Python's caches in them, where nothing else is in them."""
    for name in reversed(record.made_dirs):
        for folder in (fresh / name / CACHE_DIR, fresh / name):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def build_patched(hold: Hold, fresh: Path, fit: Fit, draft: Record) -> None:
    """Turn the tree without patches, at `fresh`, into the patched one, and write its record into it.

    Raises:
        PatchError: git made something else of the files than it was to make.
    """
    names = set(fit.expected)
    folders = set(walk(fresh)[0])
    base = _keep_base(fresh, names)
    apply_diff(fresh, fit.stream, hold.work, pass_fds=(hold.lock,))
    results = {name: read_digest(fresh, name) for name in sorted(names)}
    wrong = [n for n, found in results.items() if (found.sha256 if found else None) != fit.expected[n]]
    if wrong:
        raise PatchError(f"not what the series promises, nothing was changed: {', '.join(map(show_name, wrong))}")
    _keep_permissions(fresh, fit.stream)
    copy_folder_modes(hold.tree, fresh)
    record = dataclasses.replace(
        draft,
        touched={name: Touched(base.get(name), results[name]) for name in sorted(names)},
        made_dirs=tuple(name for name in walk(fresh)[0] if name not in folders),
        listing=make_listing(fresh, names),
    )
    (fresh / STATE_DIR / ".gitignore").write_text("*\n")
    (fresh / STATE_DIR / DIFF_FILE).write_bytes(fit.stream)
    (fresh / STATE_DIR / STATE_FILE).write_text(dump_record(record))
    for misfit in fit.misfits:
        write_content(fresh / REJECTS_DIR / misfit.patch.name, Content(REGULAR, _render_rejects(misfit)))


def _render_rejects(misfit: Misfit) -> bytes:
    """The hunks that did not fit, as a patch of their own."""
    patch = misfit.patch
    if not misfit.hunks:
        return patch.header.render().encode() + patch.diff
    head = patch.header.render().encode() + patch.diff.partition(b"\n@@ ")[0]
    return b"\n".join([head, *map(_render_hunk, misfit.hunks), b""])


def _render_hunk(hunk: Hunk) -> bytes:
    head = b"@@ -%d,%d +%d,%d @@" % (hunk.start, len(hunk.before), hunk.start, len(hunk.after))
    return b"\n".join([head, *hunk.lines])


def _keep_base(fresh: Path, names: set[str]) -> dict[str, Digest]:
    """Keep the files that are about to be changed, and Python's caches of them; returns what they are."""
    base = fresh / BASE_DIR
    base.mkdir(parents=True)
    kept = {name: digest for name in sorted(names) if (digest := read_digest(fresh, name))}
    caches = caches_of(fresh, kept.keys())
    for name in sorted({str(above) for kin in (*kept, *caches) for above in Path(kin).parents} - {"."}):
        (base / name).mkdir()
    for name in kept:
        link_file(f"{fresh}/{name}", f"{base}/{name}")
    for name in caches:
        (fresh / name).rename(base / name)
    copy_folder_modes(fresh, base)
    return kept


def _keep_permissions(fresh: Path, stream: bytes) -> None:
    """Give changed files the permissions and the owner that they had; git itself knows only "executable"."""
    for change in read_changes(stream):
        old, new = fresh / BASE_DIR / (change.old or ""), fresh / (change.new or "")
        if not (change.old and change.new and os.path.lexists(old) and os.path.lexists(new)):
            continue
        was, now = old.lstat(), new.lstat()
        if not old.is_symlink() and not new.is_symlink():
            may_run = (was.st_mode & 0o444) >> 2 if now.st_mode & 0o100 else 0
            new.chmod(was.st_mode & 0o7666 | may_run)
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            os.chown(new, was.st_uid, was.st_gid, follow_symlinks=False)
