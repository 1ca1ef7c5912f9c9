"""How layers of patches fit the files they find: by hash, which is all that a tree at its pin needs, or by trial.

A patch is taken as it is where its files are byte for byte what its author had. Where a lower layer changed the file
first, the patch is tried on that layer's result: git must find every hunk's lines unaltered. Everything else (another
release, somebody's edits) is refused unless a three-way merge was asked for.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flagscale.patch.diffs import Hunk, apply_plain
from flagscale.patch.git import Attempt, make_diffs, merge_contents, try_patches
from flagscale.patch.series import Hashes, Patch, Series, hash_bytes
from flagscale.patch.tree import SYMLINK, Content, Digest

Files = dict[str, Content]
FindBase = Callable[[str, str], bytes | None]
"""(name, SHA-256) -> the file that a patch was made for, wherever it can be had."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """A patch that does not fit.

    wrong: files that are not what the patch was made for
    lower: the lower layer that changed one of them
    hunks: those that did not fit, all others do; empty if the patch fails as a whole or fits as it is
    fits: every hunk fits, though the files are others
    conflicts: how many places a three-way merge left open; None where none was tried or its base cannot be had
    why: another reason
    """

    series: str
    patch: Patch
    wrong: tuple[str, ...] = ()
    lower: str | None = None
    hunks: tuple[Hunk, ...] = ()
    fits: bool = False
    conflicts: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the layers make of the files.

    stream: the diff that makes it, of all layers
    expected: SHA-256 of the files afterwards
    base: the files before, as far as there are any
    misfits: what did not fit; unless it is empty, `stream` holds only what did
    notes: what a person should know: merges
    made: the files afterwards that are made already
    rest: the part of `stream` that is left to git
    """

    stream: bytes
    expected: Hashes
    base: dict[str, Digest]
    misfits: tuple[Misfit, ...] = ()
    notes: tuple[str, ...] = ()
    made: dict[str, bytes] = field(default_factory=dict)
    rest: bytes = b""


def hash_of(files: Mapping[str, Content], name: str) -> str | None:
    content = files.get(name)
    return hash_bytes(content.data) if content else None


def fit_by_hash(files: Files, layers: Sequence[Series]) -> Fit | None:
    """The fit of patches whose files are what they were made for; None if any is not, or two layers share a file.

    A file that only has lines changed is known by its result: a diff that was made of another file either does not
    fit or gives another one.
    """
    patches = [patch for layer in layers for patch in layer.patches]
    expected: Hashes = {}
    made: dict[str, bytes] = {}
    rest: list[bytes] = []
    for patch in patches:
        if expected.keys() & patch.result.keys():
            return None
        expected |= patch.result
        name = next(iter(patch.base))
        data = apply_plain(files[name].data, patch.diff) if len(patch.base) == 1 and name in files else None
        if data is not None and hash_bytes(data) == patch.result[name]:
            made[name] = data
        elif all(hash_of(files, name) == sha for name, sha in patch.base.items()):
            rest.append(patch.diff)
        else:
            return None
    base = {name: Digest(files[name].mode, sha) for patch in patches for name, sha in patch.base.items() if sha}
    return Fit(b"".join(layer.stream for layer in layers), expected, base, made=made, rest=b"".join(rest))


def fit_by_trial(files: Files, layers: Sequence[Series], find_base: FindBase | None = None) -> Fit:
    """Try every patch on what the files are; with `find_base`, merge what does not fit over what it was made for."""
    now, misfits, notes = dict(files), [], []
    owners: dict[str, str] = {}
    for layer in layers:
        before = dict(now)
        attempt = try_patches(_only(before, layer), [patch.diff for patch in layer.patches])
        for name in {name for patch in layer.patches for name in patch.names}:
            _set(now, name, attempt.results.get(name))
        for index, patch in enumerate(layer.patches):
            misfit = _judge(layer, patch, index, attempt, before, files, owners)
            if misfit and find_base:
                misfit, note = _merge(misfit, before, now, files, find_base)
                notes += [note] if note else []
            elif not misfit and any(hash_of(before, name) != patch.base.get(name) for name in patch.names):
                notes.append(f"{patch.name} of {layer.name} was applied over {', '.join(_lower(patch, owners))}")
            misfits += [misfit] if misfit else []
        owners |= {name: layer.name for patch in layer.patches for name in patch.names}
    names = {name for layer in layers for patch in layer.patches for name in patch.names}
    diffs = make_diffs({n: c for n, c in files.items() if n in names}, {n: c for n, c in now.items() if n in names})
    stream = b"".join(diffs)
    expected = {name: hash_of(now, name) for name in names}
    base = {name: files[name].digest for name in names if name in files}
    return Fit(stream, expected, base, tuple(misfits), tuple(notes), rest=stream)


