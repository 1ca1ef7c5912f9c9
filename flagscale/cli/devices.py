"""`flagscale devices`: what accelerators this machine has, which probe decided that, and why the others did not.

A machine without any is no failure: jobs then run on the processor. So the exit code is 0 whatever is found.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flagscale.chips.probe import Probe

GIB = 1024**3
HEADS = ("id", "card", "model", "memory", "bus", "health")
UNKNOWN = "-"


def render_columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of as many cells each as lines of text, each column as wide as its widest cell, the last not padded."""
    table = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in table)
    return "".join(f"  {line.rstrip()}\n" for line in lines)


def render_probe(probe: "Probe") -> str:
    if not probe.devices:
        return f"{probe.chip.name}: no accelerator was found; jobs run on the processor (device_type: cpu)\n"
    rows: list[Sequence[str]] = [HEADS]
    for device in probe.devices:
        memory = f"{device.memory_bytes / GIB:.0f} GiB" if device.memory_bytes else UNKNOWN
        cells = (device.name or UNKNOWN, memory, device.bus or UNKNOWN, device.health or UNKNOWN)
        rows.append((str(device.index), str(device.card), *cells))
    head = f"{probe.chip.name}: {len(probe.devices)} devices, says {probe.decided_by}"
    return f"{head} (device_type: {probe.chip.aliases[0]})\n{render_columns(rows)}"


def render_verdicts(probe: "Probe") -> str:
    """Every probe in the order in which it was asked."""
    rows = (
        (verdict.chip, verdict.source, "believed" if verdict.believed else "not believed", verdict.reason)
        for verdict in probe.verdicts
    )
    return f"probes, in the order in which they are asked:\n{render_columns(rows)}"


def describe_visible(probe: "Probe") -> tuple[str | None, str | None]:
    """(what this shell's environment shows a job of the devices, what is wrong with that); None where nothing is."""
    from flagscale.chips import visible_ids
    from flagscale.errors import UserError

    if not probe.devices:
        return None, None
    try:
        ids = visible_ids(probe.chip, os.environ, probe.devices)
    except UserError as error:
        return None, str(error)
    if ids is None:
        return None, None
    names = ", ".join(name for name in probe.chip.visible_devices if name in os.environ)
    return f"of these, {names} shows a job started here: {', '.join(map(str, ids)) or 'none'}", None


def encode_probe(probe: "Probe") -> dict[str, Any]:
    visible, wrong = describe_visible(probe)
    return {
        "chip": probe.chip.name,
        "device_type": probe.chip.aliases[0],
        "decided_by": probe.decided_by,
        "devices": [asdict(device) for device in probe.devices],
        "visible_devices": list(probe.chip.visible_devices),
        "visible": visible,
        "wrong": wrong,
        "verdicts": [asdict(verdict) for verdict in probe.verdicts],
    }


def main(argv: list[str]) -> int:
    from flagscale.chips.probe import probe_host
    from flagscale.cli.voice import warn

    parser = argparse.ArgumentParser(prog="flagscale devices", description="Say what accelerators this machine has.")
    parser.add_argument("--explain", action="store_true", help="say which probe decided, and why the others did not")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    probe = probe_host()
    if args.json:
        print(json.dumps(encode_probe(probe), indent=2))
        return 0
    visible, wrong = describe_visible(probe)
    print(render_probe(probe), end="")
    if visible:
        print(visible)
    if args.explain:
        print(render_verdicts(probe), end="")
    else:
        for doubt in probe.doubts:
            warn(f"{doubt.chip}: {doubt.source}: {doubt.reason}")
    if wrong:
        warn(wrong)
    return 0
