"""git as the engine that makes, applies and merges diffs, always in a scratch repository of its own.

The scratch repository is a handful of files in a temporary folder. It keeps the user's settings, a tree's
.gitattributes and a repository around the tree out of the work: bytes are applied as they are, without line-end
conversion, filters or white-space rules. The price is a few file writes a call; a batch is one call.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.diffs import Change, Hunk, quote, read_change, read_changes, read_hunks, split_diff
from flagscale.patch.tree import Content, folders_above, read_content, write_content

CONFIG = """[core]
repositoryformatversion = 0
filemode = true
symlinks = true
bare = false
autocrlf = false
ignorecase = false
quotepath = false
protectNTFS = false
protectHFS = false
[diff]
renames = true
renameLimit = 10000
[apply]
whitespace = nowarn
"""
ATTRIBUTES = "* -text -eol -ident -filter -working-tree-encoding -whitespace !diff !merge\n"
UNSET = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS")

Files = Mapping[str, Content]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of patches tried one by one on some files.

    results: the files afterwards: of a patch that failed in part, with the hunks that fit
    rejected: index of a patch that failed -> the hunks that did not fit; empty where the patch failed as a whole
    """

    results: dict[str, Content]
    rejected: dict[int, tuple[Hunk, ...]] = field(default_factory=dict)


@contextmanager
def _scratch(parent: Path | None = None) -> Iterator[Path]:
    """A folder with an empty repository `repo`."""
    with tempfile.TemporaryDirectory(prefix="flagscale-patch-", dir=parent) as name:
        folder = Path(name)
        repo = folder / "repo"
        for below in ("objects", "refs", "info"):
            (repo / below).mkdir(parents=True)
        (repo / "HEAD").write_text("ref: refs/heads/none\n")
        (repo / "config").write_text(CONFIG)
        (repo / "info" / "attributes").write_text(ATTRIBUTES)
        yield folder


def _run(
    scratch: Path, words: Sequence[str], cwd: Path, stdin: bytes = b"", pass_fds: Sequence[int] = ()
) -> subprocess.CompletedProcess[bytes]:
    environ = {name: value for name, value in os.environ.items() if name not in UNSET}
    environ |= {"LC_ALL": "C", "HOME": str(scratch), "XDG_CONFIG_HOME": str(scratch), "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", f"--git-dir={scratch / 'repo'}", f"--work-tree={cwd}", *words]
    try:
        return subprocess.run(command, cwd=cwd, env=environ, input=stdin, capture_output=True, pass_fds=pass_fds)
    except FileNotFoundError:
        raise PatchError("patches need the program `git`, which is not on the PATH: install it") from None


def _refuse(ran: subprocess.CompletedProcess[bytes], doing: str) -> PatchError:
    return PatchError(f"git cannot {doing}:\n{ran.stderr.decode(errors='replace').rstrip()}")


def apply_diff(tree: Path, diff: bytes, work: Path | None = None, pass_fds: Sequence[int] = ()) -> None:
    """Apply a diff of any number of files to `tree`, all of it or nothing.

    work: where git's scratch repository is made, instead of the system's folder for temporary files
    pass_fds: kept open by git as long as it lives, also when we are killed

    Raises:
        PatchError: it does not apply; the message is git's.
    """
    if not diff:
        return
    with _scratch(work) as scratch:
        ran = _run(scratch, ["apply", "--whitespace=nowarn", "-"], tree, diff, pass_fds)
        if ran.returncode:
            raise _refuse(ran, "apply the patches")


def try_patches(files: Files, patches: Sequence[bytes], reverse: bool = False) -> Attempt:
    """Try each patch on `files` (together, they must touch different ones) and say what fits; one call of git."""
    with _scratch() as scratch:
        tree = scratch / "tree"
        tree.mkdir()
        for name, content in files.items():
            write_content(tree / name, content)
        if patches:
            words = ["apply", "--whitespace=nowarn", "--reject", *(["--reverse"] if reverse else []), "-"]
            _run(scratch, words, tree, b"".join(patches))
        results = {name: found for name in _names_after(files, patches) if (found := read_content(tree, name))}
        rejected: dict[int, tuple[Hunk, ...]] = {}
        for index, patch in enumerate(patches):
            changes = [_turned(change) if reverse else change for change in read_changes(patch)]
            missing = _rejected_hunks(tree, patch, changes)
            if missing or not all(_has_taken(change, files, results) for change in changes):
                rejected[index] = missing
    return Attempt(results, rejected)


