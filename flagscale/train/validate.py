"""Megatron's own verdict on a list of arguments, for a world of any size, without a process group and without a GPU.

    python -m flagscale.train.validate --world-size 16 -- --num-layers 32 --hidden-size 4096 …
    python -m flagscale.train.validate --stdin < lists.jsonl

With --stdin every line is `{"name": …, "world_size": …, "argv": […]}` and every line of the answer
`{"name": …, "valid": …, "error": …}`: Megatron takes seconds to import, so many lists are best checked in one process.
The exit code is 0 if all are valid and 2 if one is not.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flagscale.env import source_dir
from flagscale.errors import FlagScaleError, UserError
from flagscale.hooks.megatron_elsewhere import HOOKS
from flagscale.train.backend import check_transformer_config, parse_arguments, start_megatron, validate_arguments


def find_source() -> Path:
    """The tree that runs on any machine, since no chip is needed to read arguments; without it, upstream's."""
    tree = source_dir("Megatron-LM", "Generic_CPU")
    return tree if tree.is_dir() else source_dir("Megatron-LM")


def check_arguments(argv: Sequence[str], world_size: int) -> None:
    """Parse and validate `argv` as rank 0 of `world_size` ranks would; `start_megatron` must have been called.

    Raises:
        UserError: Megatron refuses; the message is its own, or the statement that failed.
    """
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse_arguments(argv)
        validate_arguments(args)
        check_transformer_config(args)


def check_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """One answer for each line that is not empty.

    Raises:
        UserError: a line is not what the module's docstring says.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, world_size, argv = row["name"], int(row["world_size"]), [str(word) for word in row["argv"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"line {number}: expected name, world_size and argv as JSON: {error!r}") from None
        try:
            check_arguments(argv, world_size)
        except UserError as error:
            yield {"name": name, "valid": False, "error": str(error)}
        else:
            yield {"name": name, "valid": True, "error": None}


def _answer_lines() -> bool:
    valid = True
    for answer in check_lines(sys.stdin):
        print(json.dumps(answer), flush=True)
        valid &= answer["valid"]
    return valid


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m flagscale.train.validate", description="Check arguments of Megatron-LM without running it."
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks that the job will have (default 1)")
    parser.add_argument("--stdin", action="store_true", help="check one list for each JSON line of standard input")
    options = parser.parse_args(words[:at])
    sys.path.append(str(find_source()))  # a job's path has it; a user who only asks does not
    warnings.simplefilter("ignore")  # Megatron warns of every optional package that is not there
    try:
        start_megatron(HOOKS)
        if options.stdin:
            return 0 if _answer_lines() else UserError.exit_code
        check_arguments(words[at + 1 :], options.world_size)
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("valid")
    return 0


if __name__ == "__main__":
    sys.exit(main())
