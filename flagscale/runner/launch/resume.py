"""Where a training begins: what its folder of checkpoints says, in the tracker file that Megatron-LM writes last.

A checkpoint counts once `latest_checkpointed_iteration.txt` names it; a folder `iter_…` alone may be half written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.runner.plan.job import JobPlan

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """iteration: None for weights alone, which Megatron-LM calls `release`."""

    path: Path
    iteration: int | None


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that was written to its end; None where there is none."""
    try:
        latest = (folder / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if latest.isdecimal():
        return Checkpoint(folder / f"iter_{int(latest):07d}", int(latest))
    return Checkpoint(folder / latest, None) if latest else None


def find_arguments(plan: JobPlan) -> Mapping[str, Any]:
    """The backend's arguments of the first process that has ranks."""
    processes = (process for host in plan.hosts for process in host.processes if process.num_ranks)
    first = next(processes, None)
    return {name.replace("-", "_"): value for name, value in first.arguments} if first else {}


def describe_beginning(plan: JobPlan) -> str | None:
    """`starts from scratch …`, `resumes from iteration 40 (…)`; None where the plan loads nothing that we can read."""
    if plan.load_dir is None or "://" in plan.load_dir:
        return None
    arguments = find_arguments(plan)
    found = find_checkpoint(Path(plan.load_dir))
    step = arguments.get("ckpt_step")
    if isinstance(step, int) and found is not None:
        found = Checkpoint(Path(plan.load_dir) / f"iter_{step:07d}", step)
    if found is None:
        return f"starts from scratch: no checkpoint in {plan.load_dir}"
    if arguments.get("finetune") or found.iteration is None:
        return f"starts at iteration 0 with the weights of {found.path}"
    last = arguments.get("train_iters")
    is_done = isinstance(last, int) and found.iteration >= last
    return f"resumes from iteration {found.iteration} ({found.path})" + f", of {last}: nothing is left" * is_done
