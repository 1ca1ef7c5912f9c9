"""One tree for each chip, beside upstream's: `third_party/<backend>/src` stays as it was published, and
`third_party/<backend>/<Vendor_Chip>` is a copy of it with that chip's patch sets.

Two chips may share a machine, and a job may run on hosts with different ones, so no tree can be everybody's. The price
is a copy on disk for each chip, in which only patched files differ; what it buys is that nothing is ever patched and
unpatched beneath a running job, and that a job's path says which patches it runs on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from flagscale.errors import SourceError
from flagscale.patch.apply import Outcome, apply_series
from flagscale.patch.index import Progress, ignore_progress
from flagscale.patch.pins import Pin
from flagscale.patch.series import COMMON, SERIES_FILE, Series, load_series
from flagscale.patch.source import MANIFEST, fetch_source, load_manifest, one_at_a_time
from flagscale.patch.state import read_state


def load_layers(hardware: Path, backend: str, chip: str) -> tuple[Series, ...]:
    """The patch sets of a backend (`Megatron-LM`) on a chip, lowest first: the one for every chip, then the chip's own.

    Raises:
        UserError: all that is wrong with one of them.
    """
    folders = (hardware / name / backend for name in (COMMON, chip))
    return tuple(load_series(folder) for folder in folders if (folder / SERIES_FILE).is_file())


def list_chip_trees(source: Path) -> tuple[Path, ...]:
    """The trees of chips that lie beside a fetched source."""
    return tuple(sorted(path.parent for path in source.parent.glob(f"*/{MANIFEST}") if path.parent != source))


def lay_tree(
    pin: Pin,
    source: Path,
    chip: str,
    layers: Sequence[Series],
    progress: Progress = ignore_progress,
    replace: bool = False,
) -> Outcome:
    """Make the tree of a chip, beside the fetched `source`, hold the pinned source with the layers' patches.

    What is so already is left alone; a tree of an older pin is made anew.

    source: fetched if it is not there
    replace: discard what someone has changed

    Raises:
        SourceError: the source cannot be had, or a tree that someone has changed is in the way.
        PatchError: a patch does not fit, a patched file was edited, or the tree's record cannot be read; the tree is
            as it was.
    """
    fetch_source(pin, source, progress, replace)
    tree = source.parent / chip
    with one_at_a_time(tree.parent):
        if _must_copy(pin, tree, replace):
            fresh = tree.parent / f".new-{chip}"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(source, fresh, symlinks=True)
            try:
                outcome = apply_series(fresh, layers)
                if tree.exists():
                    shutil.rmtree(tree)
                fresh.rename(tree)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            return outcome
        return apply_series(tree, layers)


def _must_copy(pin: Pin, tree: Path, replace: bool) -> bool:
    """
    Raises:
        SourceError: the tree would have to be made anew, and someone has changed it.
    """
    if replace:
        return True
    state = read_state(tree)
    if state.kind == "absent":
        return True
    manifest = load_manifest(tree)
    if manifest and manifest["pin"] == pin.digest:
        return False
    if state.kind in ("drifted", "unknown"):
        shown = "\n  ".join(state.changed[:10] or ("it was not fetched by this toolkit",))
        raise SourceError(
            f"{tree} is of another pin, and was changed:\n  {shown}\n"
            "Keep your changes elsewhere, then fetch with --replace to discard them."
        )
    return True
