"""How a patch set fares on other releases: tried on their files in memory, with no tree touched.

For each patch and release there is one outcome, the first that holds:

    clean             every hunk is found unaltered (perhaps on other lines)
    already upstream  the release has the change
    obsolete          a file, or every function and class that the patch changes, is gone; or what it changes was used
                      when the patch was made and nobody uses it any more
    three-way         a merge with the file it was made for leaves nothing open; so does one with a file that was moved
    conflict          a person has to look

Where the result is no Python any more, though the release's file is, a clean or three-way patch is a conflict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from flagscale.patch.diffs import Change, show_name, split_diff
from flagscale.patch.fit import Files, find_broken_python, merge_patch
from flagscale.patch.git import try_patches
from flagscale.patch.release import Release
from flagscale.patch.series import Patch, Series
from flagscale.patch.symbols import find_changed, find_defined, find_unused
from flagscale.patch.tree import Content

Kind = Literal["clean", "already upstream", "obsolete", "three-way", "conflict"]
KINDS: tuple[Kind, ...] = ("clean", "three-way", "conflict", "already upstream", "obsolete")
CARRIED: tuple[Kind, ...] = ("clean", "three-way")
Bases = Mapping[str, Mapping[str, Content]]
"""The files that each patch was made for, by its layer's and its own name: `Acme_X1/vllm/vllm/utils.py.patch`."""

