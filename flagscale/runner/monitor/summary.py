"""A finished training in one line: what it reached, and where everything is."""

from pathlib import Path

from flagscale.runner.launch.folder import load_job
from flagscale.runner.launch.record import load_records
from flagscale.runner.launch.startup import output_start
from flagscale.runner.monitor.progress import Iteration, format_duration, load_iterations
from flagscale.runner.monitor.state import RunState


def find_checkpoint(checkpoint_dir: Path) -> Path | None:
    """The newest checkpoint that Megatron-LM has finished writing; None where there is none."""
    try:
        latest = (checkpoint_dir / "latest_checkpointed_iteration.txt").read_text().strip()
    except OSError:
        return None
    return checkpoint_dir / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)


def _load_own_iterations(state: RunState) -> list[Iteration]:
    for record in reversed(load_records(state.run)):
        found = load_iterations([state.run.output_path(record.label)], output_start(record))
        if found:
            return found
    return []


def summarise(state: RunState) -> str:
    """`loss 6.2300 -> 2.8100 in 100 steps (0:54); checkpoint …; plot …; log …`, less what a run does not have."""
    run = state.run
    parts: list[str] = []
    losses = [item for item in _load_own_iterations(state) if item.lm_loss is not None]
    took = format_duration((state.ended or 0) - (state.started or 0)) if state.started and state.ended else None
    if losses:
        first, last = losses[0], losses[-1]
        num_steps = last.iteration - first.iteration + 1
        parts.append(
            f"loss {first.lm_loss:.4f} -> {last.lm_loss:.4f} in {num_steps} steps" + (f" ({took})" if took else "")
        )
    else:
        parts.append(f"{run.task} {state.state}" + (f" after {took}" if took else ""))
    checkpoint_dir = load_job(run.exp_dir, run.run_id).get("plan", {}).get("checkpoint_dir")
    if checkpoint_dir and (checkpoint := find_checkpoint(Path(checkpoint_dir))):
        parts.append(f"checkpoint {checkpoint}")
    if losses and (plot := run.exp_dir / "loss.png").is_file():
        parts.append(f"plot {plot}")
    parts.append(f"log {run.output_path(run.labels[-1])}")
    return "; ".join(parts)
