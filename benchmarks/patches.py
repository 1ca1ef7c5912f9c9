"""What the patch tool costs, against one `git apply` of the same diffs, and how long a verification takes.

    python benchmarks/patches.py [--runs 7] [--files 600]

A made-up source of `--files` Python files, of which 200 are patched, in the folder for temporary files. Apply and
revert are run in turn with `git apply` and `git apply --reverse` in an equal folder, so that a machine's drift falls on
both alike; the medians of the ratios of wall time and of processor time are quoted. The functions are timed in this
process: what starting Python costs is measured by benchmarks/startup.py. On a machine that does other work the wall
times of some tens of milliseconds are those of its disk.

    apply / git apply                      promised: under 2 (wall time)
    revert / git apply                     promised: under 2 (wall time)
    verify of 200 patches on 10 releases   promised: under 60 s on 2 cores
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flagscale.patch.apply import apply_series, revert_tree  # noqa: E402
from flagscale.patch.decay import count_kinds, verify  # noqa: E402
from flagscale.patch.export import export_series  # noqa: E402
from flagscale.patch.release import Place  # noqa: E402
from flagscale.patch.series import Header, Series, load_series  # noqa: E402
from flagscale.patch.tree import read_content  # noqa: E402
from flagscale.patch.upstream import of_folder  # noqa: E402
from flagscale.patch.verify import collect_bases  # noqa: E402

NUM_PATCHES = 200
NUM_RELEASES = 10
HEADER = Header("to measure", "by a few lines", "none: made up", "never")


def make_source(chance: random.Random, num_files: int) -> dict[str, list[str]]:
    """File name -> lines of a made-up package: 12 functions of 20 lines each."""
    return {
        f"pkg/part_{number % 40}/module_{number}.py": [
            line
            for function in range(12)
            for line in (
                f"def function_{number}_{function}(value):\n",
                *(f"    value += {chance.random()}\n" for _ in range(18)),
                "    return value\n\n",
            )
        ]
        for number in range(num_files)
    }


def edit(chance: random.Random, lines: list[str], count: int) -> list[str]:
    """The lines with `count` of the functions' inner lines replaced."""
    edited = list(lines)
    inner = [index for index, line in enumerate(lines) if line.startswith("    value")]
    for index in chance.sample(inner, count):
        edited[index] = f"    value -= {chance.random()}\n"
    return edited


def write_tree(folder: Path, files: dict[str, list[str]]) -> Path:
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    return folder


def make_series(folder: Path, chance: random.Random, source: dict[str, list[str]]) -> tuple[Path, Series]:
    """Upstream's tree, and a series that changes 4 places in each of 200 files."""
    upstream = write_tree(folder / "upstream", source)
    names = chance.sample(sorted(source), NUM_PATCHES)
    edited = write_tree(folder / "edited", source | {name: edit(chance, source[name], 4) for name in names})
    sets = folder / "hardware" / "Made_Up" / "pkg"
    export_series(edited, sets, Series("Made_Up/pkg", "pkg", "1.0", "none"), of_folder(upstream), (), HEADER)
    return upstream, load_series(sets)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds, of this process and those that it waited for."""

    def used() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    start, before = time.perf_counter(), used()
    work()
    return time.perf_counter() - start, used() - before


def compare(folder: Path, upstream: Path, series: Series, runs: int) -> bool:
    """Print what apply and revert cost beside git; whether both promises were kept."""
    ours, theirs = folder / "ours", folder / "theirs"
    shutil.copytree(upstream, ours)
    shutil.copytree(upstream, theirs)
    diff = folder / "all.diff"
    diff.write_bytes(series.stream)
    environ = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)}

    def git(*words: str) -> None:
        subprocess.run(["git", "apply", *words, str(diff)], cwd=theirs, env=environ, check=True)

    ratios: dict[str, list[tuple[float, float]]] = {"apply": [], "revert": []}
    for _ in range(runs):
        theirs_forth = timed(git)
        ours_forth = timed(lambda: apply_series(ours, [series]))
        theirs_back = timed(lambda: git("--reverse"))
        ours_back = timed(lambda: revert_tree(ours))
        ratios["apply"].append((ours_forth[0] / theirs_forth[0], ours_forth[1] / theirs_forth[1]))
        ratios["revert"].append((ours_back[0] / theirs_back[0], ours_back[1] / theirs_back[1]))
    kept = True
    for name, found in ratios.items():
        wall, processor = (statistics.median(column) for column in zip(*found, strict=True))
        kept &= wall < 2
        spread = f"{min(found)[0]:.2f} to {max(found)[0]:.2f}"
        told = f"{name} / git apply: {wall:.2f} wall ({spread}), {processor:.2f} processor"
        print(f"{told}; promised under 2: {'kept' if wall < 2 else 'BROKEN'}")
    return kept


def make_releases(folder: Path, chance: random.Random, source: dict[str, list[str]]) -> list[Place]:
    """Ten archives, each with some more of the files changed than the one before."""
    places = []
    now = dict(source)
    for number in range(1, NUM_RELEASES + 1):
        for name in chance.sample(sorted(now), len(now) // 20):
            now[name] = edit(chance, now[name], 20)
        tree = write_tree(folder / f"pkg-{number}.0", now)
        archive = folder / f"pkg-{number}.0.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            tar.add(tree, tree.name)
        shutil.rmtree(tree)
        places.append(Place(f"{number}.0", archive))
    return places


def time_verify(upstream: Path, series: Series, places: list[Place]) -> bool:
    def find_base(name: str, _sha: str) -> bytes | None:
        content = read_content(upstream, name)
        return content.data if content else None

    start = time.perf_counter()
    columns = verify([series], places, collect_bases([series], find_base), Place("1.0", upstream))
    took = time.perf_counter() - start
    kinds = count_kinds([verdict for column in columns for verdict in column])
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"verify of {NUM_PATCHES} patches on {NUM_RELEASES} releases: {took:.1f} s ({told})", end="")
    print(f", promised under 60: {'kept' if took < 60 else 'BROKEN'}")
    return took < 60


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--files", type=int, default=600, help="files in the source: Megatron-LM's package has 550")
    args = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_source(chance, args.files)
        upstream, series = make_series(folder, chance, source)
        kept = compare(folder, upstream, series, args.runs)
        places = make_releases(folder, chance, source)
        kept &= time_verify(upstream, series, places)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
