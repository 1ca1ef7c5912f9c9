"""FlagScale's name for applying patches: `flagscale patch apply`, one backend after the other.

    python tools/patch/unpatch.py --backend vllm --device-type Metax_C550 --task inference

The patches go into `third_party/<backend>/src`, or into the folder that --tree names. Nothing is cloned and nothing is
deleted: local edits are refused by name, or kept by --stash. Exit codes are the command's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flagscale.cli import main as flagscale

WITHOUT_EFFECT = {
    "force": "nothing is overwritten here; edits are kept by --stash",
    "no_force": "it is always so",
    "init_submodule": "sources are fetched by `flagscale source fetch`, not as submodules",
    "no_init_submodule": "sources are fetched by `flagscale source fetch`, not as submodules",
    "fs_extension": "FlagScale's own changes to backends are the patch set `Common`, applied below the vendor's",
    "backend_commit": "the release is the pin's; `flagscale patch rebase` carries a series to another one",
    "commit": "patch sets lie in hardware/, of the commit that is checked out; check out another one for its sets",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", nargs="+", required=True, help="megatron, vllm, sglang, ..")
    parser.add_argument("--device-type", help="Vendor_Chip: the vendor's patch set, over the common one")
    parser.add_argument("--task", help="train, inference or post_train: the patch set must serve it")
    parser.add_argument("--tree", help="a folder with the backend's source, instead of the fetched one")
    parser.add_argument("--hardware", help="where patch sets lie; default: hardware/")
    parser.add_argument("--revert", action="store_true", help="take the patches out instead")
    for word in ("stash", "dry-run", "3way", "partial"):
        parser.add_argument(f"--{word}", action="store_true", help="see `flagscale patch apply --help`")
    parser.add_argument("--key-path", help="refused: encrypted patches are not taken")
    for name in ("force", "no-force", "init-submodule", "no-init-submodule", "fs-extension"):
        parser.add_argument(f"--{name}", action="store_true", help="without effect, explained when given")
    parser.add_argument("--no-fs-extension", action="store_true", help="leave the common patch set out")
    parser.add_argument("--commit", help="without effect, explained when given")
    parser.add_argument("--backend-commit", nargs="+", help="without effect, explained when given")
    return parser


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.key_path:
        print(
            "error: --key-path: encrypted patches are not taken; ask their author for the plain ones", file=sys.stderr
        )
        return 2
    for name, why in WITHOUT_EFFECT.items():
        if getattr(args, name, None):
            print(f"note: --{name.replace('_', '-')} has no effect: {why}", file=sys.stderr)
    device = args.device_type or ("Common" if not args.no_fs_extension else None)
    words = [f"--{word}" for word in ("stash", "dry-run") if getattr(args, word.replace("-", "_"))]
    words += ["--tree", args.tree] if args.tree else []
    if args.revert:
        words += ["--device-type", args.device_type] if args.device_type else []
    else:
        words += [f"--{word}" for word in ("3way", "partial") if getattr(args, word)]
        words += ["--device-type", device] if device else []
        words += ["--task", args.task] if args.task else []
        words += ["--hardware", args.hardware] if args.hardware else []
        words += ["--no-common"] if args.no_fs_extension else []
    action = "revert" if args.revert else "apply"
    backends = [backend for backend in args.backend if backend != "FlagScale"] or args.backend
    return max(flagscale(["patch", action, backend, *words]) for backend in backends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
