"""`flagscale source`: fetch the pinned source of a training backend, or say what state it is in."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flagscale.patch.index import Progress

SUMMARY = "fetch a backend's pinned source, or say whether it is there and unchanged"

ALIASES = {"megatron": "Megatron-LM", "megatron-core": "Megatron-LM"}


def find_backend(name: str, third_party: Path) -> str:
    """The folder below third_party/ that `name` means.

    Raises:
        UserError: no backend of that name has a pin.
    """
    from flagscale.errors import UserError, find_nearest

    known = sorted(path.parent.name for path in third_party.glob("*/pin.yaml"))
    wanted = ALIASES.get(name.lower(), name)
    for backend in known:
        if backend.lower() == wanted.lower():
            return backend
    names = sorted({*known, *(alias for alias, backend in ALIASES.items() if backend in known)})
    near = find_nearest(name.lower(), names)
    hint = f"; did you mean `{near}`?" if near else ""
    raise UserError(f"{name}: no backend with a pinned source; there are: {', '.join(names)}{hint}")


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


def fetch(backend: str, pin_path: Path, dest_dir: Path, replace: bool) -> int:
    from flagscale.patch.source import fetch_source, load_pin

    pin = load_pin(pin_path)
    print(f"{backend}: {pin.project} {pin.version} ({pin.tag}) into {dest_dir}", file=sys.stderr)
    with show_progress() as progress:
        fetch_source(pin, dest_dir, progress, replace=replace)
    print(f"{backend}: ready in {dest_dir}")
    return 0


def report(backend: str, pin_path: Path, dest_dir: Path, as_json: bool) -> int:
    from flagscale.patch.source import load_pin, source_status

    pin = load_pin(pin_path)
    status = source_status(pin, dest_dir)
    if as_json:
        import json

        row = {"backend": backend, "state": status.state, "path": str(dest_dir), "version": pin.version, "tag": pin.tag}
        print(json.dumps(row | {"other_pin": status.other_pin, "changed": list(status.changed)}))
    else:
        print(f"{backend}: {status.state}; {pin.project} {pin.version} ({pin.tag}) in {dest_dir}")
        if status.other_pin:
            print("  fetched for another pin")
        print("".join(f"  {line}\n" for line in status.changed), end="")
        if status.state in ("absent", "unbuilt") or status.other_pin:
            print(f"  get it with: flagscale source fetch {backend}")
    return 0 if status.state == "ready" else 1


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code: `status` gives 0 for a ready source and 1 for any other state."""
    from flagscale.env import root_dir, source_dir

    parser = argparse.ArgumentParser(prog="flagscale source", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", required=True, metavar="fetch|status")
    for action, text in (
        ("fetch", "download, check, unpack and build"),
        ("status", "absent, ready, unbuilt or drifted"),
    ):
        sub = actions.add_parser(action, help=text, description=text)
        sub.add_argument("backend", help="megatron (also: Megatron-LM)")
    actions.choices["fetch"].add_argument("--replace", action="store_true", help="discard a source that was changed")
    actions.choices["status"].add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    third_party = root_dir() / "third_party"
    backend = find_backend(args.backend, third_party)
    pin_path = third_party / backend / "pin.yaml"
    if args.action == "fetch":
        return fetch(backend, pin_path, source_dir(backend), args.replace)
    return report(backend, pin_path, source_dir(backend), args.json)
