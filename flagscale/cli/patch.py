"""`flagscale patch`: apply patch sets to a source tree or an installed package, make them, and say what is applied."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.cli.patch_releases import add_rebase, add_verify, rebase, verify

if TYPE_CHECKING:
    from flagscale.patch.apply import Outcome
    from flagscale.patch.pins import Pin
    from flagscale.patch.series import Series
    from flagscale.patch.upstream import Upstream

SUMMARY = "apply a vendor's patches to a backend, make them, and say what is applied"
ACTIONS = {
    "apply": "apply patch sets, all of them or nothing",
    "revert": "take the patches out again, byte for byte",
    "status": "say what is applied, and what else was changed",
    "diff": "show how the tree differs from upstream",
    "export": "make a patch set of an edited tree",
    "verify": "try a patch set on other releases, and show how it decays",
    "rebase": "carry a patch set to another release, as far as it goes",
}


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", nargs="?", help="megatron, vllm, .. : its fetched source is the tree")
    parser.add_argument("--tree", type=Path, help="a folder with the backend's source, instead of the fetched one")
    parser.add_argument("--package", metavar="NAME", help="the installed package of that name: vllm, megatron, ..")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def add_series(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-type", metavar="VENDOR_CHIP", help="the vendor's patch set, with the common one below"
    )
    parser.add_argument("--series", type=Path, metavar="FOLDER", help="the patch set in this folder, and no other")
    parser.add_argument("--hardware", type=Path, metavar="FOLDER", help="where patch sets lie; default: hardware/")


def add_import(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from flagscale.cli import patch_import

    patch_import.add_words(actions.add_parser("import", help=patch_import.SUMMARY, description=patch_import.SUMMARY))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flagscale patch", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join((*ACTIONS, "import")))
    subs = {action: actions.add_parser(action, help=text, description=text) for action, text in ACTIONS.items()}
    for sub in subs.values():
        add_target(sub)
    for action in ("apply", "export", "verify", "rebase"):
        add_series(subs[action])
    for action in ("revert", "status", "diff"):
        subs[action].add_argument("--device-type", metavar="VENDOR_CHIP", help="the tree that was laid for this chip")
    for action in ("apply", "revert"):
        subs[action].add_argument("--stash", action="store_true", help="keep local edits as a patch and take them out")
        subs[action].add_argument("--dry-run", action="store_true", help="show the diff and change nothing")
    for action in ("apply", "verify", "rebase"):
        subs[action].add_argument("--no-common", action="store_true", help="leave out the patch set for every chip")
    subs["apply"].add_argument("--task", help="refuse a vendor's patch set that is not for this task")
    subs["apply"].add_argument("--3way", dest="three_way", action="store_true", help="merge what does not fit as it is")
    subs["apply"].add_argument("--partial", action="store_true", help="apply what fits, and say what is left")
    add_export(subs["export"])
    add_verify(subs["verify"])
    add_rebase(subs["rebase"])
    add_import(actions)
    return parser


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", default=[], metavar="TASK", help="tasks it serves: train, inference, ..")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="models it was tried with")
    parser.add_argument("--contact", default="", help="whom to ask")
    parser.add_argument("--version", help="upstream's release; default: the pin's, the package's, or git's description")
    parser.add_argument("--commit", help="the commit of the tree's git that is upstream; default: see docs/patches.md")
    parser.add_argument("--base", type=Path, help="a folder with upstream's untouched source")
    for word, text in (
        ("why", "why the new patches are needed"),
        ("how", "how they do it"),
        ("upstream", "a link to upstream's issue or pull request, or why there is none"),
        ("remove-when", "when they can go"),
    ):
        parser.add_argument(f"--{word}", help=f"header of new patches: {text}")


def find_tree(args: argparse.Namespace) -> Path:
    """The tree that the words mean.

    Raises:
        UserError: none or several were named, or several chips have one and none of them was named.
    """
    from flagscale.env import source_dir
    from flagscale.errors import UserError
    from flagscale.patch.package import find_package
    from flagscale.patch.tree import STATE_DIR

    if args.tree and args.package:
        raise UserError("--tree and --package both name a tree; give one of them")
    if args.tree:
        return Path(args.tree).resolve()
    if args.package:
        return find_package(args.package)
    if not args.backend:
        raise UserError("which tree? give a backend (`flagscale patch status megatron`), --tree or --package")
    src = source_dir(_pin(args.backend).name)
    if args.device_type:
        chip = src.parent / args.device_type
        return chip if chip.is_dir() else src
    laid = [path.parent for path in sorted(src.parent.glob(f"*/{STATE_DIR}")) if path.parent != src]
    if len(laid) > 1:
        raise UserError(f"which tree? give --device-type; there are: {', '.join(path.name for path in laid)}")
    return laid[0] if laid else src


def _pin(backend: str) -> "Pin":
    from flagscale.env import root_dir
    from flagscale.patch.pins import find_pin

    return find_pin(backend, root_dir() / "third_party")


def find_backend_name(args: argparse.Namespace) -> str:
    """The name of the backend's folders in third_party/ and hardware/."""
    from flagscale.errors import UserError

    word = args.backend or args.package
    if not word:
        raise UserError("which backend's patches? `flagscale patch apply vllm --tree FOLDER ..`, or name a --series")
    return _pin(word).name


