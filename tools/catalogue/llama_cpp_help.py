"""From `llama-server --help` to the rows of a catalogue.

llama.cpp keeps its argument table in C++ and offers it as text only. The text is regular: a line that starts with a
dash opens an argument, its flags and its value's name stand before the help, which starts at column 40. What a value's
name does not tell (`N` is a count here and a probability there) is taken from the default that the help names, and is
wider than the truth where it names none.
"""

import re
from typing import Any

from argparse_dump import Row, finish_row

HELP_COLUMN = 40
_EXITS = ("--help", "--version", "--completion-bash", "--list-devices", "--cache-list")
_FLAG = re.compile(r"(?:-[A-Za-z]|--)[\w.-]*")
_DEFAULT = re.compile(r"\(?default: ?'?\"?([^'\"(),;]*)")
_NUMBER_NAMES = ("N", "P", "SEED", "INDEX", "PORT", "SECONDS", "SIMILARITY", "<0...100>")


def parse_help(text: str) -> dict[str, Row]:
    """Every argument of the help by name, in its order, less those that print something and exit."""
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("-----"):
            blocks.append([line])
        elif blocks and line.startswith(" "):
            blocks[-1].append(line)
    parsed = [_parse_block(block) for block in blocks]
    return _merge_pairs(dict(row for row in parsed if row is not None))


def _parse_block(lines: list[str]) -> tuple[str, Row] | None:
    flags, value, first_help = split_signature(lines[0])
    words = " ".join(text for line in (first_help, *lines[1:]) if (text := line.strip()))
    if any(flag in _EXITS for flag in flags) or words.startswith("the argument has been removed"):
        return None
    flags.sort(key=lambda flag: not flag.startswith("--"))
    prose = re.sub(r"\s*\((?:env|default): [^()]*\)", "", words)
    if value:
        return finish_row(flags, _value_row(value, words), prose)
    negatives = [flag for flag in flags if flag.startswith(("--no-", "-no-")) or _is_short_negative(flag, flags)]
    positives = [flag for flag in flags if flag not in negatives]
    if not positives or not negatives:
        return finish_row(flags, {"kind": "store_true"}, prose)
    default = {"enabled": True, "true": True, "disabled": False, "false": False}.get(_default_word(words))
    return finish_row(positives, {"kind": "optional_bool", "negatives": negatives, "default": default}, prose)


def split_signature(line: str) -> tuple[list[str], str, str]:
    """The flags, the value's name (`""` where it takes none) and what of the help stands on the same line."""
    signature, help_text = line, ""
    if line[HELP_COLUMN - 2 : HELP_COLUMN] == "  ":
        signature, help_text = line[:HELP_COLUMN], line[HELP_COLUMN:]
    flags: list[str] = []
    rest = signature.strip()
    while match := _FLAG.match(rest):
        flags.append(match.group())
        rest = rest[match.end() :]
        if not rest.startswith(","):
            break
        rest = rest.lstrip(", ")
    return flags, rest.strip(), help_text.strip()


def _value_row(value: str, words: str) -> Row:
    row: Row = {}
    choices = _choices(value, words)
    if choices:
        row["type"] = "int" if all(isinstance(choice, int) for choice in choices) else None
        row["choices"] = choices
    elif re.fullmatch(r"[A-Z]+ [A-Z]+", value):
        return {"nargs": 2}
    elif value in _NUMBER_NAMES:
        row["type"] = "int" if re.fullmatch(r"-?\d+", _default_word(words)) else "float"
        if extra := re.search(r"exact number, '(\w+)', or '(\w+)'", words):
            row |= {"type": "int", "words": list(extra.groups())}
    elif value in ("SCHEMA", "JSON") or "valid json object" in words:
        row["type"] = "json"
    row["default"] = _default(words, row)
    return row


def _choices(value: str, words: str) -> list[Any]:
    if match := re.fullmatch(r"\{([^{}]+)\}|\[([\w|]+)\]|<(\d(?:\|\d)+)>", value):
        found = re.split(r"[,|]", next(group for group in match.groups() if group))
    elif match := re.search(r"allowed values: ((?:[\w.]+, )+[\w.]+)", words):
        found = match.group(1).split(", ")
    else:
        return []
    return [int(word) for word in found] if all(word.isdigit() for word in found) else found


def _default_word(words: str) -> str:
    match = _DEFAULT.search(words)
    return match.group(1).strip() if match else ""


def _default(words: str, row: Row) -> Any:
    """The default as a value of the argument's own kind, or None where the help only describes it."""
    word = _default_word(words)
    if "choices" in row:
        return next((choice for choice in row["choices"] if str(choice) == word), None)
    if word in row.get("words", ()):
        return word
    kind = row.get("type")
    if kind in ("int", "float") and re.fullmatch(r"-?\d+(\.\d+)?", word):
        return int(word) if kind == "int" and "." not in word else float(word)
    return None


def _is_short_negative(flag: str, flags: list[str]) -> bool:
    """`-nkvo` or `-nocb` beside `-kvo` or `-cb`, or `-nr`: the short double of `--no-kv-offload`, `--no-repack`."""
    return (
        not flag.startswith("--")
        and flag.startswith("-n")
        and any(
            other.startswith("--no-")
            and ({f"-{flag[2:]}", f"-{flag[3:]}"} & set(flags) or _initials(other) == flag[1:])
            for other in flags
        )
    )


def _initials(flag: str) -> str:
    return "".join(word[0] for word in flag.removeprefix("--").split("-") if word)


def _merge_pairs(rows: dict[str, Row]) -> dict[str, Row]:
    """`--x` and `--no-x` in blocks of their own are one argument."""
    merged = dict(rows)
    for name, row in rows.items():
        negative = rows.get(f"no_{name}")
        if negative is not None and row.get("kind") == negative.get("kind") == "store_true":
            flags = negative.get("flags", [f"--no-{name.replace('_', '-')}"])
            merged[name] = finish_row(
                row.get("flags", [f"--{name.replace('_', '-')}"]),
                {"kind": "optional_bool", "negatives": flags},
                row.get("help") or negative.get("help"),
            )[1]
            del merged[f"no_{name}"]
    return merged
