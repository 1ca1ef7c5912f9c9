"""`flagscale patch import`: FlagScale's patches of a backend as a patch set of ours."""

import argparse
from pathlib import Path

SUMMARY = "take over FlagScale's patches (diff.yaml, one diff a file) as a patch set"


def add_words(parser: argparse.ArgumentParser) -> None:
    """What `flagscale patch import` takes beside the tree."""
    parser.add_argument("folder", type=Path, help="FlagScale's hardware/<Vendor_Chip>/<backend>")
    parser.add_argument("--backend", required=True, help="whose patches they are: megatron, vllm, ..")
    parser.add_argument("--tree", type=Path, help="the release that they were made on (default: the fetched source)")
    parser.add_argument("--version", help="which release that is (default: what diff.yaml says, else the pin's)")
    parser.add_argument("--hardware", type=Path, metavar="FOLDER", help="where to write to; default: hardware/")
    parser.add_argument("--partial", action="store_true", help="leave out what does not fit, and say so")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 where patches were left out."""
    from flagscale.env import root_dir, source_dir
    from flagscale.errors import UserError
    from flagscale.patch.export import write_series
    from flagscale.patch.importing import import_series
    from flagscale.patch.pins import find_pin
    from flagscale.patch.series import SERIES_FILE

    pin = find_pin(args.backend, root_dir() / "third_party")
    tree = (args.tree or source_dir(pin.name)).resolve()
    if not tree.is_dir():
        raise UserError(f"{tree}: there is no such folder; `flagscale source fetch {pin.backend}`, or give --tree")
    got = import_series(args.folder.resolve(), tree, pin, version=args.version, partial=args.partial)
    folder = (args.hardware or root_dir() / "hardware") / got.series.name
    if (folder / SERIES_FILE).exists():
        raise UserError(f"{folder} has a patch set already, and nothing of it is overwritten")
    write_series(folder, got.series)
    print(f"{len(got.series.patches)} patches for {got.series.made_for} in {folder}")
    print("".join(f"  left out, for it does not fit: {name}\n" for name in got.left), end="")
    print(
        "each header says `its author wrote no reason down`: write the reasons there, for the next release needs them"
    )
    return 1 if got.left else 0
