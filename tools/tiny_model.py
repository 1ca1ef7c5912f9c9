"""Make the model that `flagscale serve tiny` serves: the newest checkpoint of `flagscale train tiny`, converted; where
nobody has trained one yet, a smaller one that is trained here for some seconds.

    python tools/tiny_model.py --checkpoints outputs/tiny/checkpoints outputs/tiny_serve/model

What is there and up to date is left as it is, so that every replica may run this before it starts.
"""

import argparse
import fcntl
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flagscale.errors import FlagScaleError, UserError
from flagscale.inference.recipe import MAX_LEN, make_tiny_model
from flagscale.sync.checkpoint import TRACKER, convert

ORIGIN = "origin.txt"
"""what a folder was made from; one without it was not made here"""
RECIPE = "recipe"


def find_origin(checkpoints: Path) -> str:
    """The newest checkpoint's name, or `recipe` where there is none."""
    try:
        return f"iteration {(checkpoints / TRACKER).read_text().strip()}"
    except OSError:
        return RECIPE


def make_model(checkpoints: Path, folder: Path) -> str:
    """Make the folder if it is not there or not of the newest checkpoint; returns what it was made from.

    Raises:
        UserError: the folder holds something else, or the checkpoint cannot be converted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        origin = find_origin(checkpoints)
        if folder.exists():
            if not (folder / ORIGIN).is_file():
                raise UserError(f"{folder}: was not made by this tool; expected a folder that does not exist yet")
            if (folder / ORIGIN).read_text() == origin:
                return origin
        print(f"{folder}: is made of {'nothing, and trained a little' if origin == RECIPE else origin}", flush=True)
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if origin == RECIPE:
            make_tiny_model(part)
        else:
            convert(checkpoints, part, to="hf", max_len=MAX_LEN)
        (part / ORIGIN).write_text(origin)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return origin


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the model that `flagscale serve tiny` serves.")
    parser.add_argument("--checkpoints", type=Path, required=True, help="where `flagscale train tiny` leaves its own")
    parser.add_argument("folder", type=Path, help="the model's folder")
    args = parser.parse_args()
    try:
        print(f"{args.folder}: is of the {make_model(args.checkpoints, args.folder)}")
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
