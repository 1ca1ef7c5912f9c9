"""What upstream's bytes are: by the manifest of a fetched source, by git, or by the RECORD of an installed package.

All three promise a hash for every file; only git can also give the file back. In a fetched source that is a git tree,
upstream is its first commit; in a clone that somebody made, the commit that is checked out.
"""

import base64
import csv
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import UserError
from flagscale.patch.tree import SOURCE_MANIFEST, Content, is_derived, list_files, read_content

Hash = Callable[[Content], str]


@dataclass(frozen=True, slots=True)
class Upstream:
    """The promised hash of every file of `tree`, and how such a hash is made.

    modes: their git modes, where they are known
    commit: the git commit that holds the files, or None where there is no git
    """

    tree: Path
    hashes: dict[str, str]
    make_hash: Hash
    modes: dict[str, int] = field(default_factory=dict)
    commit: str | None = None

    def names(self) -> set[str]:
        return set(self.hashes)

    def matches(self, name: str, content: Content | None) -> bool:
        """Whether a file of that name and content is upstream's."""
        if content is None or self.hashes.get(name) != self.make_hash(content):
            return False
        return self.modes.get(name, content.mode) == content.mode

    def is_same(self, name: str) -> bool:
        """Whether the file is there and is upstream's."""
        return self.matches(name, read_content(self.tree, name))

    def read(self, name: str) -> Content | None:
        """Upstream's file: from disk while it is there, else from git."""
        content = read_content(self.tree, name)
        if self.matches(name, content):
            return content
        if self.commit is None or name not in self.hashes:
            return None
        shown = run_git(self.tree, "cat-file", "blob", self.hashes[name])
        return Content(self.modes[name], shown.stdout) if shown.returncode == 0 else None

    def without_ignored(self, names: set[str]) -> set[str]:
        """Those of `names` that git does not ignore; all of them where there is no git."""
        if not names or self.commit is None:
            return names
        listed = b"\0".join(os.fsencode(name) for name in names)
        ignored = run_git(self.tree, "check-ignore", "-z", "--stdin", stdin=listed).stdout
        return names - set(map(os.fsdecode, ignored.split(b"\0")))


def run_git(tree: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A git command in the repository whose top is `tree`, and in no repository around it."""
    environ = {**os.environ, "LC_ALL": "C", "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        environ.pop(name, None)
    environ["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-c", f"safe.directory={tree.resolve()}", *words]
    return subprocess.run(command, cwd=tree, env=environ, input=stdin, capture_output=True, check=False)


def _sha256(content: Content) -> str:
    return hashlib.sha256(content.data).hexdigest()


def _git_blob(content: Content) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content.data) + content.data, usedforsecurity=False).hexdigest()


def _record_hash(content: Content) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content.data).digest()).rstrip(b"=").decode()


def find_commit(tree: Path) -> str | None:
    """The commit of the git tree that is upstream's: the first one of a fetched source, else the one checked out."""
    if not (tree / ".git").exists():
        return None
    words = ("rev-list", "--max-parents=0", "HEAD") if (tree / SOURCE_MANIFEST).exists() else ("rev-parse", "HEAD")
    found = run_git(tree, *words).stdout.decode().split()
    return found[-1] if found else None


def of_commit(tree: Path, commit: str) -> Upstream:
    """Upstream as a commit of the tree's own git has it.

    Raises:
        UserError: there is no such commit.
    """
    listed = run_git(tree, "ls-tree", "-r", "-z", commit)
    if listed.returncode:
        raise UserError(f"{commit}: no commit of {tree}: {listed.stderr.decode(errors='replace').strip()}")
    rows = listed.stdout.split(b"\0")
    hashes, modes = {}, {}
    for row in filter(None, rows):
        head, _, name = row.partition(b"\t")
        mode, kind, blob = head.decode().split()
        path = os.fsdecode(name)
        if kind == "blob" and path != SOURCE_MANIFEST and not is_derived(path):
            hashes[path], modes[path] = blob, int(mode, 8)
    return Upstream(tree, hashes, _git_blob, modes, commit)


def of_folder(folder: Path) -> Upstream:
    """Upstream as an untouched copy of it has it."""
    files = {name: content for name, _ in list_files(folder) if (content := read_content(folder, name))}
    hashes = {name: _sha256(content) for name, content in files.items()}
    return Upstream(folder, hashes, _sha256, {name: content.mode for name, content in files.items()})


def _of_git(tree: Path) -> Upstream | None:
    commit = find_commit(tree)
    return of_commit(tree, commit) if commit else None


def _of_manifest(tree: Path) -> Upstream | None:
    try:
        files: dict[str, str] = json.loads((tree / SOURCE_MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Upstream(tree, files, _sha256)


def find_dist_info(package: Path) -> Path | None:
    """The `.dist-info` folder beside an installed package whose RECORD lists the package's files."""
    wanted = package.name.lower()
    records = sorted(package.parent.glob("*.dist-info/RECORD"), key=lambda path: wanted not in path.parent.name.lower())
    line = f"\n{package.name}/__init__.py,".encode()
    within = f"\n{package.name}/".encode()
    for sought in (line, within):
        for record in records:
            if sought in b"\n" + record.read_bytes():
                return record.parent
    return None


def _of_record(tree: Path) -> Upstream | None:
    info = find_dist_info(tree)
    if info is None:
        return None
    prefix = f"{tree.name}/"
    with (info / "RECORD").open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) > 1 and row[0].startswith(prefix) and row[1]]
    hashes = {name.removeprefix(prefix): promised for name, promised, *_ in rows if not is_derived(name)}
    return Upstream(tree, hashes, _record_hash)


def find_upstream(tree: Path) -> Upstream | None:
    """What is known of upstream's bytes, or None: a folder without manifest, git or RECORD."""
    finders: Iterable[Callable[[Path], Upstream | None]] = (_of_git, _of_manifest, _of_record)
    return next((found for find in finders if (found := find(tree)) is not None), None)
