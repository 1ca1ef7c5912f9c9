"""A rank tells who launched it that it is up: past its imports, arguments, process group and model.

The sign is a file, not a log line: it needs no parsing, it costs nothing where nobody asked for it, and whoever looks
after the fact still sees how far the start came.
"""

import os
from pathlib import Path

from flagscale.env import RANK_DIR


def announce_rank_up() -> Path | None:
    """Write `rank_<RANK>.up` into the folder that the launcher named; without one, do nothing and return None."""
    folder = os.environ.get(RANK_DIR)
    if not folder:
        return None
    sign = Path(folder) / f"rank_{int(os.environ.get('RANK', '0'))}.up"
    sign.parent.mkdir(parents=True, exist_ok=True)
    part = sign.with_suffix(".part")
    part.write_text(f"{os.getpid()}\n")
    part.replace(sign)
    return sign
