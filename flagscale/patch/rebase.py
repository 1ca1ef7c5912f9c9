"""Carrying a patch set to another release: what carries over is rewritten, and a person is asked about the rest.

What is left open lies in a working folder `<series>.rebase`: the release's files under `old`, the same with all that
carried over under `new`, with conflict markers where there is something to decide. Whoever has solved them continues,
and the series is made of the difference between the two folders. Until then the series is as it was.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flagscale.errors import PatchError, UserError
from flagscale.patch.diffs import show_name
from flagscale.patch.export import make_patches, target_of, write_series
from flagscale.patch.fit import Files
from flagscale.patch.series import Header, Series, load_series
from flagscale.patch.tree import Content, list_files, read_content, write_content
from flagscale.patch.verify import CARRIED, Trial

PLAN = "rebase.json"
MARKERS = re.compile(rb"^(<<<<<<< |>>>>>>> |=======$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Rebased:
    """What a rebase did.

    work: the folder in which something is left to do; None if the series was rewritten
    todo: each patch that is left, with what to do
    dropped: each patch that the series does not have any more, with why
    """

    series: Series
    work: Path | None = None
    todo: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def work_folder(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.rebase"


def rebase_series(folder: Path, trials: Sequence[Trial], version: str, digest: str) -> Rebased:
    """Rewrite the series in `folder` for the release that its patches were tried on.

    Raises:
        UserError: a rebase of it is under way.
    """
    work = work_folder(folder)
    if work.exists():
        raise UserError(f"{work}: a rebase is under way; solve it and --continue, or --abort it")
    series = load_series(folder)
    draft = replace(series, version=version, digest=digest, patches=())
    old: Files = {}
    new: Files = {}
    headers: dict[str, Header] = {}
    dropped: list[str] = []
    todo: dict[str, str] = {}
    for trial in trials:
        name, verdict = show_name(trial.patch.name), trial.verdict
        if verdict.kind == "already upstream":
            dropped.append(f"{name}: already upstream")
            continue
        old |= trial.before
        new |= {path: content for path, content in _result(trial).items() if content}
        headers |= _headers(trial)
        if verdict.kind not in CARRIED:
            todo[trial.patch.name] = f"{name}: {verdict.kind}" + (f", {verdict.note}" if verdict.note else "")
    if not todo:
        return _finish(folder, draft, old, new, headers, dropped)
    _write_work(work, draft, old, new, headers, dropped, trials, todo)
    return Rebased(draft, work, tuple(todo.values()), tuple(dropped))


def _result(trial: Trial) -> Mapping[str, Content | None]:
    """The patched files; of a patch that nothing could be merged of, the release's own."""
    return trial.after if trial.after else trial.before


def _headers(trial: Trial) -> dict[str, Header]:
    names = {target_of(trial.patch.changes), *(name for name, content in trial.after.items() if content)}
    return dict.fromkeys(names, trial.patch.header)


def _finish(
    folder: Path, draft: Series, old: Files, new: Files, headers: Mapping[str, Header], dropped: Sequence[str]
) -> Rebased:
    patches = make_patches(old, new, headers, None)
    if not patches:
        raise PatchError(f"{folder}: upstream has all of it, nothing is left of the series; delete the folder")
    series = replace(draft, patches=patches)
    write_series(folder, series)
    return Rebased(series, dropped=tuple(dropped))


def _write_work(
    work: Path,
    draft: Series,
    old: Files,
    new: Files,
    headers: Mapping[str, Header],
    dropped: Sequence[str],
    trials: Sequence[Trial],
    todo: Mapping[str, str],
) -> None:
    part = work.with_name(f".{work.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for side, files in (("old", old), ("new", new)):
        (part / side).mkdir(parents=True)
        for name, content in files.items():
            write_content(part / side / name, content)
    for trial in trials:
        if trial.patch.name in todo:
            path = part / "patches" / trial.patch.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(trial.patch.header.render().encode() + trial.patch.diff)
    plan = {
        "version": draft.version,
        "digest": draft.digest,
        "headers": {name: dataclasses.asdict(header) for name, header in headers.items()},
        "dropped": list(dropped),
        "todo": list(todo.values()),
    }
    (part / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
    part.rename(work)


def _read_folder(folder: Path) -> Files:
    return {name: content for name, _ in list_files(folder) if (content := read_content(folder, name))}


def continue_rebase(folder: Path) -> Rebased:
    """Make the series of what a person left in the working folder, and remove that.

    Raises:
        UserError: none is under way.
        PatchError: markers are left.
    """
    work = work_folder(folder)
    try:
        plan: dict[str, Any] = json.loads((work / PLAN).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no rebase of it is under way") from None
    old, new = _read_folder(work / "old"), _read_folder(work / "new")
    open_files = sorted(
        name for name, content in new.items() if MARKERS.search(content.data) and not _same(old, name, content)
    )
    if open_files:
        listed = "\n  ".join(str(work / "new" / name) for name in open_files)
        raise PatchError(f"these files still have conflict markers:\n  {listed}")
    headers = {name: Header(**row) for name, row in plan["headers"].items()}
    before = load_series(folder)
    draft = replace(before, version=plan["version"], digest=plan["digest"], patches=())
    done = _finish(folder, draft, old, new, headers, plan["dropped"])
    shutil.rmtree(work)
    kept = {patch.name for patch in done.series.patches}
    told = {line.partition(": ")[0] for line in done.dropped}
    gone = [show_name(patch.name) for patch in before.patches if patch.name not in kept]
    lost = tuple(f"{name}: nothing is left of it" for name in gone if name not in told)
    return replace(done, dropped=(*done.dropped, *lost))


def _same(old: Files, name: str, content: Content) -> bool:
    return old.get(name) == content


def abort_rebase(folder: Path) -> None:
    """Forget a rebase that is under way; the series is as it was.

    Raises:
        UserError: none is under way.
    """
    work = work_folder(folder)
    if not (work / PLAN).exists():
        raise UserError(f"{folder}: no rebase of it is under way")
    shutil.rmtree(work)
