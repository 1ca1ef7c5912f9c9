"""From a live argparse parser to the rows of a catalogue.

What an option's `type=` takes is found by trying it on a few words, not by its name: backends wrap their types in
closures, lambdas and enum look-ups, of which a name says nothing. A word list this short cannot tell every type apart,
so an unusual one comes out wider than it is (`str` for "three ints with commas"), never narrower.
"""

import argparse
import enum
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

HELP_CHARS = 160
_SKIPPED = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)
_FLAG_KINDS: dict[type[argparse.Action], str] = {
    argparse._StoreTrueAction: "store_true",
    argparse._StoreFalseAction: "store_false",
}
_PROBES = ("1", "1.5", "4k", "4Ki", "abc", "auto", "true", "[1]", "[1]*2", "{}")
_MACHINE = re.compile(r"/(root|home|tmp|usr|var|Users)/|<.* at 0x|^<")


def dump_parser(parser: argparse.ArgumentParser) -> dict[str, Row]:
    """Every option of `parser` by name, in the parser's order; positionals and what prints and exits are left out."""
    rows: dict[str, Row] = {}
    short = _find_abbreviations(parser)
    switches: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if not action.option_strings or isinstance(action, _SKIPPED):
            continue
        paired = switches.get(_opposite(action))
        if paired is not None and paired.dest == action.dest:
            _merge_pair(rows, paired, action)
            continue
        name, row = dump_action(action)
        if name in short:
            row = {"flags": None} | row | {"flags": [*_ordered(action.option_strings), short[name]]}
        rows[name] = row
        if type(action) in _FLAG_KINDS:
            switches[name] = action
    return rows


def dump_action(action: argparse.Action) -> tuple[str, Row]:
    flags = _ordered(action.option_strings)
    row: Row = {}
    if isinstance(action, argparse.BooleanOptionalAction):
        negatives = [flag for flag in flags if flag.startswith("--no-") and f"--{flag[5:]}" in flags]
        flags = [flag for flag in flags if flag not in negatives]
        row |= {"kind": "optional_bool", "negatives": negatives}
        row["default"] = action.default if isinstance(action.default, bool) else None
    elif type(action) in _FLAG_KINDS:
        row["kind"] = _FLAG_KINDS[type(action)]
    elif action.nargs == 0:
        row["kind"] = "store_true"
    else:
        row |= _dump_store(action)
    return finish_row(flags, row, action.help)


def finish_row(flags: list[str], row: Row, help_text: str | None) -> tuple[str, Row]:
    """Name and row, with what the reader of the file can conclude left out."""
    name = flags[0].lstrip("-").replace("-", "_")
    whole: Row = {}
    if row.get("negatives") == [f"--no-{name.replace('_', '-')}"]:
        row = {key: value for key, value in row.items() if key != "negatives"}
    if flags != [f"--{name.replace('_', '-')}"]:
        whole["flags"] = flags
    whole |= {key: value for key, value in row.items() if value is not None and value not in ((), [])}
    if text := shorten_help(help_text):
        whole["help"] = text
    return name, whole


def shorten_help(text: str | None) -> str:
    """The first sentence, at most 160 characters, on one line."""
    if not text or text == argparse.SUPPRESS:
        return ""
    plain = " ".join(text.split()).replace("%(default)s", "the default").replace("%%", "%")
    sentence = re.split(r"(?<=[a-z\])`'\"]{2}[.!])\s+(?=[A-Z`\"'-])", plain, maxsplit=1)[0]
    if _MACHINE.search(sentence):
        return ""
    return sentence if len(sentence) <= HELP_CHARS else sentence[: HELP_CHARS - 1].rsplit(" ", 1)[0] + "…"


