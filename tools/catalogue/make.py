"""Makes the argument catalogue of a backend from the backend's own parser, or checks that it is up to date.

python tools/catalogue/make.py megatron --source third_party/Megatron-LM/src
python tools/catalogue/make.py megatron --source third_party/Megatron-LM/src --check
"""

import argparse
import sys
import warnings
from pathlib import Path

from backend_parsers import RECIPES
from catalogue_file import find_differences, read_dropped, render_catalogue

CATALOGUES = Path(__file__).resolve().parents[2] / "flagscale" / "runner" / "config" / "catalogues"


def make(backend: str, source: Path | None, dropped_from: Path) -> str:
    """The text of the catalogue.

    Raises:
        SystemExit: the backend is not at its pinned version, or an override or dropped name contradicts its parser.
    """
    recipe = RECIPES[backend]
    version, rows = recipe.dump(source)
    if version != recipe.version:
        raise SystemExit(f"{backend}: found version {version}, the catalogue is pinned to {recipe.version}")
    unknown = recipe.overrides.keys() - rows.keys()
    dropped = read_dropped(dropped_from)
    revived = dropped.keys() & rows.keys()
    if unknown or revived:
        raise SystemExit(
            f"{backend} {version}: overrides of no argument: {sorted(unknown)}; dropped, yet there: {sorted(revived)}"
        )
    rows = {name: {**row, **recipe.overrides.get(name, {})} for name, row in rows.items()}
    head = {"backend": backend, "title": recipe.title, "version": version, "source": recipe.source}
    return render_catalogue(head | ({"dotted": True} if recipe.dotted else {}), rows, dropped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=sorted(RECIPES))
    needs = "; ".join(f"{name}: {recipe.needs}" for name, recipe in RECIPES.items())
    parser.add_argument("--source", type=Path, help=f"where the backend is ({needs})")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the catalogue would change")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # backends warn of every optional package that is not there
    path = CATALOGUES / f"{args.backend}.json"
    text = make(args.backend, args.source, path)
    if not args.check:
        path.write_text(text)
        print(f"{path.name}: {text.count(chr(10))} lines")
        return 0
    differences = find_differences(path.read_text() if path.exists() else "", text)
    print("\n".join(differences) or f"{path.name} is up to date")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
