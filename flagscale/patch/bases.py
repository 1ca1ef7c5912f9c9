"""Where the file that a patch was made for can be had: on disk, in the tree's own history, in a fetched source.

A series keeps the SHA-256 of its base files and not the files, which are upstream's to keep. A three-way merge needs
the file itself; it is looked up by name and hash, so a wrong one is never taken.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from flagscale.patch.fit import FindBase
from flagscale.patch.series import hash_bytes
from flagscale.patch.upstream import Upstream, find_upstream, run_git

MAX_COMMITS = 300
Reader = Callable[[str], bytes | None]


def find_in_history(upstream: Upstream, name: str, sha: str) -> bytes | None:
    """The file as one of the commits has it that changed it, the newest of them first."""
    listed = run_git(upstream.tree, "rev-list", f"--max-count={MAX_COMMITS}", "--all", "--", name).stdout.decode()
    wanted = "".join(f"{commit}:{name}\n" for commit in listed.split()).encode(errors="surrogateescape")
    rest = run_git(upstream.tree, "cat-file", "--batch", stdin=wanted).stdout if listed and "\n" not in name else b""
    while rest:
        head, _, rest = rest.partition(b"\n")
        if head.endswith(b" missing"):
            continue
        size = int(head.rsplit(b" ", 1)[1])
        data, rest = rest[:size], rest[size + 1 :]
        if hash_bytes(data) == sha:
            return data
    return None


def make_find_base(trees: Iterable[Path], readers: Iterable[Reader] = ()) -> FindBase:
    """Look a base file up in trees that have upstream's bytes, by manifest or by git, then by `readers`.

    readers: give the bytes of a name, or None; asked in order, and once a name
    """
    known = [found for tree in trees if tree.is_dir() and (found := find_upstream(tree))]

    def find(name: str, sha: str) -> bytes | None:
        for upstream in known:
            content = upstream.read(name)
            if content and hash_bytes(content.data) == sha:
                return content.data
        for upstream in known:
            if upstream.commit and (data := find_in_history(upstream, name, sha)) is not None:
                return data
        return next((d for read in readers if (d := read(name)) is not None and hash_bytes(d) == sha), None)

    return find
