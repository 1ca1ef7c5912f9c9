"""`flagscale doctor`: what this machine has, what is missing, and how to get it.

Nothing is imported to find out: a package is asked for its metadata, a program for its path. A backend that is missing
is no failure, since no machine needs them all; what every job needs is.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale import env

if TYPE_CHECKING:
    from flagscale.chips.probe import Probe

LEAST_FREE_BYTES = 5 * 1024**3
WIDE = 160
"""columns where the output is no terminal and has no width"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked for.

    needed: every job needs it; what is missing although needed makes the exit code 1
    remedy: how to get it, None where it is there
    """

    group: str
    name: str
    found: str | None
    remedy: str | None = None
    needed: bool = False


def find_version(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _package(group: str, name: str, remedy: str, needed: bool = False) -> Finding:
    found = find_version(name)
    return Finding(group, name, found, None if found else remedy, needed)


def _program(group: str, name: str, remedy: str) -> Finding:
    found = shutil.which(name)
    return Finding(group, name, found, None if found else remedy)


def _machine() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("machine", "python", f"{version} ({sys.executable})", needed=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    yield Finding("machine", "cores and memory", f"{os.cpu_count()} cores, {memory:.0f} GiB")
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= LEAST_FREE_BYTES
    remedy = None if enough else f"less than {LEAST_FREE_BYTES // 1024**3} GiB are free here: make room for checkpoints"
    yield Finding("machine", "disk", f"{free / 1024**3:.0f} GiB free" if enough else None, remedy)
    state = env.state_dir()
    parent = next(folder for folder in (state, *state.parents) if folder.exists())
    writable = os.access(parent, os.W_OK | os.X_OK)
    remedy = None if writable else f"{parent} is not writable: set {env.STATE_DIR} to a folder that is"
    yield Finding("machine", "list of runs", str(state) if writable else None, remedy, needed=True)


def _chips(probe: "Probe") -> Iterator[Finding]:
    from flagscale.chips import find_chip

    if probe.devices:
        models = ", ".join(sorted({device.name or "of unknown model" for device in probe.devices}))
        found = f"{len(probe.devices)} x {models}, says {probe.decided_by}; device_type: {probe.chip.aliases[0]}"
        yield Finding("chips", probe.chip.name, found)
    else:
        remedy = None if probe.doubts else "flagscale devices --explain says where it was looked for"
        yield Finding("chips", "accelerator", None, remedy)
    for doubt in probe.doubts:
        yield Finding("chips", doubt.chip, None, f"{doubt.source}: {doubt.reason}")
    if cpu := find_chip("cpu"):
        yield Finding("chips", cpu.name, f"always there; device_type: {cpu.aliases[0]}")


def _training(probe: "Probe") -> Iterator[Finding]:
    yield _package("train", "torch", "install the build for your chips: https://pytorch.org/get-started/locally")
    for name in ("numpy", "psutil", "pybind11", "matplotlib"):
        yield _package("train", name, 'pip install -e ".[train]"')
    yield _package("train", "tensorboard", "pip install tensorboard (without it no TensorBoard logs are written)")
    if probe.devices and probe.chip.name == "NVIDIA":
        remedy = 'pip install --no-build-isolation "transformer_engine[pytorch]" (or train without: docs/training.md)'
        yield _package("train", "transformer_engine", remedy)
    yield _source("Megatron-LM", "megatron")
    yield from _chip_trees("Megatron-LM", "megatron")
    yield _program("train", "g++", "apt-get install g++ (without it a prebuilt module is used where there is one)")


def _source(folder: str, backend: str) -> Finding:
    from flagscale.patch.pins import load_pin
    from flagscale.patch.source import source_status

    pin = load_pin(env.root_dir() / "third_party" / folder / "pin.yaml")
    status = source_status(pin, env.source_dir(folder))
    remedy = f"flagscale source fetch {backend}"
    match status.state:
        case "ready":
            return Finding("train", folder, f"{pin.version}, as pinned")
        case "drifted":
            changed = f"{len(status.changed)} files differ from the pin"
            return Finding("train", folder, f"{pin.version}, {changed}", f"{remedy} --replace")
        case _:
            return Finding("train", folder, None, remedy)


def _chip_trees(folder: str, backend: str) -> Iterator[Finding]:
    """The trees that are patched for a chip, beside the source."""
    from flagscale.patch.chiptree import list_chip_trees
    from flagscale.patch.state import read_state

    for tree in list_chip_trees(env.source_dir(folder)):
        state = read_state(tree)
        found = f"{state.kind}: {', '.join(state.series) or 'no patches'}"
        remedy = f"flagscale install --backend {backend} --device {tree.name}"
        yield Finding("train", f"{folder} for {tree.name}", found, None if state.kind == "patched" else remedy)


def _serving() -> Iterator[Finding]:
    yield _package("serve", "vllm", "pip install vllm (https://docs.vllm.ai has the build for your chips)")
    yield _package("serve", "sglang", "pip install sglang (https://docs.sglang.ai)")
    server = env.root_dir() / "third_party" / "llama.cpp" / "build" / "bin" / "llama-server"
    found = str(server) if server.is_file() else None
    yield Finding("serve", "llama.cpp", found, None if found else f"build llama-server into {server.parent}")
    yield _package("serve", "ray", 'pip install -e ".[ray]"')
    yield _package("rl", "verl", "pip install verl")


def find_all() -> tuple[Finding, ...]:
    from flagscale.chips.probe import probe_host

    probe = probe_host()
    needed = (
        _package("launcher", name, "pip install -e .", needed=True)
        for name in ("hydra-core", "omegaconf", "pydantic", "rich")
    )
    return (*_machine(), *needed, *_chips(probe), *_training(probe), *_serving())


def _print_table(findings: tuple[Finding, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "what", "found", "how to get it"):
        table.add_column(title, overflow="fold")
    group = ""
    for row in findings:
        head, group = ("" if row.group == group else row.group), row.group
        found = Text(row.found) if row.found else Text("missing", style="red" if row.needed else "yellow")
        table.add_row(Text(head, style="bold"), row.name, found, Text(row.remedy or ""))
    console.print(table)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flagscale doctor",
        description="Say what this machine has, what is missing, and how to get it. "
        "The exit code is 1 if something is missing that every job needs.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    findings = find_all()
    if args.json:
        print(json.dumps({"findings": [asdict(row) for row in findings]}, indent=2))
    else:
        _print_table(findings)
    return 1 if any(row.needed and row.found is None for row in findings) else 0
