"""A host's place with a scheduler, as its agent sees it: standard library, part of the agent's archive.

Who keeps the place (`keeper.py`) has written down which process it is; the place is lost once that process is gone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from flagscale.runner.launch.journal import Spec
from flagscale.runner.launch.procs import is_same_alive


@dataclass(frozen=True, slots=True)
class Keeper:
    """The process that keeps a host's place. what: with whom (`Slurm job 12`, `Ray`)"""

    pid: int
    start_time: int
    what: str


def load_keeper(spec: Spec) -> Keeper | None:
    if not spec.keeper:
        return None
    try:
        return Keeper(**json.loads(Path(spec.keeper).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_lost_place(spec: Spec) -> str | None:
    """What to say if a scheduler has taken back the place of this host."""
    keeper = load_keeper(spec)
    if keeper is None or is_same_alive(keeper.pid, keeper.start_time):
        return None
    return describe_loss(spec, keeper, f"process {keeper.pid} was ended")


def describe_loss(spec: Spec, keeper: Keeper, told: str) -> str:
    return f"{keeper.what} has given up the place of {spec.label}: {told}"
