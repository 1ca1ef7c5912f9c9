"""A finished job in one line: what it reached, and where everything is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagscale.runner.launch.folder import load_job
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.resume import Checkpoint, find_checkpoint
from flagscale.runner.monitor.progress import Iteration, find_setting, format_duration, load_iterations
from flagscale.runner.monitor.state import RunState


def _load_own_iterations(state: RunState) -> list[Iteration]:
    """Only the last rank prints them, so one host's output holds all."""
    parts = ((record.output, record.output_start, record.output_end) for record in reversed(load_records(state.run)))
    return next((found for part in parts if (found := load_iterations(*part))), [])


def describe_nothing_left(config: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    """What to say where a training ended without a step because its checkpoint is its last; None where it is not."""
    train = config.get("train")
    found = find_setting(train, "train_iters", "train") if isinstance(train, Mapping) else None
    if found is None or not isinstance(found[1], int) or (checkpoint.iteration or 0) < found[1]:
        return None
    path, last = found
    at = f"the checkpoint is at iteration {checkpoint.iteration} of {last} ({checkpoint.path})"
    return f"nothing left to train: {at}; for more: {path}={2 * max(last, checkpoint.iteration or 0)}"


def summarise(state: RunState) -> str:
    """`loss 6.2300 -> 2.8100 in 100 steps (0:54); checkpoint …; plot …; log …`, less what a run does not have."""
    run = state.run
    job = load_job(run.exp_dir, run.run_id)
    checkpoint_dir = job.get("plan", {}).get("checkpoint_dir")
    checkpoint = find_checkpoint(Path(checkpoint_dir)) if checkpoint_dir else None
    log = f"log {run.output_path(run.labels[-1])}"
    took = format_duration((state.ended or 0) - (state.started or 0)) if state.started and state.ended else None
    losses = [item for item in _load_own_iterations(state) if item.lm_loss is not None]
    if not losses:
        if checkpoint and (nothing := describe_nothing_left(job.get("config") or {}, checkpoint)):
            return f"{nothing}; {log}"
        head = f"{run.task} {state.state}" + (f" after {took}" if took else "")
        return "; ".join([head, *([f"checkpoint {checkpoint.path}"] if checkpoint else []), log])
    first, last = losses[0], losses[-1]
    num_steps = last.iteration - first.iteration + 1
    parts = [f"loss {first.lm_loss:.4f} -> {last.lm_loss:.4f} in {num_steps} steps" + (f" ({took})" if took else "")]
    if checkpoint:
        parts.append(f"checkpoint {checkpoint.path}")
    if (plot := run.exp_dir / "loss.png").is_file():
        parts.append(f"plot {plot}")
    return "; ".join([*parts, log])