def _set(files: Files, name: str, content: Content | None) -> None:
    if content is None:
        files.pop(name, None)
    else:
        files[name] = content


def _only(files: Files, layer: Series) -> Files:
    names = {name for patch in layer.patches for name in patch.names}
    return {name: content for name, content in files.items() if name in names}


def _lower(patch: Patch, owners: Mapping[str, str]) -> list[str]:
    return sorted({owners[name] for name in patch.names if name in owners})


def _judge(
    layer: Series, patch: Patch, index: int, attempt: Attempt, before: Files, pristine: Files, owners: Mapping[str, str]
) -> Misfit | None:
    wrong = tuple(sorted(name for name in patch.names if hash_of(before, name) != patch.base.get(name)))
    lower = ", ".join(_lower(patch, owners)) or None
    misfit = Misfit(layer.name, patch, wrong, lower)
    if index in attempt.rejected:
        return replace(misfit, hunks=attempt.rejected[index])
    over_lower = lower is not None and all(hash_of(pristine, name) == patch.base.get(name) for name in wrong)
    if wrong and not over_lower:
        return replace(misfit, fits=True)
    if wrong:
        broken = find_broken_python(patch, before, attempt.results)
    else:
        other = sorted(name for name in patch.names if hash_of(attempt.results, name) != patch.result.get(name))
        broken = f"makes something else of {', '.join(other)} than the series promises" if other else None
    return replace(misfit, why=broken) if broken else None


def find_broken_python(patch: Patch, before: Mapping[str, Content], after: Mapping[str, Content]) -> str | None:
    """What is wrong if a Python file could be parsed before the patch and cannot be after it."""
    for change in patch.changes:
        if not change.new or not change.new.endswith(".py") or change.new not in after:
            continue
        error = find_syntax_error(after[change.new])
        if error and not (change.old and change.old in before and find_syntax_error(before[change.old])):
            return f"{change.new} is no Python any more: {error}"
    return None


def find_syntax_error(content: Content) -> str | None:
    if content.mode == SYMLINK:
        return None
    try:
        ast.parse(content.data)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return None


def _merge(
    misfit: Misfit, before: Files, now: Files, pristine: Files, find_base: FindBase
) -> tuple[Misfit | None, str | None]:
    """Merge a patch that does not fit as it is; changes `now` where nothing is left open."""
    patch = misfit.patch
    if misfit.fits:
        return (
            None,
            f"{patch.name}: every hunk fits, though {', '.join(misfit.wrong)} is another file than it was made for",
        )
    base: Files = {}
    for name, sha in patch.base.items():
        if sha is None:
            continue
        data = pristine[name].data if hash_of(pristine, name) == sha else find_base(name, sha)
        if data is None or name not in before:
            return misfit, None
        base[name] = Content(before[name].mode, data)
    merged, conflicts = merge_patch(patch, before, base)
    if conflicts:
        return replace(misfit, conflicts=conflicts), None
    for name in patch.names:
        _set(now, name, merged.get(name))
    broken = find_broken_python(patch, before, merged)
    return (replace(misfit, why=broken), None) if broken else (None, f"{patch.name}: merged with its base")


def make_result(patch: Patch, base: Files) -> Mapping[str, Content]:
    """What a patch makes of the files that it was made for."""
    if len(base) == 1:
        ((name, content),) = base.items()
        data = apply_plain(content.data, patch.diff)
        if data is not None and hash_bytes(data) == patch.result.get(name):
            return {name: Content(content.mode, data)}
    return try_patches(base, [patch.diff]).results


def merge_patch(patch: Patch, ours: Mapping[str, Content], base: Files) -> tuple[Files, int]:
    """Merge what a patch makes of its base into `ours`; returns the files and how many places are left open."""
    theirs = make_result(patch, base)
    merged: Files = {}
    conflicts = 0
    for change in patch.changes:
        if change.new is None:
            conflicts += ours.get(change.old or "") not in (None, base.get(change.old or ""))
        elif change.old is None:
            merged[change.new] = theirs[change.new]
            conflicts += change.new in ours and ours[change.new] != theirs[change.new]
        else:
            labels = ("here", f"base of {patch.name}", patch.name)
            mine, was, want = ours[change.old], base[change.old], theirs[change.new]
            data, count = merge_contents(mine.data, was.data, want.data, labels)
            merged[change.new] = Content(want.mode if want.mode != was.mode else mine.mode, data)
            conflicts += count
    return merged, conflicts
