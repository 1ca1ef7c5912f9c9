"""Reading a training's progress out of what it prints: Megatron-LM's line per logged iteration.

The lines are the interface because they are all that every version prints, on any machine, with nothing switched on.
Fields are found by name, so that new ones between them do no harm.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.runner.launch.journal import read_tail

_COUNT = re.compile(r"\biteration +(\d+)/ *(\d+) *\|")
_FIELD = re.compile(r"\| *([^|:]+?): *([^| ]+) *(?=\|)")
NUM_FOR_ETA = 20


@dataclass(frozen=True, slots=True)
class Iteration:
    """One logged iteration; None where the line did not say.

    elapsed_ms: per iteration, averaged by the trainer since its last line
    """

    iteration: int
    num_iterations: int
    elapsed_ms: float | None = None
    consumed_samples: int | None = None
    global_batch_size: int | None = None
    lm_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    num_skipped: int | None = None
    num_nan: int | None = None

    def tokens_per_s(self, seq_length: int | None) -> float | None:
        if not seq_length or not self.global_batch_size or not self.elapsed_ms:
            return None
        return self.global_batch_size * seq_length * 1000 / self.elapsed_ms


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def parse_iteration(line: str) -> Iteration | None:
    """The iteration that a line of output tells of, None for any other line; prefixes as of torchrun do no harm."""
    count = _COUNT.search(line)
    if count is None:
        return None
    fields: dict[str, str] = dict(_FIELD.findall(line[count.end() - 1 :].rstrip() + "|"))
    return Iteration(
        iteration=int(count[1]),
        num_iterations=int(count[2]),
        elapsed_ms=_number(fields.get("elapsed time per iteration (ms)")),
        consumed_samples=_whole(fields.get("consumed samples")),
        global_batch_size=_whole(fields.get("global batch size")),
        lm_loss=_number(fields.get("lm loss")),
        learning_rate=_number(fields.get("learning rate")),
        grad_norm=_number(fields.get("grad norm")),
        num_skipped=_whole(fields.get("number of skipped iterations")),
        num_nan=_whole(fields.get("number of nan iterations")),
    )


def load_iterations(path: Path, start: int = 0, end: int | None = None) -> list[Iteration]:
    """Those of a part of a file, from byte `start` to `end`; none where it cannot be read."""
    found: list[Iteration] = []
    try:
        with path.open("rb") as file:
            position = file.seek(start)
            for line in file:
                position += len(line)
                if end is not None and position > end:
                    break
                if iteration := parse_iteration(line.decode(errors="replace")):
                    found.append(iteration)
    except OSError:
        return []
    return found


def find_last_iteration(path: Path, start: int = 0, end: int | None = None) -> Iteration | None:
    """The newest among the last lines of a part of a file: quick however long it is."""
    lines = reversed(read_tail(path, start, end).splitlines())
    return next((found for line in lines if (found := parse_iteration(line))), None)


def estimate_eta_s(iterations: Sequence[Iteration]) -> float | None:
    """Seconds until the last iteration, by the median of the latest; None before the first."""
    times = [item.elapsed_ms for item in iterations[-NUM_FOR_ETA:] if item.elapsed_ms]
    if not times:
        return None
    last = iterations[-1]
    return statistics.median(times) * (last.num_iterations - last.iteration) / 1000


def find_setting(config: Mapping[str, Any], name: str, path: str = "") -> tuple[str, Any] | None:
    """(dotted path, value) of the first setting of that name, written with `_` or `-`, in a resolved configuration."""
    for key, value in config.items():
        at = f"{path}.{key}" if path else str(key)
        if str(key).replace("-", "_") == name:
            return at, value
        if isinstance(value, Mapping) and (found := find_setting(value, name, at)):
            return found
    return None


def find_seq_length(config: Mapping[str, Any]) -> int | None:
    """`seq_length` of a resolved training configuration, in tokens."""
    found = find_setting(config, "seq_length")
    return found[1] if found and isinstance(found[1], int) else None


def format_duration(seconds: float) -> str:
    """`0:45`, `12:03`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_progress(iterations: Sequence[Iteration], seq_length: int | None, is_live: bool = True) -> str:
    """One line on the latest iteration: where it is, loss, throughput, and the time left where it `is_live`."""
    last = iterations[-1]
    parts = [f"iteration {last.iteration}/{last.num_iterations}"]
    if last.lm_loss is not None:
        parts.append(f"loss {last.lm_loss:.4f}")
    if last.grad_norm is not None:
        parts.append(f"grad norm {last.grad_norm:.3f}")
    if last.elapsed_ms is not None:
        parts.append(f"{last.elapsed_ms:.0f} ms")
    if tokens := last.tokens_per_s(seq_length):
        parts.append(f"{tokens:,.0f} tokens/s")
    if is_live and (eta := estimate_eta_s(iterations)) is not None:
        parts.append(f"{format_duration(eta)} left")
    return " · ".join(parts)


def split_segments(iterations: Sequence[Iteration]) -> list[list[Iteration]]:
    """Cut where the count goes back or the total starts anew: each start of a training is a segment."""
    segments: list[list[Iteration]] = []
    for item in iterations:
        if not segments or item.iteration <= segments[-1][-1].iteration:
            segments.append([])
        segments[-1].append(item)
    return segments
