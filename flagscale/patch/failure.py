"""Why a patch does not fit, told so that a person can act: which file and hunk, what stands there, who moved it."""

import os
from collections.abc import Mapping, Sequence

from flagscale.patch.diffs import Hunk, read_hunks, show_name, split_diff
from flagscale.patch.fit import Misfit
from flagscale.patch.tree import Content
from flagscale.patch.upstream import Upstream, run_git

MARGIN = 2
MAX_LINES = 14


def explain_misfit(misfit: Misfit, files: Mapping[str, Content], upstream: Upstream | None) -> str:
    """Some lines about one patch: the first names it, the others are indented."""
    out = [f"{show_name(misfit.patch.name)} ({misfit.series}): {_head(misfit, files, upstream)}"]
    for hunk in misfit.hunks:
        out += _explain_hunk(misfit, hunk, files)
        if upstream and (moved := find_mover(upstream, _name_of(misfit), hunk, files)):
            out.append(f"  changed upstream by {moved}")
    return "\n    ".join(out)


def _name_of(misfit: Misfit) -> str:
    change = misfit.patch.changes[0]
    return change.old or change.new or ""


def _head(misfit: Misfit, files: Mapping[str, Content], upstream: Upstream | None) -> str:
    if misfit.why:
        return misfit.why
    missing = [n for n in misfit.wrong if n not in files and misfit.patch.base.get(n)]
    in_the_way = [n for n in misfit.wrong if n in files and not misfit.patch.base.get(n)]
    if missing:
        gone = find_remover(upstream, missing[0]) if upstream else None
        return f"there is no {_names(missing)}" + (f"; removed upstream by {gone}" if gone else "")
    if in_the_way:
        return f"makes {_names(in_the_way)}, which is there already; --stash keeps it elsewhere"
    if misfit.conflicts:
        return f"a three-way merge leaves {misfit.conflicts} place{'s' * (misfit.conflicts > 1)} open"
    if misfit.lower and misfit.hunks:
        return f"changes the lines of {_names(misfit.patch.names)} that {misfit.lower} changes"
    edited = [n for n in misfit.wrong if upstream and n in upstream.hashes and not upstream.is_same(n)]
    if edited:
        return f"{_names(edited)} was edited here; --stash keeps the edits as a patch, --3way merges them"
    if misfit.fits:
        return f"{_names(misfit.wrong)} is not the file that it was made for, though its hunks fit; --3way takes them"
    return f"does not fit {_names(misfit.wrong or misfit.patch.names)}"


def _names(names: Sequence[str] | set[str]) -> str:
    return ", ".join(map(show_name, sorted(names)))


def _explain_hunk(misfit: Misfit, hunk: Hunk, files: Mapping[str, Content]) -> list[str]:
    all_hunks = [found for part in split_diff(misfit.patch.diff) for found in read_hunks(part)]
    number = all_hunks.index(hunk) + 1
    name = _name_of(misfit)
    content = files.get(name)
    lines = content.data.split(b"\n") if content else []
    at, size = find_place(lines, hunk), len(hunk.before)
    out = [f"hunk {number} of {len(all_hunks)}, line {hunk.start} of {show_name(name)}, expects"]
    out += _shown(hunk.before, hunk.start)
    out += [f"and finds{'' if at + 1 == hunk.start else f', from line {at + 1} on'}"]
    return out + (_shown(lines[at : at + size], at + 1) or ["  nothing: the file ends before"])


def _shown(lines: Sequence[bytes], first: int) -> list[str]:
    shown = [f"  {first + i:>5} | {line.decode(errors='replace')}" for i, line in enumerate(lines[:MAX_LINES])]
    return shown + ([f"        .. and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])


def find_place(lines: Sequence[bytes], hunk: Hunk) -> int:
    """The index of the line at which most of the hunk's lines are found; where it was meant to be, if none are."""
    meant = max(hunk.start - 1, 0)
    where: dict[bytes, list[int]] = {}
    for index, line in enumerate(lines):
        if line.strip():
            where.setdefault(line, []).append(index)
    votes: dict[int, float] = {}
    for offset, line in enumerate(hunk.before):
        places = where.get(line, [])
        for index in places:
            start = max(index - offset, 0)
            votes[start] = votes.get(start, 0) + 1 / len(places)
    return min(votes, key=lambda start: (-votes[start], abs(start - meant)), default=min(meant, len(lines)))


def find_mover(upstream: Upstream, name: str, hunk: Hunk, files: Mapping[str, Content]) -> str | None:
    """`<commit> <date> <subject>` of the last commit that changed the lines a hunk expects, where git knows it.

    None too where upstream's file still has the lines: then they were changed here.
    """
    if upstream.commit is None:
        return None
    present = set(files[name].data.split(b"\n")) if name in files else set()
    gone = [line for line in hunk.before if line.strip() and line not in present]
    sought = gone[0] if gone else b"\n".join(hunk.before)
    original = upstream.read(name)
    if original and b"\n%b\n" % sought in b"\n%b\n" % original.data:
        return None
    return _last_commit(upstream, f"-S{os.fsdecode(sought)}", name=name)


def find_remover(upstream: Upstream, name: str) -> str | None:
    """The commit that deleted or moved a file."""
    return _last_commit(upstream, "--diff-filter=DR", name=name) if upstream.commit else None


def _last_commit(upstream: Upstream, *words: str, name: str) -> str | None:
    shown = ("log", "-1", "--no-renames", "--format=%h %cs %s")
    found = run_git(upstream.tree, *shown, *words, str(upstream.commit), "--", name).stdout
    return found.decode(errors="replace").strip() or None
