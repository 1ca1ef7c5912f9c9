"""Building the trees that take a tree's place: the one without patches, and from it the one with them.

A patched tree holds, below `.flagscale-patch`, the files as they were: links to the very inodes, so that content, mode,
owner and time come back. Applying to a patched tree starts from them too, which makes it one step from the old series
to the new one.
"""

import dataclasses
import os
import stat
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.diffs import Hunk, read_changes, show_name
from flagscale.patch.fit import Fit, Misfit
from flagscale.patch.git import apply_diff, try_patches
from flagscale.patch.state import STATE_FILE, Record, Touched, dump_record
from flagscale.patch.swap import (
    BASE_DIR,
    Hold,
    Linked,
    cached_source,
    caches_of,
    copy_folder_modes,
    link_file,
    link_tree,
)
from flagscale.patch.tree import (
    CACHE_DIR,
    OWN_NAMES,
    REGULAR,
    STATE_DIR,
    Content,
    Digest,
    folders_above,
    is_derived,
    read_contents,
    write_content,
)

DIFF_FILE = "applied.diff"
REJECTS_DIR = f"{STATE_DIR}/rejects"

Files = dict[str, Content]


def read_base(tree: Path, record: Record | None, names: Collection[str]) -> Files:
    """The files as they were before patches."""
    if record is None:
        return read_contents(tree, names)
    kept = {name: record.kept[name] for name in names if name in record.kept}
    found = read_contents(tree / BASE_DIR, kept.values())
    others = read_contents(tree, (name for name in names if name not in record.touched))
    return {name: found[number] for name, number in kept.items()} | others


def read_result(tree: Path, record: Record) -> Files:
    """The patched files as the series made them, whatever was done to them since."""
    diff = load_diff(tree)
    results = try_patches(read_base(tree, record, record.touched), [diff] if diff else []).results
    return {name: content for name, content in results.items() if name in record.touched}


def load_diff(tree: Path) -> bytes:
    """The diff that was applied to a patched tree."""
    return (tree / STATE_DIR / DIFF_FILE).read_bytes()


@dataclass(frozen=True, slots=True)
class Unpatched:
    """A tree without patches: its folders, with their permissions, and its files."""

    folders: dict[str, int]
    files: Linked

    def make_listing(self, touched: Set[str]) -> dict[str, tuple[int, int]]:
        """Size and mtime_ns of the source files that are not touched."""
        rows = ((name, found) for name, found in self.files.items() if name not in touched and not is_derived(name))
        return {name: (row.st_size, row.st_mtime_ns) for name, row in rows if name.split("/")[0] not in OWN_NAMES}


def build_unpatched(tree: Path, fresh: Path, record: Record | None) -> Unpatched:
    """Build the tree without patches: links to what no patch touched, and to the files as they were.

    Raises:
        PatchError: a file of somebody's stands where a folder or file has to come back.
    """
    touched = record.touched if record else {}
    folders, files = link_tree(tree, fresh, lambda name: name in touched or cached_source(name) in touched)
    if record:
        _remove_made_folders(fresh, record)
        files |= _put_base_back(tree, fresh, record)
        folders = [*(name for name in folders if (fresh / name).is_dir()), *(name for name, _ in record.lost_dirs)]
    copy_folder_modes(tree, fresh, (name for name in folders if (tree / name).is_dir()))
    top = str(fresh)
    return Unpatched({name: stat.S_IMODE(os.stat(f"{top}/{name}").st_mode) for name in folders}, files)  # noqa: PTH116


def _put_base_back(tree: Path, fresh: Path, record: Record) -> Linked:
    """Put links to the files as they were, and their folders, into the new tree.

    Raises:
        PatchError: a file of somebody's stands where a folder or file has to come back.
    """
    base, top = f"{tree}/{BASE_DIR}", str(fresh)
    try:
        for name, mode in record.lost_dirs:
            (fresh / name).mkdir(exist_ok=True)
            (fresh / name).chmod(mode)
        for name, kept in record.kept.items():
            if not os.path.isdir(f"{top}/{name.rpartition('/')[0]}"):  # noqa: PTH112
                (fresh / name).parent.mkdir(parents=True)
            link_file(f"{base}/{kept}", f"{top}/{name}")
    except (FileExistsError, NotADirectoryError) as error:
        name = str(Path(error.filename2 or error.filename).relative_to(fresh))
        raise PatchError(f"{tree / name} is in the way of an upstream file; move it elsewhere") from None
    return {name: os.lstat(f"{top}/{name}") for name in record.kept}


