"""A patch set against many releases, in parallel, and how it decays: as a matrix, a curve, a picture."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from flagscale.patch.diffs import show_name
from flagscale.patch.release import Place, load_release
from flagscale.patch.series import Series
from flagscale.patch.verify import CARRIED, KINDS, Bases, Kind, Symbols, Trial, Verdict, find_symbols, try_release

SIGNS: dict[Kind, str] = {"clean": "+", "three-way": "3", "conflict": "X", "already upstream": "u", "obsolete": "o"}
COLOURS: dict[Kind, str] = {
    "clean": "#2a7f3f",
    "three-way": "#8fbf6a",
    "conflict": "#c0392b",
    "already upstream": "#7f8c9b",
    "obsolete": "#c9ced4",
}
BAR_WIDTH = 40


def wanted_names(layers: Sequence[Series]) -> frozenset[str]:
    return frozenset(name for layer in layers for patch in layer.patches for name in patch.names)


def collect_symbols(layers: Sequence[Series], bases: Bases, home: Place | None) -> dict[str, Symbols]:
    """What every patch changes; `home` is the release it was made for, to see what was used there."""
    return find_symbols(layers, bases, load_release(home, frozenset()).python if home else ())


def try_place(place: Place, layers: Sequence[Series], bases: Bases, symbols: Mapping[str, Symbols]) -> list[Trial]:
    """Try the layers on the release at `place`."""
    return try_release(load_release(place, wanted_names(layers)), layers, bases, symbols)


def _judge_place(layers: Sequence[Series], bases: Bases, symbols: Mapping[str, Symbols], place: Place) -> list[Verdict]:
    return [trial.verdict for trial in try_place(place, layers, bases, symbols)]


def verify(
    layers: Sequence[Series], places: Sequence[Place], bases: Bases, home: Place | None = None
) -> list[list[Verdict]]:
    """The verdicts on every patch, release by release, in as many processes as there are cores.

    Raises:
        SourceError: an archive is damaged.
    """
    judge = partial(_judge_place, tuple(layers), bases, collect_symbols(layers, bases, home))
    num_workers = min(len(places), len(os.sched_getaffinity(0)))
    if num_workers <= 1:
        return [judge(place) for place in places]
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(judge, places))


def count_kinds(verdicts: Sequence[Verdict]) -> Counter[Kind]:
    return Counter(verdict.kind for verdict in verdicts)


def render_matrix(columns: Sequence[Sequence[Verdict]]) -> str:
    """One row a patch, one column a release, and below the curve: the share of patches that carry over."""
    rows = list(zip(*columns, strict=True))
    labels = [column[0].release for column in columns]
    width = max(len(show_name(row[0].patch)) for row in rows)
    cells = [max(len(label), 3) for label in labels]
    out = [" " * width + "  " + "  ".join(label.rjust(cell) for label, cell in zip(labels, cells, strict=True))]
    for row in rows:
        signs = "  ".join(SIGNS[verdict.kind].rjust(cell) for verdict, cell in zip(row, cells, strict=True))
        out.append(f"{show_name(row[0].patch):<{width}}  {signs}")
    out += ["", "  ".join(f"{sign} {kind}" for kind, sign in SIGNS.items()), ""]
    label_width = max(map(len, labels))
    for label, column in zip(labels, columns, strict=True):
        counts = count_kinds(column)
        share = sum(counts[kind] for kind in CARRIED) / len(column)
        bar = "#" * round(share * BAR_WIDTH)
        told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        out.append(f"{label:>{label_width}} |{bar:<{BAR_WIDTH}}| {share:4.0%}  {told}")
    return "\n".join(out) + "\n"


def render_notes(columns: Sequence[Sequence[Verdict]]) -> str:
    """Why a patch does not carry over, or where its file went; a line for each patch and release."""
    told = (verdict for column in columns for verdict in column if verdict.note)
    return "".join(f"{v.release}  {show_name(v.patch)}: {v.kind}: {v.note}\n" for v in told)


def plot_decay(columns: Sequence[Sequence[Verdict]], title: str, path: Path) -> None:
    """Draw what became of the patches, release by release, as stacked bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [column[0].release for column in columns]
    figure, axes = pyplot.subplots(figsize=(max(6, len(labels) * 0.8), 4), layout="constrained")
    floor = [0] * len(columns)
    for kind in KINDS:
        heights = [count_kinds(column)[kind] for column in columns]
        axes.bar(range(len(labels)), heights, bottom=floor, label=kind, color=COLOURS[kind], width=0.8)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_ylabel("patches")
    axes.set_title(title, fontsize="medium")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
