"""`flagscale explain`: where each value of a configuration came from."""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flagscale.cli.jobs import compose
from flagscale.errors import UserError, find_nearest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flagscale explain", description="Say which file and line, or which override, set a value."
    )
    parser.add_argument("config", help="a folder of examples/, or the path of an experiment YAML")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="key|override",
        help="a dotted key (all keys where it is left out); `key=value` overrides",
    )
    parser.add_argument("--task", default="train", help="which YAML of the example (default: train)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    keys = [word for word in args.rest if "=" not in word and not word.startswith("~")]
    overrides = [word for word in args.rest if word not in keys]
    composed = compose(args.config, args.task, overrides)
    assert composed.find_origins is not None
    origins = composed.find_origins()
    from flagscale.runner.config.load import hidden_values
    from flagscale.runner.config.secrets import mask_secrets, mask_text

    hidden = hidden_values(composed)
    leaves = dict(_leaves(mask_secrets(composed.values, hidden), ""))
    rows = []
    for key in keys or [""]:
        found = {path: value for path, value in leaves.items() if not key or path == key or path.startswith(key + ".")}
        if not found:
            near = find_nearest(key, dict.fromkeys(part for path in leaves for part in _prefixes(path)))
            raise UserError(f"{key}: there is no such key" + (f"; did you mean `{near}`?" if near else ""))
        for path, value in found.items():
            rows.append((path, value, [mask_text(place, hidden) for place in origins.get(path)]))
    if args.json:
        print(json.dumps({path: {"value": value, "set_by": places} for path, value, places in rows}, indent=2))
        return 0
    for path, value, places in rows:
        print(f"{path}: {json.dumps(value, ensure_ascii=False)}")
        print(f"    {places[-1] if places else 'not set by a file'}")
        for earlier in reversed(places[:-1]):
            print(f"    over {earlier}")
    return 0


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and node and any(isinstance(item, Mapping | list) for item in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node
