"""Every environment variable that this toolkit reads or sets for its own use, and the folders they decide.

Nothing else in the package asks `os.environ` for a setting.
"""

import os
from pathlib import Path

STATE_DIR = "FLAGSCALE_STATE_DIR"
"""Where the list of runs is kept; default `$XDG_STATE_HOME/flagscale`, else `~/.local/state/flagscale`."""

SOURCE_DIR = "FLAGSCALE_SOURCE_DIR"
"""Where fetched backend sources lie; default `<root>/third_party`, or `~/.cache/flagscale/third_party` for a wheel."""

RUN_TOKEN = "FLAGSCALE_RUN_TOKEN"
"""Set for every process of a job to a value that no other job has: what bears it is ours to end."""

KEPT_TOKEN = "FLAGSCALE_KEPT_TOKEN"
"""Set for an agent that a scheduler gave a place, to its run's token: it is not below the agent of that scheduler."""

RANK_DIR = "FLAGSCALE_RANK_DIR"
"""Set for a job: the folder in which a rank tells that it is up, by a file `rank_<rank>.up`."""

RAY_NODE = "FLAGSCALE_RAY_NODE"
"""Set for a node of Ray of a graph of models and all that it starts, so that one that failed is ended whole."""

CHIP = "FLAGSCALE_CHIP"
"""Set for a job: the name of the record (`Generic_CPU`, `NVIDIA`) of the chip that its ranks run on."""


def state_dir() -> Path:
    if explicit := os.environ.get(STATE_DIR):
        return Path(explicit)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "flagscale"


def root_dir() -> Path:
    """The folder that holds `examples/` and `third_party/`: the checkout, or the wheel's `flagscale/share`."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    return checkout if (checkout / "run.py").is_file() and (checkout / "examples").is_dir() else package / "share"


def source_dir(backend: str, chip: str | None = None) -> Path:
    """Where the fetched source of `backend` (`Megatron-LM`) lies: upstream's, or the tree that is patched for a chip.

    chip: a record's name; its tree lies beside upstream's, under that name
    """
    if explicit := os.environ.get(SOURCE_DIR):
        return Path(explicit) / backend / (chip or "src")
    root = root_dir()
    if root.name == "share":
        root = wheel_dir()
    return root / "third_party" / backend / (chip or "src")


def wheel_dir() -> Path:
    """What a wheel has in place of a checkout to fetch sources into."""
    return Path.home() / ".cache" / "flagscale"