def _dump_store(action: argparse.Action) -> Row:
    row: Row = {"kind": "append"} if isinstance(action, argparse._AppendAction | argparse._ExtendAction) else {}
    kind, words = infer_type(action.type)
    choices = None
    if action.choices is not None:
        ordered = sorted(action.choices) if isinstance(action.choices, set | frozenset) else action.choices
        choices = [value for choice in ordered if (value := as_plain(choice)) is not None]
        kind, words = _type_of_choices(choices, kind), []
    elif action.type is bool:
        choices = [True]  # bool("False") is true: there is one value that means what it says
    if kind != "str":
        row["type"] = kind
    default = as_plain(action.default)
    if isinstance(default, bool) and kind != "bool":
        default = None  # what the destination holds where the option is left out; no value that could be written
    row |= {"nargs": action.nargs, "choices": choices, "words": words, "default": default}
    return row


def infer_type(parse: Any) -> tuple[str, list[str]]:
    """The `ValueType` of a `type=` callable and the words it takes beside."""
    if parse is None or parse is str:
        return "str", []
    if parse is bool:
        return "bool", []
    took = {word: _try(parse, word) for word in _PROBES}
    json_words = (*(took[word] for word in ("{}", "[1]")), _try(parse, '{"a": 1}'), _try(parse, '["a"]'))
    structured = any(taken and not isinstance(value, str) for taken, value in json_words)
    if took["[1]*2"] == (True, [1, 1]):
        return "pattern", []
    if took["abc"][0]:
        return ("any" if structured else "str"), []
    if took["true"] == (True, True) and took["1.5"][1] != 1.5:
        return "bool", []
    words = ["auto"] if took["auto"][0] else []
    if took["4k"] == (True, 4000):
        return ("iec_size" if took["4Ki"] == (True, 4096) else "size"), words
    if structured:
        return "json", words
    if took["1.5"] == (True, 1.5):
        return "float", words
    return ("int", words) if took["1"] == (True, 1) and not took["1.5"][0] else ("str", [])


def as_plain(value: Any) -> Any:
    """A default or choice as a JSON value, or None where it is an object or depends on the machine."""
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, str) else value.name
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, str):
        return None if _MACHINE.search(value) or value == argparse.SUPPRESS else value
    if value is None or isinstance(value, bool | int | float):
        return value
    return _plain_dict(value) if isinstance(value, dict) else None


def _plain_dict(value: dict[Any, Any]) -> Any:
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return None


def _try(parse: Callable[[str], Any], word: str) -> tuple[bool, Any]:
    try:
        return True, parse(word)
    except Exception:  # a backend's own type may raise anything at all; whatever it is, it refused the word
        return False, None


def _type_of_choices(choices: Iterable[Any], inferred: str) -> str:
    return "int" if inferred == "int" and all(isinstance(choice, int) for choice in choices) else "str"


def _ordered(option_strings: Iterable[str]) -> list[str]:
    """Long options first, those without an underscore before their doubles with one."""
    return sorted(dict.fromkeys(option_strings), key=lambda flag: (not flag.startswith("--"), "_" in flag))


def _opposite(action: argparse.Action) -> str:
    if type(action) not in _FLAG_KINDS:
        return ""
    name = _ordered(action.option_strings)[0].removeprefix("--").replace("-", "_")
    return name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"


def _find_abbreviations(parser: argparse.ArgumentParser) -> dict[str, str]:
    """By name of a `--x-size` option: `--x`, where the parser takes it for that option and no other.

    argparse takes every prefix that fits one option only; this one is what people write (`--tp 8`).
    """
    if not parser.allow_abbrev:
        return {}
    taken = {flag for action in parser._actions for flag in action.option_strings}
    shorts = {flag: flag.removesuffix("-size") for flag in taken if flag.startswith("--") and flag.endswith("-size")}
    return {
        flag[2:].replace("-", "_"): short
        for flag, short in shorts.items()
        if short not in taken and sum(other.startswith(short) for other in taken) == 1
    }


def _merge_pair(rows: dict[str, Row], first: argparse.Action, second: argparse.Action) -> None:
    """`--x` and `--no-x` that set one destination are one argument."""
    negative, positive = sorted((first, second), key=lambda action: _ordered(action.option_strings)[0][:5] != "--no-")
    del rows[dump_action(first)[0]]
    row = {"kind": "optional_bool", "negatives": _ordered(negative.option_strings)}
    name, whole = finish_row(_ordered(positive.option_strings), row, positive.help or negative.help)
    rows[name] = whole