def _remove_made_folders(fresh: Path, record: Record) -> None:
    """Remove the folders that the series made, and Python's caches in them, where nothing else is in them."""
    for name in reversed(record.made_dirs):
        for folder in (fresh / name / CACHE_DIR, fresh / name):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def build_patched(hold: Hold, fresh: Path, unpatched: Unpatched, fit: Fit, draft: Record) -> None:
    """Turn the tree without patches, at `fresh`, into the patched one, and write its record into it.

    Raises:
        PatchError: git made something else of the files than it was to make.
    """
    names = set(fit.expected)
    kept = _keep_base(fresh, fit.base.keys(), fit.made.keys())
    _write_made(fresh, fit.made, unpatched.files)
    apply_diff(fresh, fit.rest, hold.work, pass_fds=(hold.lock,))
    found = {name: content.digest for name, content in read_contents(fresh, names - fit.made.keys()).items()}
    found |= {name: Digest(fit.base[name].mode, fit.expected[name] or "") for name in fit.made}
    wrong = sorted(n for n in names if (found[n].sha256 if n in found else None) != fit.expected[n])
    if wrong:
        raise PatchError(f"not what the series promises, nothing was changed: {', '.join(map(show_name, wrong))}")
    _keep_permissions(fresh, fit.rest, kept)
    made = sorted(folders_above(found) - unpatched.folders.keys())
    record = dataclasses.replace(
        draft,
        touched={name: Touched(fit.base.get(name), found.get(name)) for name in sorted(names)},
        kept=kept,
        made_dirs=tuple(made),
        lost_dirs=tuple(
            sorted((name, mode) for name, mode in unpatched.folders.items() if not (fresh / name).is_dir())
        ),
        listing=unpatched.make_listing(names),
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


def _keep_base(fresh: Path, names: Set[str], moved: Set[str]) -> dict[str, str]:
    """Keep the files that are about to be changed, and Python's caches of them; returns in which file each is kept.

    moved: those that are moved there; the others stay in their place too, for git
    """
    base = fresh / BASE_DIR
    base.mkdir(parents=True)
    caches = caches_of(fresh, names)
    kept = {name: str(number) for number, name in enumerate((*sorted(names), *caches))}
    top, end = str(fresh), str(base)
    for name in names - moved:
        link_file(f"{top}/{name}", f"{end}/{kept[name]}")
    for name in (*moved, *caches):
        os.rename(f"{top}/{name}", f"{end}/{kept[name]}")  # noqa: PTH104
    return kept


def _write_made(fresh: Path, made: Mapping[str, bytes], old: Linked) -> None:
    """Write the files that need no git, with the permissions and owners of what they were."""
    top = str(fresh)
    for name, data in made.items():
        file = os.open(f"{top}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            while data:
                data = data[os.write(file, data) :]
            if name in old:
                _match(file, old[name])
        finally:
            os.close(file)


def _match(file: int, was: os.stat_result) -> None:
    """Give a file owner and permissions of another, if they differ."""
    now = os.fstat(file)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        os.chown(file, was.st_uid, was.st_gid)
    if stat.S_IMODE(was.st_mode) != stat.S_IMODE(now.st_mode):
        os.chmod(file, stat.S_IMODE(was.st_mode))


def _keep_permissions(fresh: Path, stream: bytes, kept: Mapping[str, str]) -> None:
    """Give changed files the permissions and the owner that they had; git itself knows only "executable"."""
    for change in read_changes(stream):
        old, new = f"{fresh}/{BASE_DIR}/{kept.get(change.old or '')}", f"{fresh}/{change.new}"
        if change.old not in kept or change.new is None or not os.path.lexists(new):
            continue
        was, now = os.lstat(old), os.lstat(new)
        may_run = (was.st_mode & 0o444) >> 2 if now.st_mode & 0o100 else 0
        wanted = stat.S_IMODE(was.st_mode) & 0o7666 | may_run
        if stat.S_ISREG(was.st_mode) and stat.S_ISREG(now.st_mode) and stat.S_IMODE(now.st_mode) != wanted:
            os.chmod(new, wanted)  # noqa: PTH101
        if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
            os.chown(new, was.st_uid, was.st_gid, follow_symlinks=False)
