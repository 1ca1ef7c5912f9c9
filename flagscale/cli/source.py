"""`flagscale source`: fetch the pinned source of a backend, patch it for chips, or say what state it is in."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flagscale.patch.index import Progress
    from flagscale.patch.pins import Pin

SUMMARY = "fetch a backend's pinned source, or say whether it is there and unchanged"


@contextmanager
def show_progress() -> "Iterator[Progress]":
    """A bar for each step on a terminal, else a line when a step begins and when it ends."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, int] = {}

            def draw(step: str, done: int, total: int) -> None:
                task = tasks.setdefault(step, len(tasks))
                if task == len(bars.task_ids):
                    bars.add_task(step)
                bars.update(bars.task_ids[task], completed=done, total=total or None)

            yield draw
        return
    begun: set[str] = set()

    def say(step: str, done: int, total: int) -> None:
        if step not in begun or (total and done == total):
            print(f"{step}: {done}/{total or '?'}", file=sys.stderr, flush=True)
        begun.add(step)

    yield say


def name_chip(word: str) -> str:
    """The record's name of a chip that a user calls `word`.

    Raises:
        UserError: no chip is called so.
    """
    from flagscale.chips import CHIPS, find_chip
    from flagscale.errors import UserError, find_nearest

    chip = find_chip(word)
    if chip is None:
        near = find_nearest(word, [name for known in CHIPS for name in (known.name, *known.aliases)])
        hint = f"; did you mean `{near}`?" if near else ""
        raise UserError(f"{word}: no such chip; there are {', '.join(known.name for known in CHIPS)}{hint}")
    return chip.name


def find_chips(words: Sequence[str], backend: str) -> tuple[str, ...]:
    """The chips to lay patched trees for: those named, else those of this machine; less those without patches.

    Raises:
        UserError: no chip is called so.
    """
    from flagscale.cli.jobs import list_patched_chips

    patched = list_patched_chips(backend)
    names = [name_chip(word) for word in words]
    if patched and not names:
        from flagscale.chips.probe import probe_host

        names = [probe_host().chip.name, "Generic_CPU"]
    return tuple(name for name in dict.fromkeys(names) if name in patched)


def fetch(pin: "Pin", dest_dir: Path, chips: Sequence[str], replace: bool, repository: str | None = None) -> int:
    """Fetch a source, and lay the trees of chips beside it.

    repository: of git, to take the pinned commit from; None is the package index
    """
    import time

    from flagscale.env import root_dir
    from flagscale.patch.chiptree import lay_tree, load_layers
    from flagscale.patch.index import without_login
    from flagscale.patch.source import fetch_source

    mib = 1 << 20
    size = f"{-(-pin.size_bytes // mib)} MiB to download, {-(-pin.disk_bytes // mib)} MiB on disk"
    tag = f" ({pin.tag})" if pin.tag else ""
    if repository is None:
        print(f"{pin.name}: {pin.project} {pin.version}{tag} into {dest_dir}; {size}", file=sys.stderr)
    else:
        print(f"{pin.name}: commit {pin.commit} of {without_login(repository)} into {dest_dir}", file=sys.stderr)
    begun = time.monotonic()
    with show_progress() as progress:
        fetch_source(pin, dest_dir, progress, replace, repository)
        print(f"{pin.name}: ready in {dest_dir} ({time.monotonic() - begun:.0f} s)")
        for chip in chips:
            lay_tree(pin, dest_dir, chip, load_layers(root_dir() / "hardware", pin.name, chip), progress, replace)
            print(f"{pin.name}: patched for {chip} in {dest_dir.parent / chip}")
    return 0


def report(pin: "Pin", dest_dir: Path, as_json: bool) -> int:
    """Say what the source is, and the trees of chips beside it."""
    from flagscale.patch.chiptree import list_chip_trees
    from flagscale.patch.source import source_status
    from flagscale.patch.state import read_state

    status = source_status(pin, dest_dir)
    trees = {path: read_state(path) for path in list_chip_trees(dest_dir)}
    if as_json:
        import json
        from dataclasses import asdict

        row: dict[str, object] = {
            "backend": pin.name,
            "state": status.state,
            "path": str(dest_dir),
            "version": pin.version,
            "tag": pin.tag,
        }
        row |= {"other_pin": status.other_pin, "changed": list(status.changed), "commit": status.commit}
        print(json.dumps(row | {"trees": [{"path": str(path)} | asdict(state) for path, state in trees.items()]}))
        return 0 if status.state == "ready" else 1
    commit = f", commit {status.commit[:12]}" if status.commit else ""
    tag = f" ({pin.tag})" if pin.tag else ""
    print(f"{pin.name}: {status.state}; {pin.project} {pin.version}{tag} in {dest_dir}{commit}")
    if status.other_pin:
        print("  fetched for another pin")
    print("".join(f"  {line}\n" for line in status.changed), end="")
    if status.state in ("absent", "unbuilt") or status.other_pin:
        print(f"  get it with: flagscale source fetch {pin.backend}")
    for path, state in trees.items():
        series = f" by {', '.join(state.series)}" if state.series else ""
        print(f"{path.name}: {state.kind}{series}; {path}")
        print("".join(f"  {line}\n" for line in state.changed), end="")
    return 0 if status.state == "ready" else 1


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code: `status` gives 0 for a ready source and 1 for any other state."""
    from flagscale.env import root_dir, source_dir
    from flagscale.patch.pins import find_pin

    parser = argparse.ArgumentParser(prog="flagscale source", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", required=True, metavar="fetch|status")
    for action, text in (
        ("fetch", "download, check, unpack and build; patch for the chips of this machine"),
        ("status", "absent, ready, unbuilt or drifted; and the trees that are patched for chips"),
    ):
        sub = actions.add_parser(action, help=text, description=text)
        sub.add_argument("backend", help="megatron, vllm, sglang, llama_cpp or verl")
    fetching = actions.choices["fetch"]
    fetching.add_argument("--replace", action="store_true", help="discard a source that was changed")
    fetching.add_argument("--device", action="append", default=[], help="patch for this chip, not for this machine's")
    fetching.add_argument(
        "--from-git",
        nargs="?",
        const="",
        metavar="URL",
        help="take the pinned commit from git, not an archive from the package index; default: the pin's repository",
    )
    actions.choices["status"].add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    pin = find_pin(args.backend, root_dir() / "third_party")
    if args.action == "fetch":
        repository = pin.repository if args.from_git == "" else args.from_git
        return fetch(pin, source_dir(pin.name), find_chips(args.device, pin.name), args.replace, repository)
    return report(pin, source_dir(pin.name), args.json)