def find_hardware(args: argparse.Namespace) -> Path:
    from flagscale.env import root_dir

    return args.hardware or root_dir() / "hardware"


def find_layer_folders(args: argparse.Namespace) -> list[Path]:
    """The folders of the patch sets to apply, lowest layer first.

    Raises:
        UserError: there are none for that chip and backend.
    """
    from flagscale.errors import UserError, find_nearest
    from flagscale.patch.series import COMMON, SERIES_FILE

    if args.series:
        return [args.series]
    hardware, backend = find_hardware(args), find_backend_name(args)
    known = sorted(path.parent.parent.name for path in hardware.glob(f"*/{backend}/{SERIES_FILE}"))
    if not args.device_type:
        there_are = f"; there are: {', '.join(known)}" if known else f"; there are none for {backend} in {hardware}"
        raise UserError(f"whose patches? give --device-type{there_are}")
    if args.device_type not in known:
        near = find_nearest(args.device_type, known)
        hint = f"; did you mean `{near}`?" if near else ""
        there_are = ", ".join(known) or "none"
        raise UserError(f"{args.device_type}: no patches for {backend} in {hardware}; there are: {there_are}{hint}")
    below = () if args.no_common else (COMMON,)
    return [hardware / name / backend for name in dict.fromkeys((*below, args.device_type)) if name in known]


def load_layers(args: argparse.Namespace) -> "list[Series]":
    from flagscale.errors import UserError
    from flagscale.patch.package import below_package
    from flagscale.patch.series import load_series

    layers = [load_series(folder) for folder in find_layer_folders(args)]
    served = layers[-1].tasks
    if getattr(args, "task", None) and served and args.task not in served:
        raise UserError(f"{layers[-1].name}: for {', '.join(served)}, not for {args.task}")
    return [below_package(layer, args.package) for layer in layers] if args.package else layers


def apply(args: argparse.Namespace) -> int:
    from flagscale.env import source_dir
    from flagscale.patch.apply import Options, apply_series
    from flagscale.patch.bases import make_find_base

    tree, layers = find_tree(args), load_layers(args)
    find_base = None
    if args.three_way:
        others = [source_dir(_pin(args.backend).name)] if args.backend else []
        find_base = make_find_base([tree, *others])
    options = Options(find_base, args.partial, args.stash, args.dry_run)
    outcome = apply_series(tree, layers, options)
    count = sum(len(layer.patches) for layer in layers) - len(outcome.rejects)
    names = ", ".join(layer.name for layer in layers)
    tell(args, tree, outcome, f"{count} patch{'es' * (count != 1)} of {names} applied to {tree}")
    return 1 if outcome.rejects else 0


def revert(args: argparse.Namespace) -> int:
    from flagscale.patch.apply import revert_tree

    tree = find_tree(args)
    tell(args, tree, revert_tree(tree, stash=args.stash, dry_run=args.dry_run), f"{tree} is as it was before patches")
    return 0


def tell(args: argparse.Namespace, tree: Path, outcome: "Outcome", done: str) -> None:
    """Say what was done; the diff of a dry run goes to standard output, bytes as they are."""
    if args.json:
        row = {"tree": str(tree), "changed": outcome.changed and not args.dry_run, "notes": outcome.notes}
        row |= {"rejects": outcome.rejects, "stash": str(outcome.stash) if outcome.stash else None}
        row |= {"diff": outcome.diff.decode(errors="replace")} if args.dry_run else {}
        print(json.dumps(row))
        return
    if args.dry_run:
        sys.stdout.flush()
        sys.stdout.buffer.write(outcome.diff)
    lines = [*outcome.notes, *outcome.rejects]
    lines += [f"local edits are kept in {outcome.stash}"] if outcome.stash else []
    lines += [f"files written meanwhile are kept in {outcome.kept}"] if outcome.kept else []
    if outcome.changed and not args.dry_run:
        lines.append(done)
        if enter_working_folder():
            lines.append("this shell stands in the folder that was replaced: `cd .` enters the new one")
    print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr if args.dry_run else sys.stdout)


def enter_working_folder() -> bool:
    """Enter the folder that has the name of the working folder, if that was replaced; whether it was."""
    try:
        os.getcwd()  # noqa: PTH109 (a Path would only hide the call that fails)
        return False
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            os.chdir(os.environ.get("PWD", "."))
        return True


def status(args: argparse.Namespace) -> int:
    """0 for clean and patched trees, 1 for any other."""
    import dataclasses

    from flagscale.patch.state import read_state

    tree = find_tree(args)
    state = read_state(tree)
    if args.json:
        print(json.dumps({"tree": str(tree), **dataclasses.asdict(state)}))
    else:
        by = f" by {', '.join(state.series)} ({state.digest[:12]})" if state.series else ""
        print(f"{tree}: {state.kind}{by}")
        print("".join(f"  {line}\n" for line in state.changed), end="")
    return 0 if state.kind in ("clean", "patched") else 1