SIMILAR = 0.5
"""How many of its lines a file that moved must share with the one that is gone, as git has it for renames."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a patch on a release; `note` says why, or where the file went."""

    series: str
    patch: str
    release: str
    kind: Kind
    note: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A verdict with the files that it leaves: those of the patch, None for one that is not there.

    before: the release's files that the patch touches, as they were
    """

    verdict: Verdict
    patch: Patch
    before: Mapping[str, Content]
    after: Mapping[str, Content | None]


@dataclass(frozen=True, slots=True)
class Symbols:
    """What a patch changes in Python files, by dotted names, and which of them were used where it was made."""

    changed: dict[str, frozenset[str]]
    used: frozenset[str]


def find_symbols(layers: Sequence[Series], bases: Bases, python: Iterable[bytes]) -> dict[str, Symbols]:
    """What every patch changes, by its layer's and its own name.

    python: the sources of the release that the patches were made for, to see what was used
    """
    changed = {
        f"{layer.name}/{patch.name}": _find_changed(patch, bases.get(f"{layer.name}/{patch.name}", {}))
        for layer in layers
        for patch in layer.patches
    }
    names = {key: frozenset[str]().union(*found.values()) for key, found in changed.items()}
    unused = find_unused(frozenset[str]().union(*names.values()), python)
    return {key: Symbols(found, names[key] - unused) for key, found in changed.items()}


def _find_changed(patch: Patch, base: Mapping[str, Content]) -> dict[str, frozenset[str]]:
    changed = {}
    for change, part in zip(patch.changes, split_diff(patch.diff), strict=False):
        if change.old and change.old.endswith(".py") and change.old in base:
            changed[change.old] = find_changed(base[change.old].data, part)
    return changed


def try_release(
    release: Release, layers: Sequence[Series], bases: Bases, symbols: Mapping[str, Symbols]
) -> list[Trial]:
    """Try every patch of the layers, each over what the layers below it leave.

    bases: of a patch, by its layer's and its own name: the files it was made for, as far as they can be had
    symbols: likewise, what it changes
    """
    now: Files = dict(release.files)
    unused = find_unused(frozenset[str]().union(*(found.used for found in symbols.values())), release.python)
    trials = []
    for layer in layers:
        names = {name for patch in layer.patches for name in patch.names}
        files = {name: now[name] for name in names if name in now}
        forth = try_patches(files, [patch.diff for patch in layer.patches])
        failed = [index for index in range(len(layer.patches)) if index in forth.rejected]
        back = try_patches(files, [layer.patches[index].diff for index in failed], reverse=True)
        for index, patch in enumerate(layer.patches):
            key = f"{layer.name}/{patch.name}"
            trial = Trial(Verdict(layer.name, patch.name, release.label, "conflict"), patch, _only(patch, files), {})
            if index not in forth.rejected:
                after = {name: forth.results.get(name) for name in patch.names}
                trial = _settle(trial, "clean", after)
            elif failed.index(index) not in back.rejected:
                trial = _settle(trial, "already upstream", {})
            else:
                trial = _merge(trial, release, bases.get(key, {}))
            trials.append(_look_at_symbols(trial, symbols.get(key), unused))
            if trials[-1].verdict.kind in CARRIED:
                for name, content in trials[-1].after.items():
                    if content is None:
                        now.pop(name, None)
                    else:
                        now[name] = content
    return trials


def _only(patch: Patch, files: Mapping[str, Content]) -> Files:
    return {name: files[name] for name in patch.names if name in files}


def _settle(trial: Trial, kind: Kind, after: Mapping[str, Content | None], note: str = "") -> Trial:
    """A trial that left `after`; it is a conflict if that is no Python any more."""
    there = {name: content for name, content in after.items() if content}
    broken = find_broken_python(trial.patch, trial.before, there)
    if broken:
        return replace(trial, verdict=replace(trial.verdict, kind="conflict", note=broken), after=after)
    return replace(trial, verdict=replace(trial.verdict, kind=kind, note=note), after=after)


def _merge(trial: Trial, release: Release, base: Mapping[str, Content]) -> Trial:
    patch = trial.patch
    gone = [change.old for change in patch.changes if change.old and change.old not in trial.before]
    if len(base) < sum(change.old is not None for change in patch.changes):
        kind: Kind = "obsolete" if gone else "conflict"
        note = f"{show_name(gone[0])} is gone" if gone else "the files it was made for are not at hand to merge with"
        return replace(trial, verdict=replace(trial.verdict, kind=kind, note=note))
    moved = {name: find_moved(name, base[name], release) for name in gone}
    if lost := [name for name, new in moved.items() if new is None]:
        return replace(trial, verdict=replace(trial.verdict, kind="obsolete", note=f"{show_name(lost[0])} is gone"))
    names = {name: new for name, new in moved.items() if new}
    ours = dict(trial.before) | {name: release.files[new] for name, new in names.items()}
    merged, conflicts = merge_patch(patch, ours, dict(base))
    after: dict[str, Content | None] = {
        names.get(name, name): merged.get(name) for name in patch.names if not (name in names and name not in merged)
    }
    before = dict(trial.before) | {new: release.files[new] for new in names.values()}
    note = ", ".join(f"{show_name(old)} moved to {show_name(new)}" for old, new in sorted(names.items()))
    trial = replace(trial, before=before)
    if conflicts:
        note = "; ".join(filter(None, [note, f"{conflicts} place{'s' * (conflicts > 1)} to merge by hand"]))
        return replace(trial, verdict=replace(trial.verdict, note=note), after=after)
    if all(before.get(name) == content for name, content in after.items()):
        return replace(trial, verdict=replace(trial.verdict, kind="already upstream", note=note))
    return _settle(trial, "three-way", after, note)


def find_moved(name: str, base: Content, release: Release) -> str | None:
    """The file of the release that a file which is gone has become: of the same name elsewhere, with like lines."""
    lines = set(base.data.split(b"\n"))
    kin = (other for other in release.files if other.rpartition("/")[2] == name.rpartition("/")[2] and other != name)
    shares = {other: _share(lines, set(release.files[other].data.split(b"\n"))) for other in kin}
    best = max(sorted(shares), key=shares.__getitem__, default=None)
    return best if best is not None and shares[best] >= SIMILAR else None


def _share(one: set[bytes], other: set[bytes]) -> float:
    return len(one & other) / max(len(one), len(other))


def _look_at_symbols(trial: Trial, symbols: Symbols | None, unused: Set[str]) -> Trial:
    """Call a patch obsolete if all that it changes is gone, or was used and is among the `unused` of the release."""
    if symbols is None or trial.verdict.kind in ("already upstream", "obsolete"):
        return trial
    gone: list[str] = []
    kept: list[str] = []
    for name, changed in symbols.changed.items():
        here = trial.before.get(name) or trial.before.get(_new_name(trial, name))
        there = find_defined(here.data) if here else frozenset()
        gone += sorted(changed - there)
        kept += sorted(changed & there)
    if gone and not kept:
        note = f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone"
        return replace(trial, verdict=replace(trial.verdict, kind="obsolete", note=note))
    if kept and set(kept) <= symbols.used & unused:
        note = f"nobody uses {', '.join(sorted(set(kept)))} any more"
        return replace(trial, verdict=replace(trial.verdict, kind="obsolete", note=note))
    return trial


def _new_name(trial: Trial, name: str) -> str:
    """Where a moved file of that name was found."""
    short = name.rpartition("/")[2]
    return next((other for other in trial.before if other.rpartition("/")[2] == short), name)


def collect_bases(
    layers: Sequence[Series], find_base: Callable[[str, str], bytes | None]
) -> dict[str, dict[str, Content]]:
    """The files that each patch was made for, as far as they can be had, by layer and patch name."""
    bases: dict[str, dict[str, Content]] = {}
    made: dict[str, bytes] = {}
    for layer in layers:
        results: Files = {}
        for patch in layer.patches:
            found = {}
            for name, sha in patch.base.items():
                data = made.get(f"{name}:{sha}") if sha else None
                data = find_base(name, sha) if sha and data is None else data
                if data is not None:
                    found[name] = Content(_old_mode(patch, name), data)
            bases[f"{layer.name}/{patch.name}"] = found
            results |= found
        after = try_patches(results, [patch.diff for patch in layer.patches]).results
        made |= {f"{name}:{content.digest.sha256}": content.data for name, content in after.items()}
    return bases


def _old_mode(patch: Patch, name: str) -> int:
    """The mode of a file before the patch, as its diff has it."""
    import re

    for change, part in zip(patch.changes, split_diff(patch.diff), strict=False):
        if change == Change(name, change.new):
            found = re.search(rb"^(?:old mode |deleted file mode |index \S+ )(\d{6})$", part, re.MULTILINE)
            if found:
                return int(found[1], 8)
    return 0o100644
