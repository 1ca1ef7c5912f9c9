"""Somebody's edits of files that patches change: found, and kept as a diff in a named place, then taken out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.build import Files, read_result
from flagscale.patch.fit import hash_of
from flagscale.patch.git import make_diffs
from flagscale.patch.series import Series, hash_bytes
from flagscale.patch.state import Record
from flagscale.patch.swap import Seen, made_by_record
from flagscale.patch.tree import Content, read_content, read_digest, write_content
from flagscale.patch.upstream import Upstream


@dataclass(slots=True)
class Edits:
    """Edits that are taken out: the files as somebody left them, and as they would be without the edits.

    originals: what replaces edited files before patches are applied: upstream's, or nothing
    """

    edited: Files = field(default_factory=dict)
    unedited: Files = field(default_factory=dict)
    originals: dict[str, Content | None] = field(default_factory=dict)

    def write(self, tree: Path) -> Path | None:
        """Write the edits as a diff to `<tree>.stash/<number>.patch` and return its path; None if there are none."""
        diff = b"".join(make_diffs(self.unedited, self.edited)) if self.edited or self.unedited else b""
        if not diff:
            return None
        folder = tree.parent / f"{tree.name}.stash"
        folder.mkdir(exist_ok=True)
        number = 1
        while (path := folder / f"{number}.patch").exists():
            if path.read_bytes() == diff:
                return path
            number += 1
        part = folder / f".{number}.part"
        part.write_bytes(diff)
        part.replace(path)
        return path

    def made(self, old: Path, seen: Seen) -> Callable[[str], bool]:
        """Whether a file of the old tree may go: of our making, or an edited one that is kept as a diff."""
        of_record = made_by_record(old, None if self.edited else seen)

        def may_go(name: str) -> bool:
            kept = self.edited.get(name)
            return of_record(name) or (kept is not None and read_digest(old, name) == kept.digest)

        return may_go

    def put_originals(self, fresh: Path) -> None:
        """Take edited files out of the new tree, which has only links to them."""
        for name, content in self.originals.items():
            (fresh / name).unlink(missing_ok=True)
            if content:
                write_content(fresh / name, content)


def take_result_edits(tree: Path, record: Record | None, edits: Sequence[str], stash: bool) -> Edits:
    """The edits of patched files.

    Raises:
        PatchError: there are some, and they are not to be stashed.
    """
    if not record or not edits:
        return Edits()
    if not stash:
        raise PatchError(
            f"{tree}: patched files were changed since; nothing was done:\n  "
            + "\n  ".join(edits)
            + "\n--stash keeps the edits as a patch and takes them out; "
            "`flagscale patch export` makes them part of a series"
        )
    edited = {name: content for name in record.touched if (content := read_content(tree, name))}
    return Edits(edited, read_result(tree, record))


def take_source_edits(
    found: Edits, files: Files, layers: Sequence[Series], upstream: Upstream | None, stash: bool
) -> None:
    """Replace, in `files`, what differs from upstream by upstream's files, where those are what the patches want.

    That is done to files which are already what the patches make of them, as a tree is from which the series was
    exported, and with `stash` to all that somebody edited.
    """
    promised: dict[str, str | None] = {}
    final: dict[str, str | None] = {}
    for layer in layers:
        for patch in layer.patches:
            promised, final = {**patch.base, **promised}, {**final, **patch.result}
    for name, sha in promised.items():
        here = hash_of(files, name)
        is_final = here == final[name]
        if upstream is None or here == sha or not (stash or is_final):
            continue
        original = upstream.read(name)
        if sha != (hash_bytes(original.data) if original else None) or (sha is None and name in upstream.hashes):
            continue
        if name in files and not is_final:
            found.edited[name] = files[name]
        if original and not is_final:
            found.unedited[name] = original
        found.originals[name] = original
        files.pop(name, None)
        if original:
            files[name] = original
