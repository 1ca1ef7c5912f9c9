"""Where the ranks of a failed job stood: their Python stacks, by py-spy, before they are ended: part of the archive.

When one rank dies, the others often wait for it in some collective; which one, and called from where, is gone once they
are ended. The trade-off: it costs the ending some seconds at most, needs py-spy beside the job's interpreter or on the
PATH, and the kernel's leave to look into processes of the same user. torchrun ends the ranks of its own host a moment
after one of them has died, before anybody can look: the stacks are those of the other hosts, and of ranks that hang.
"""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

LIMIT_S = 10.0


def find_py_spy() -> str | None:
    import shutil

    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def save_stacks(ranks: Mapping[int, int], folder: Path, limit_s: float = LIMIT_S) -> list[int]:
    """Write `rank_<n>.txt` for each rank whose process (rank -> pid) can be looked into, all at once.

    Returns the ranks that were saved; what takes longer than `limit_s` is given up, and what failed leaves no file.
    """
    program = find_py_spy() if ranks else None
    if program is None:
        return []
    import subprocess  # costs a start more than the rest of this file, and most runs have no need of it

    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, pid in ranks.items():
            with _path_of(folder, rank).open("wb") as file:
                words = [program, "dump", "--pid", str(pid)]
                started[rank] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    except OSError:
        pass  # a full disk: what was started is waited for
    deadline = time.monotonic() + limit_s
    saved = [rank for rank, process in started.items() if _wait(process, deadline)]
    for rank in set(ranks) - set(saved):
        _path_of(folder, rank).unlink(missing_ok=True)
    return saved


def _path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def _wait(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    import subprocess

    try:
        return process.wait(max(0.0, deadline - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the kernel holds is left to it
            process.wait(1.0)
        return False