def diff(args: argparse.Namespace) -> int:
    from flagscale.errors import PatchError
    from flagscale.patch.export import find_changes
    from flagscale.patch.git import make_diffs
    from flagscale.patch.upstream import find_upstream

    tree = find_tree(args)
    upstream = find_upstream(tree)
    if upstream is None:
        raise PatchError(f"{tree}: nothing is known of upstream's files: no git, no manifest, no RECORD")
    text = b"".join(make_diffs(*find_changes(tree, upstream)))
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    return 0


def find_source(args: argparse.Namespace, tree: Path) -> "tuple[Upstream, str, str]":
    """Upstream's files, its release and what identifies it: the pin's digest, a commit, or a hash over all files.

    Raises:
        UserError: upstream's files or its release are not known.
    """
    import importlib.metadata

    from flagscale.errors import UserError
    from flagscale.patch.series import hash_bytes
    from flagscale.patch.tree import SOURCE_MANIFEST
    from flagscale.patch.upstream import find_dist_info, find_upstream, of_commit, of_folder, run_git

    if args.base:
        upstream: Upstream | None = of_folder(args.base)
    else:
        upstream = of_commit(tree, args.commit) if args.commit else find_upstream(tree)
    if upstream is None:
        raise UserError(f"{tree}: upstream's files are not known: give them by --base <folder>")
    digest = upstream.commit or hash_bytes(json.dumps(sorted(upstream.hashes.items())).encode())
    if args.backend and (tree / SOURCE_MANIFEST).exists() and not (args.base or args.commit):
        pin = _pin(args.backend)
        return upstream, args.version or pin.version, pin.digest
    version = args.version
    if not version and upstream.commit:
        version = run_git(tree, "describe", "--tags", "--always", upstream.commit).stdout.decode().strip()
    if not version and (info := find_dist_info(tree)):
        version = importlib.metadata.Distribution.at(info).version
    if not version:
        raise UserError("which release of upstream is this? give --version")
    return upstream, version, digest


def export(args: argparse.Namespace) -> int:
    from flagscale.errors import UserError
    from flagscale.patch.export import export_series
    from flagscale.patch.series import COMMON, SERIES_FILE, Header, Series, load_series

    if not (args.series or args.device_type):
        raise UserError("where to? give --device-type VENDOR_CHIP, or --series FOLDER")
    if args.package:
        raise UserError("a package is made of a source: export from the source tree (--tree), not from --package")
    tree = find_tree(args)
    folder = args.series or find_hardware(args) / args.device_type / find_backend_name(args)
    words = (args.why, args.how, args.upstream, args.remove_when)
    if any(words) and not all(words):
        raise UserError("a header has four lines: give all of --why, --how, --upstream and --remove-when")
    upstream, version, digest = find_source(args, tree)
    before = load_series(folder) if (folder / SERIES_FILE).exists() else None
    draft = Series(
        name=f"{folder.absolute().parent.name}/{folder.name}",
        backend=_pin(args.backend).backend if args.backend else folder.name,
        version=version,
        digest=digest,
        tasks=tuple(args.task) or (before.tasks if before else ()),
        models=tuple(args.models) or (before.models if before else ()),
        contact=args.contact or (before.contact if before else ""),
    )
    common = folder.parent.parent / COMMON / folder.name
    lower = [load_series(common)] if (common / SERIES_FILE).exists() and common != folder else []
    made = export_series(tree, folder, draft, upstream, lower, Header(*words) if all(words) else None)
    rows = {"added": made.added, "changed": made.changed, "removed": made.removed}
    if args.json:
        print(json.dumps({"series": str(folder), "patches": len(made.series.patches), **rows}))
    else:
        print(f"{len(made.series.patches)} patches for {draft.made_for} in {folder}")
        print("".join(f"  {word} {name}\n" for word, names in rows.items() for name in names), end="")
    return 0


def try_releases(args: argparse.Namespace) -> int:
    from flagscale.errors import UserError
    from flagscale.patch.series import load_series

    if args.package:
        raise UserError("releases are tried on sources: name the backend, and no --package")
    pin = _pin(args.backend) if args.backend else None
    tree = find_tree(args) if args.backend or args.tree else None
    folders = find_layer_folders(args)
    layers = [load_series(folder) for folder in folders]
    if args.action == "rebase":
        return rebase(args, pin, tree, layers, folders[-1])
    return verify(args, pin, tree, layers)


def main(argv: Sequence[str]) -> int:
    """Run the verb; `status` has exit code 1 for a tree that is neither clean nor patched and nothing else."""
    args = make_parser().parse_args(argv)
    enter_working_folder()
    from flagscale.cli import patch_import

    actions = {"apply": apply, "revert": revert, "status": status, "diff": diff, "export": export}
    actions |= {"verify": try_releases, "rebase": try_releases}
    actions["import"] = patch_import.run
    return actions[args.action](args)
