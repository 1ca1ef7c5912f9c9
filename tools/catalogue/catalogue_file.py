"""The form of a catalogue's file: one argument a line, so that the difference of two versions reads as one."""

import json
from pathlib import Path
from typing import Any

from argparse_dump import Row


def render_catalogue(head: dict[str, Any], rows: dict[str, Row], dropped: dict[str, Row]) -> str:
    lines = ["{", *(f"  {_line(key, value)}," for key, value in head.items())]
    lines += ['  "arguments": {', *_block(rows), "  },", '  "dropped": {', *_block(dropped), "  }", "}"]
    return "\n".join(lines) + "\n"


def read_dropped(path: Path) -> dict[str, Row]:
    """What a catalogue says of dropped names: written by hand, kept when the rest is made again."""
    if not path.exists():
        return {}
    dropped: dict[str, Row] = json.loads(path.read_text())["dropped"]
    return dict(sorted(dropped.items()))


def find_differences(old: str, new: str) -> list[str]:
    """One line for each thing that differs, `-` as it stands and `+` as it would be."""
    before, after = old.splitlines(), new.splitlines()
    gone, come = set(before) - set(after), set(after) - set(before)
    lines = [f"- {line.strip()}" for line in before if line in gone]
    lines += [f"+ {line.strip()}" for line in after if line in come]
    return lines or (["the order of the lines"] if before != after else [])


def _block(rows: dict[str, Row]) -> list[str]:
    lines = [f"    {_line(name, row)}" for name, row in rows.items()]
    return [f"{line}," for line in lines[:-1]] + lines[-1:]


def _line(key: str, value: Any) -> str:
    return f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
