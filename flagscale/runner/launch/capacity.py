"""Whether a host can hold its part of a job: chips for its ranks, and room on its disk. Part of the errands.

What cannot be seen is told and not guessed: a host whose vendor's tool is missing may well have its chips.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.runner.plan.job import HostPlan, JobPlan

if TYPE_CHECKING:
    from flagscale.chips.probe import Probe
    from flagscale.chips.records import Chip

LEAST_FREE_BYTES = 64 << 20
"""for scripts, journals and the first lines of a log; what a job itself writes only its user knows"""


def nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def find_disk_faults(plan: JobPlan) -> Iterator[str]:
    """A full disk below the outputs, of this host."""
    for folder in dict.fromkeys(nearest_folder(Path(name)) for name in (plan.exp_dir, plan.log_dir)):
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize
        if free < LEAST_FREE_BYTES:
            yield f"its disk is full: {free >> 20} MiB are free in {folder}; expected {LEAST_FREE_BYTES >> 20} at least"
        elif disk.f_files and not disk.f_favail:
            yield f"its disk takes no more files: no inode is free in {folder}"


def _probe() -> "Probe":
    from flagscale.chips.probe import probe_host  # hosts of CPU ranks are not probed, and need not load it

    return probe_host()


def _find_chip(name: str) -> "Chip | None":
    from flagscale.chips.records import find_chip  # hosts without a `type=` need not load it either

    return find_chip(name)


def weigh_chips(host: HostPlan, probe: "Callable[[], Probe]" = _probe) -> tuple[str | None, str | None]:
    """(fault, note) on the ranks of a host and the chips that are seen there.

    Without a `type=` the chips are those that are found, so that ranks on the CPU of a host with accelerators have to
    be said to be so.
    """
    num_ranks = sum(process.num_ranks for process in host.processes)
    wanted = _find_chip(host.host.chip) if host.host.chip else None
    if not num_ranks or (wanted is not None and wanted.device == "cpu"):
        return None, None
    found = probe()
    count = len(found.devices)
    if not count:
        text = f"not checked whether it has {num_ranks} chips ({host.host.chip}): no tool there tells of any"
        return None, text if wanted else None
    if count < num_ranks:
        on_cpu = "" if wanted else "; ranks that compute on its CPU say `type=Generic_CPU`"
        return f"{num_ranks} ranks, but {found.decided_by} sees {count} {found.chip.name} chips{on_cpu}", None
    if wanted is not None and wanted.name != found.chip.name:
        return f"its chips are {found.chip.name} ({found.decided_by}), but the hostfile says {wanted.name}", None
    return None, None
