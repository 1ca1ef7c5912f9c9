"""`flagscale patch verify` and `rebase`: a patch set on releases that it was not made for."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flagscale.patch.pins import Pin
    from flagscale.patch.release import Index, Place
    from flagscale.patch.series import Series
    from flagscale.patch.tree import Content


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", nargs="+", required=True, metavar="RELEASE",
                        help="versions on the package index, archives, folders, or commits of --tree")  # fmt: skip
    parser.add_argument("--notes", action="store_true", help="say of each patch why it does not carry over")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the decay into this file")
    add_cache(parser)


def add_rebase(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--onto", metavar="RELEASE", help="the release to carry the series to: as with verify --against")
    what.add_argument("--continue", dest="go_on", action="store_true", help="conflicts are solved: write the series")
    what.add_argument("--abort", action="store_true", help="forget the rebase that is under way")
    parser.add_argument("--version", help="what the release is called, where --onto is a folder or a commit")
    add_cache(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, help="where archives are kept; default: ~/.cache/flagscale/releases")


class Releases:
    """Finds releases: asks pip's settings and the index at most once."""

    def __init__(self, pin: "Pin | None", tree: Path | None, cache: Path | None) -> None:
        from flagscale.env import wheel_dir

        self._pin, self._tree = pin, tree
        self._cache = cache or wheel_dir() / "releases"
        self._index: Index | None = None

    def find(self, word: str) -> "Place":
        """The release that a word means.

        Raises:
            SourceError: it is no path and no commit, and the index has no such version.
            UserError: it could only be a version, and of which project is not known.
        """
        from flagscale.errors import UserError
        from flagscale.patch.release import Index, Place, bring_release, find_place

        place = find_place(word, self._tree)
        if place:
            return dataclasses.replace(place, top=self._top(place.path))
        if self._pin is None:
            raise UserError(
                f"{word}: no such archive, folder or commit; to try a version, name the backend: `.. vllm ..`"
            )
        self._index = self._index or Index(self._pin.project)
        path = bring_release(self._index, word, self._cache)
        return Place(word, path, top=self._top(path))

    def _top(self, path: Path) -> str:
        """A pin of a wheel says nothing of where its files are in a source archive."""
        return self._pin.top if self._pin and path.is_file() and path.suffix != ".whl" else ""


def find_home(layers: "Sequence[Series]", tree: Path | None, releases: Releases) -> "Place | None":
    """The release that the series was made for: in the tree, or else on the index."""
    from flagscale.errors import FlagScaleError
    from flagscale.patch.release import Place
    from flagscale.patch.upstream import find_upstream

    upstream = find_upstream(tree) if tree and tree.is_dir() else None
    if upstream and tree:
        return Place(layers[-1].version, tree, upstream.commit)
    try:
        return releases.find(layers[-1].version)
    except FlagScaleError:
        return None


def find_bases(
    layers: "Sequence[Series]", tree: Path | None, home: "Place | None"
) -> "Mapping[str, Mapping[str, Content]]":
    from flagscale.patch.bases import make_find_base
    from flagscale.patch.decay import wanted_names
    from flagscale.patch.release import load_release
    from flagscale.patch.verify import collect_bases

    files = load_release(home, wanted_names(layers)).files if home else {}
    readers = [lambda name: files[name].data if name in files else None]
    return collect_bases(layers, make_find_base([tree] if tree else [], readers))


def verify(args: argparse.Namespace, pin: "Pin | None", tree: Path | None, layers: "list[Series]") -> int:
    """0 if every patch carries over to every release or is already there, else 1."""
    from flagscale.patch.decay import plot_decay, render_matrix, render_notes
    from flagscale.patch.decay import verify as try_all

    releases = Releases(pin, tree, args.cache)
    places = [releases.find(word) for word in args.against]
    home = find_home(layers, tree, releases)
    columns = try_all(layers, places, find_bases(layers, tree, home), home)
    if args.json:
        rows = [dataclasses.asdict(verdict) for column in columns for verdict in column]
        print(json.dumps({"series": [layer.name for layer in layers], "verdicts": rows}))
    else:
        print(render_matrix(columns), end="")
        print(f"\n{render_notes(columns)}" if args.notes else "", end="")
    if args.plot:
        plot_decay(columns, f"{layers[-1].name}, made for {layers[-1].version}", args.plot)
    return int(any(verdict.kind in ("conflict", "obsolete") for column in columns for verdict in column))


def rebase(args: argparse.Namespace, pin: "Pin | None", tree: Path | None, layers: "list[Series]", folder: Path) -> int:
    """0 if the series was rewritten, 1 if a person has to solve conflicts first."""
    from flagscale.patch.decay import collect_symbols, try_place
    from flagscale.patch.rebase import Rebased, abort_rebase, continue_rebase, rebase_series

    if args.abort:
        abort_rebase(folder)
        print(f"{folder}: the rebase is forgotten, the series is as it was")
        return 0
    if args.go_on:
        done: Rebased = continue_rebase(folder)
    else:
        releases = Releases(pin, tree, args.cache)
        place = releases.find(args.onto)
        home = find_home(layers, tree, releases)
        bases = find_bases(layers, tree, home)
        trials = try_place(place, layers, bases, collect_symbols(layers, bases, home))
        own = [trial for trial in trials if trial.verdict.series == layers[-1].name]
        done = rebase_series(folder, own, args.version or place.label, place.digest)
    if args.json:
        row = {"work": str(done.work) if done.work else None, "todo": done.todo, "dropped": done.dropped}
        print(json.dumps(row | {"patches": len(done.series.patches)}))
        return int(done.work is not None)
    print("".join(f"dropped {line}\n" for line in done.dropped), end="")
    if done.work is None:
        print(f"{folder}: {len(done.series.patches)} patches, made for {done.series.made_for}")
        return 0
    print("".join(f"left    {line}\n" for line in done.todo), end="")
    print(f"solve what is marked in {done.work / 'new'} (the patches are in {done.work / 'patches'}),")
    print("then: the same command with --continue instead of --onto; or --abort. The series is as it was until then.")
    return 1
