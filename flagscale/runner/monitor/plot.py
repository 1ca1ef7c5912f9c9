"""The loss of an experiment as a picture, over all the runs that wrote into its folder."""

import math
from collections.abc import Sequence
from pathlib import Path

from flagscale.errors import RunError
from flagscale.runner.launch.folder import RunRef
from flagscale.runner.launch.record import load_records
from flagscale.runner.monitor.progress import Iteration, load_iterations, split_segments

SMOOTHING = 0.75
"""Weight of the past in the smoothed line; the start is corrected for the missing past."""


def smooth(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """An exponential mean without the pull towards zero at the start; a constant stays what it is."""
    smoothed: list[float] = []
    mean, total = 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def _points(segment: Sequence[Iteration]) -> tuple[list[int], list[float]]:
    pairs = [
        (item.iteration, item.lm_loss) for item in segment if item.lm_loss is not None and math.isfinite(item.lm_loss)
    ]
    return [step for step, _ in pairs], [loss for _, loss in pairs]


def load_experiment_iterations(run: RunRef) -> list[Iteration]:
    """Of all runs into the experiment's folder, whose output is appended to; of this run alone where it was fetched."""
    parts = (
        (record.output, record.output_start if record.mirror else 0, record.output_end if record.mirror else None)
        for record in reversed(load_records(run))
    )
    return next((found for part in parts if (found := load_iterations(*part))), [])


def plot_loss(run: RunRef, path: Path | None = None) -> Path:
    """Draw `<exp_dir>/loss.png`: raw and smoothed loss by iteration, a line where a training was resumed.

    Raises:
        RunError: no loss was printed, matplotlib is missing, or the picture cannot be written.
    """
    segments = [
        points for segment in split_segments(load_experiment_iterations(run)) if (points := _points(segment))[0]
    ]
    if not segments:
        raise RunError(f"run {run.run_id} printed no loss; nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("the loss is drawn by matplotlib, which is not installed: `pip install matplotlib`") from None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (steps, losses) in enumerate(segments):
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label=None if number else "loss")
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label=None if number else "smoothed")
        if number:
            axes.axvline(steps[0], color="gray", linestyle=":", label="resumed" if number == 1 else None)
    axes.set_title(f"{run.exp_name or run.task}: training loss")
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss")
    axes.grid(alpha=0.25)
    axes.legend()
    target = path or run.exp_dir / "loss.png"
    try:
        figure.savefig(target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from None
    return target
