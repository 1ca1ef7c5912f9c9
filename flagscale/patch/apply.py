"""Apply a patch set to a tree, and take it out again: all of it or nothing, with the tree's own edits kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flagscale.errors import PatchError
from flagscale.patch.build import REJECTS_DIR, Files, build_patched, build_unpatched, load_diff, read_base
from flagscale.patch.diffs import show_name
from flagscale.patch.failure import explain_misfit
from flagscale.patch.fit import FindBase, Fit, fit_by_hash, fit_by_trial
from flagscale.patch.series import Series, hash_layers
from flagscale.patch.stash import Edits, take_result_edits, take_source_edits
from flagscale.patch.state import Record, find_edits, load_record
from flagscale.patch.swap import hold_tree, rebuild, remove_old, see_results
from flagscale.patch.upstream import Upstream, find_upstream


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did, or would do.

    diff: what the patches change, all together
    rejects: patches that did not fit (`partial`), each with where its rest is
    stash: the file that keeps local edits
    kept: where files are that somebody wrote into the old tree while the new one was built
    """

    changed: bool
    diff: bytes = b""
    notes: tuple[str, ...] = ()
    rejects: tuple[str, ...] = ()
    stash: Path | None = None
    kept: Path | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How to apply.

    find_base: merge what does not fit (three-way), with the base files that this finds
    partial: apply what fits and write the rest into `.flagscale-patch/rejects`
    stash: keep edits of files that patches touch as a diff in `<tree>.stash/`, and take them out
    dry_run: change nothing; the outcome holds the diff
    """

    find_base: FindBase | None = None
    partial: bool = False
    stash: bool = False
    dry_run: bool = False


def apply_series(tree: Path, layers: Sequence[Series], options: Options = Options()) -> Outcome:
    """Make the tree upstream's files with the layers' patches, lowest layer first; files no patch touches are left.

    Raises:
        PatchError: a patch does not fit, or edits would be lost; all of them are named, and the tree is as it was.
    """
    _check_tree(tree)
    with hold_tree(tree) as hold:
        record = load_record(hold.tree)
        draft = _draft_record(layers, record)
        seen = see_results(hold.tree, record)
        edits = find_edits(hold.tree, record) if record else ()
        if record and record.patches == draft.patches and not edits:
            return Outcome(False, load_diff(hold.tree), ("the tree is as the series made it: nothing to do",))
        taken = take_result_edits(hold.tree, record, edits, options.stash)
        fit = _fit(hold.tree, record, layers, taken, options)
        rejects = _tell_rejects(fit)
        if options.dry_run:
            return Outcome(True, fit.stream, fit.notes, rejects)
        stash = taken.write(hold.tree)
        draft = replace(draft, stash=(*draft.stash, str(stash)) if stash else draft.stash)
        with rebuild(hold) as fresh:
            unpatched = build_unpatched(hold.tree, fresh, record)
            taken.put_originals(fresh)
            build_patched(hold, fresh, unpatched, fit, draft)
        kept = remove_old(hold, unpatched.files, taken.made(hold.work / "tree", seen))
    return Outcome(True, fit.stream, fit.notes, rejects, stash, kept)


def revert_tree(tree: Path, *, stash: bool = False, dry_run: bool = False) -> Outcome:
    """Give the tree the files back that it had before patches, byte for byte; a tree without patches is left alone.

    stash: keep edits of patched files as a diff in `<tree>.stash/`

    Raises:
        PatchError: patched files were edited and `stash` is not given.
    """
    _check_tree(tree)
    with hold_tree(tree) as hold:
        record = load_record(hold.tree)
        if record is None:
            return Outcome(False, notes=("there are no patches in it",))
        seen = see_results(hold.tree, record)
        taken = take_result_edits(hold.tree, record, find_edits(hold.tree, record), stash)
        told = tuple(f"earlier edits are kept in {path}; `git apply` brings them back" for path in record.stash)
        if dry_run:
            return Outcome(True, load_diff(hold.tree), told)
        kept_in = taken.write(hold.tree)
        with rebuild(hold) as fresh:
            unpatched = build_unpatched(hold.tree, fresh, record)
        kept = remove_old(hold, unpatched.files, taken.made(hold.work / "tree", seen))
    return Outcome(True, b"", told, stash=kept_in, kept=kept)


def _check_tree(tree: Path) -> None:
    if not tree.is_dir():
        raise PatchError(f"{tree}: there is no such folder")


def _draft_record(layers: Sequence[Series], record: Record | None) -> Record:
    return Record(
        series=tuple(layer.name for layer in layers),
        pins=tuple(layer.made_for for layer in layers),
        patches=hash_layers(layers),
        touched={},
        stash=record.stash if record else (),
    )


def _fit(tree: Path, record: Record | None, layers: Sequence[Series], taken: Edits, options: Options) -> Fit:
    """Fit the layers to the files without patches; edits that are stashed go into `taken`.

    Raises:
        PatchError: what does not fit.
    """
    files = read_base(tree, record, {name for layer in layers for patch in layer.patches for name in patch.names})
    fit = fit_by_hash(files, layers)
    if fit:
        return fit
    upstream = find_upstream(tree)
    take_source_edits(taken, files, layers, upstream, options.stash)
    fit = fit_by_hash(files, layers) or fit_by_trial(files, layers, options.find_base)
    if options.partial:
        return replace(fit, misfits=tuple(misfit for misfit in fit.misfits if not misfit.fits))
    if fit.misfits:
        raise PatchError(_tell_misfits(fit, files, layers, upstream, tree))
    return fit


def _tell_misfits(fit: Fit, files: Files, layers: Sequence[Series], upstream: Upstream | None, tree: Path) -> str:
    count = sum(len(layer.patches) for layer in layers)
    told = "\n  ".join(explain_misfit(misfit, files, upstream) for misfit in fit.misfits)
    made_for = ", ".join(sorted({layer.made_for for layer in layers}))
    return (
        f"{tree}: {len(fit.misfits)} of {count} patches do not fit (made for {made_for}); nothing was changed\n  {told}"
    )


def _tell_rejects(fit: Fit) -> tuple[str, ...]:
    names = (show_name(misfit.patch.name) for misfit in fit.misfits)
    counts = (f"{len(misfit.hunks)} hunks" if misfit.hunks else "all of it" for misfit in fit.misfits)
    return tuple(f"{name}: {count} left, see {REJECTS_DIR}/{name}" for name, count in zip(names, counts, strict=True))
