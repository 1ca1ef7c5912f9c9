"""FlagScale's name for making patches: `flagscale patch export`, one backend after the other, and never a question.

    python tools/patch/patch.py --backend vllm --device-type Metax_C550 --task inference \\
        --why "..." --how "..." --upstream "..." --remove-when "..."

The edited tree is `third_party/<backend>/src`, or the folder that --tree names; the patches go to
`hardware/<Vendor_Chip>/<backend>/`, without --device-type to `hardware/Common/<backend>/`. No commit is made.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flagscale.cli import main as flagscale

TASKS = ("train", "inference", "serve", "compress", "rl", "post_train")
OF_FLAGSCALE = "a chip's support in this toolkit is no patch set but part of it (docs/chips.md); name a backend"
HEADER = ("why", "how", "upstream", "remove-when")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", nargs="+", required=True, help="megatron, vllm, sglang, ..")
    parser.add_argument(
        "--device-type", help="Vendor_Chip, such as Metax_C550; default: the set for every chip, Common"
    )
    parser.add_argument("--task", nargs="+", default=[], choices=TASKS, help="what the patch set serves")
    parser.add_argument("--models", nargs="+", default=[], help="models it was tried with")
    parser.add_argument("--contact", help="whom to ask")
    parser.add_argument("--commit", help="the commit of the backend's git tree that is upstream")
    parser.add_argument("--backends-version", dest="version", help="upstream release, where pin and git tell none")
    parser.add_argument("--tree", help="the edited source, instead of the fetched one")
    parser.add_argument("--base", help="a folder with upstream's untouched source")
    parser.add_argument("--hardware", help="where patch sets lie; default: hardware/")
    for word in HEADER:
        parser.add_argument(f"--{word}", help="header of new patches")
    parser.add_argument("--key-path", help="refused: patches are never encrypted")
    return parser


def find_fault(args: argparse.Namespace) -> str | None:
    """What of the words cannot be right."""
    if args.key_path:
        return "--key-path: patches are never encrypted, so that everybody can read and verify them"
    if args.device_type and not re.fullmatch(r"[A-Z][A-Za-z0-9]*_[A-Za-z0-9]+", args.device_type):
        return f"--device-type {args.device_type}: expected Vendor_Chip, as in Metax_C550"
    if set(args.backend) == {"FlagScale"}:
        return f"--backend FlagScale: {OF_FLAGSCALE}"
    if args.tree and len(set(args.backend) - {"FlagScale"}) > 1:
        return "--tree names one source, and there are several backends; export them one by one"
    return None


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    if fault := find_fault(args):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    if "FlagScale" in args.backend:
        print(f"note: FlagScale is left out: {OF_FLAGSCALE}", file=sys.stderr)
    words = ["--device-type", args.device_type or "Common"]
    for name in ("contact", "commit", "version", "tree", "base", "hardware", *HEADER):
        value = getattr(args, name.replace("-", "_"))
        words += [f"--{name}", value] if value is not None else []
    for name in ("task", "models"):
        words += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
    return max(flagscale(["patch", "export", backend, *words]) for backend in args.backend if backend != "FlagScale")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