def _turned(change: Change) -> Change:
    return Change(change.new, change.old)


def _names_after(files: Files, patches: Sequence[bytes]) -> set[str]:
    ends = (end for patch in patches for change in read_changes(patch) for end in (change.old, change.new))
    return set(files) | {name for name in ends if name is not None}


def _has_taken(change: Change, before: Files, after: Files) -> bool:
    """Whether the files are as they must be once the change is made; which of its hunks fit is told by rejects."""
    if change.old is not None and change.old not in before:
        return False
    if change.new is None:
        return change.old not in after
    if change.old != change.new:
        return change.new in after and change.new not in before and (change.old is None or change.old not in after)
    return before[change.new] != after.get(change.new)


def _rejected_hunks(tree: Path, patch: bytes, changes: Sequence[Change]) -> tuple[Hunk, ...]:
    """The hunks that git wrote into `.rej` files."""
    found: list[Hunk] = []
    for change in changes:
        rejects = read_content(tree, f"{change.new or change.old}.rej")
        if rejects:
            heads = {re.split(rb"@@", line)[1] for line in rejects.data.split(b"\n") if line.startswith(b"@@ ")}
            for part in split_diff(patch):
                found += [hunk for head, hunk in _hunks_with_heads(part) if head in heads]
    return tuple(found)


def _hunks_with_heads(part: bytes) -> list[tuple[bytes, Hunk]]:
    hunks = read_hunks(part)
    heads = [line.split(b"@@")[1] for line in part.split(b"\n") if line.startswith(b"@@ -")]
    return list(zip(heads, hunks, strict=False))


def _commit(ref: str, files: Files) -> bytes:
    out = [b"commit refs/heads/%s\ncommitter x <x> 0 +0000\ndata 0\n" % ref.encode()]
    for name, content in sorted(files.items()):
        out.append(b"M %o inline %s\ndata %d\n%s\n" % (content.mode, quote(name), len(content.data), content.data))
    return b"".join(out)


def make_diffs(old: Files, new: Files) -> list[bytes]:
    """The diffs that make `new` of `old`, one a file: binary-safe, renames found.

    A file that becomes a symlink, or the other way round, is deleted and made anew in one diff.
    """
    with _scratch() as scratch:
        work = scratch / "tree"
        work.mkdir()
        ran = _run(scratch, ["fast-import", "--quiet"], work, _commit("old", old) + _commit("new", new))
        if ran.returncode:
            raise _refuse(ran, "compare the files")
        words = ["diff-tree", "-r", "-p", "--binary", "--full-index", "-M", "refs/heads/old", "refs/heads/new"]
        shown = _run(scratch, words, work)
        if _moves_a_folder_to_be([read_change(part) for part in split_diff(shown.stdout)]):
            shown = _run(scratch, [*words, "--no-renames"], work)
        if shown.returncode:
            raise _refuse(shown, "compare the files")
    parts: dict[str, bytes] = {}
    for part in split_diff(shown.stdout):
        change = read_change(part)
        name = change.new or change.old or ""
        parts[name] = parts.get(name, b"") + part
    return list(parts.values())


def _moves_a_folder_to_be(changes: Sequence[Change]) -> bool:
    """Whether a file moves away and its name becomes a folder, or the other way round.

    git does not apply that to a symlink, forth or back.
    """
    folders = folders_above(name for change in changes for name in (change.old, change.new) if name)
    moves = (change for change in changes if change.old and change.new and change.old != change.new)
    return any(move.old in folders or move.new in folders for move in moves)


def merge_contents(ours: bytes, base: bytes, theirs: bytes, labels: tuple[str, str, str]) -> tuple[bytes, int]:
    """Merge line by line; returns the merged bytes, with markers where both changed, and the number of conflicts.

    Binary files that both changed are one conflict, and stay `ours`.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-patch-") as name:
        scratch = Path(name)  # a folder without a repository: git needs none for this
        for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
            (scratch / name).write_bytes(data)
        words = ["merge-file", "-p", *(word for label in labels for word in ("-L", label)), "ours", "base", "theirs"]
        ran = _run(scratch, words, scratch)
    if ran.returncode > 127:
        return ours, 1
    return ran.stdout, ran.returncode
