"""What arguments a backend takes, known on a machine where the backend is not installed.

A catalogue is a JSON file made from the backend's own parser at a pinned version (`tools/catalogue/make.py`). Asking
the parser itself would be exact, but costs seconds, a torch and often a chip for each dry run; a file costs a
millisecond and says what the pinned version takes and nothing of any other. A backend that has moved on needs its
catalogue made again; until then `experiment.task.unknown_args: pass` lets a newer argument through.

Values are checked as YAML gives them: an int is a fine float, a quoted number is a fine number, null means "left out".
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flagscale.errors import Fault, FlagScaleError, UserError, find_nearest

Kind: TypeAlias = Literal["store", "store_true", "store_false", "optional_bool", "append"]
"""How an argument stands on a command line.

store          its flag, then its value or values
store_true     its flag alone, present where the YAML says true
store_false    the same; the name says what it switches off (`no_position_embedding`)
optional_bool  its flag for true, `negative_flag` for false
append         its flag again for each value of a list
"""

ValueType: TypeAlias = Literal["str", "int", "float", "bool", "size", "iec_size", "pattern", "json", "any"]
"""What one value of a `store` or `append` argument may be.

bool     the word true or false after the flag
size     a whole number, or one with k, m, g, t (thousands) or K, M, G, T (1024s) behind it
iec_size a whole number, or one with k, M, G, T (thousands) or Ki, Mi, Gi, Ti (1024s) behind it
pattern  a whole number, or a list expression of digits and `[]()+*,` such as `([1]*3+[0])*2`
json     a mapping or list, passed on as JSON; a string must be JSON itself
any      a plain value as it is, a mapping or list as JSON
"""

BACKENDS = ("megatron", "vllm", "sglang", "llama_cpp", "native")

_CATALOGUE_DIR = Path(__file__).with_name("catalogues")
_SIZE = re.compile(r"-?\d+|\d+[KMGT]|\d+(\.\d+)?[kmgt]")
_IEC_SIZE = re.compile(r"-?\d+|\d+[KMGT]i|\d+(\.\d+)?[kMGT]")
_PATTERN = re.compile(r"\d+|(?=.*\[)[\d\[\]()+*,]+")

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a backend.

    name: the primary long option without dashes, in snake_case
    flags: every spelling on the command line but `negative_flag`; the first is the one to render
    nargs: None: one value; a number: so many; `?`: one or none; `*`, `+`: a list
    words: strings that are taken beside values of `type`, such as `auto`
    default: the value that leaving it out means; None also where it is not known before the backend runs
    """

    name: str
    flags: tuple[str, ...]
    kind: Kind = "store"
    type: ValueType = "str"
    nargs: int | Literal["?", "*", "+"] | None = None
    choices: tuple[Any, ...] | None = None
    words: tuple[str, ...] = ()
    default: Any = None
    help: str = ""
    negative_flag: str | None = None

    @property
    def flag(self) -> str:
        return self.flags[0]

    @property
    def takes_value(self) -> bool:
        return self.kind in ("store", "append")

    @property
    def takes_list(self) -> bool:
        """Whether a YAML list is several values, rather than one value in JSON or a mistake."""
        return self.kind == "append" or isinstance(self.nargs, int) or self.nargs in ("*", "+")

    def find_expected(self, value: Any) -> str | None:
        """What should stand where `value` does, or None where `value` is right."""
        if value is None:
            return None
        if not self.takes_value:
            return None if isinstance(value, bool) else "true or false"
        if self.nargs in ("?", "*") and value is True:
            return None
        if not self.takes_list:
            return _find_expected_of_one(self, value)
        items = list(value) if isinstance(value, list | tuple) else [value]
        if isinstance(self.nargs, int) and len(items) != self.nargs:
            return f"a list of {self.nargs} values, not {len(items)}"
        if not items and self.nargs == "+":
            return "a list of at least one value"
        return next((expected for item in items if (expected := _find_expected_of_one(self, item))), None)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A name, or a value (`name=value`), that users' files hold and the backend does not take.

    reason: whose it was, and what became of it
    since: the first version without it, None where that is not known or it never was the backend's
    instead: the argument, or the value, that does its work, None where none does
    """

    name: str
    reason: str
    since: str | None = None
    instead: str | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The arguments of one backend at one version.

    title: the backend's own name for messages; source: how the file was made
    rows: the file's rows by name, from which an `Argument` is built when it is asked for
    aliases: every other spelling, as `spell` writes it, to its name; negatives: the same for `--no-…` flags
    dotted: whether `name.key` sets one key of an argument that takes JSON
    """

    backend: str
    version: str
    title: str
    source: str
    rows: Mapping[str, Row]
    aliases: Mapping[str, str]
    negatives: Mapping[str, str]
    dropped: Mapping[str, Dropped]
    dotted: bool = False

    @property
    def arguments(self) -> dict[str, Argument]:
        """All arguments by name, built anew at each call."""
        return {name: _argument(name, row) for name, row in self.rows.items()}

    def names(self) -> Iterator[str]:
        """Every spelling that `find` knows, as `spell` writes it."""
        yield from self.rows
        yield from self.aliases
        yield from self.negatives

    def find(self, key: str) -> Argument | None:
        """The argument that a YAML key means: any of its spellings, with hyphens or underscores.

        A key that spells the negative flag of an `optional_bool` gives an argument of its own, of kind `store_false`.
        """
        spelled = spell(key)
        name = self.aliases.get(spelled, spelled)
        if (row := self.rows.get(name)) is not None:
            return _argument(name, row)
        if (positive := self.negatives.get(spelled)) is not None:
            row = self.rows[positive]
            flags = _negatives(positive, row)
            return Argument(spelled, flags, kind="store_false", default=False, help=row.get("help", ""))
        if self.dotted and "." in key:
            head, _, tail = key.partition(".")
            whole = self.find(head)
            if whole is not None and whole.type in ("json", "any") and tail:
                return Argument(f"{whole.name}.{tail}", (f"{whole.flag}.{tail}",), type="any", help=whole.help)
        return None

    def find_dropped(self, key: str) -> Dropped | None:
        return self.dropped.get(spell(key))

    def find_nearest(self, key: str) -> str | None:
        """The name that `key` was most likely meant to be, written with hyphens where `key` is."""
        spelled = spell(key)
        near = next((name for name in self.names() if _is_one_edit(spelled, name)), None)
        nearest = near or find_nearest(spelled, self.names())
        return nearest.replace("_", "-") if nearest and "-" in key and "_" not in key else nearest

    def check(self, key: str, value: Any, path: str) -> Fault | None:
        """What is wrong with `key: value`, or None.

        A dropped name that is null or false asks for nothing, so it passes.

        path: the key's own dotted path, for the fault
        """
        argument = self.find(key)
        if argument is None:
            return self._fault_of_name(key, value, path)
        expected = argument.find_expected(value)
        if expected is None:
            return None
        gone = self.dropped.get(f"{argument.name}={value}")
        if gone is not None:
            return _fault_of_dropped(gone, path, f"{self.full_name} does not take `{value}` for `{argument.flag}`")
        return Fault(path, f"{_shorten(value)} is not right for `{argument.flag}` of {self.full_name}", expected)

    @property
    def full_name(self) -> str:
        return f"{self.title} {self.version}"

    def _fault_of_name(self, key: str, value: Any, path: str) -> Fault | None:
        dropped = self.find_dropped(key)
        if dropped is not None and (value is None or value is False):
            return None  # it never put a word on a command line
        what = f"{self.full_name} has no argument `{key}`"
        if dropped is None:
            return Fault(path, what, suggestion=self.find_nearest(key))
        return _fault_of_dropped(dropped, path, what)


def spell(key: str) -> str:
    """The one spelling under which a catalogue keeps `key`: underscores for hyphens, no leading dashes."""
    return key.lstrip("-").replace("-", "_")


@lru_cache
def load_catalogue(backend: str) -> Catalogue:
    """The catalogue that ships for `backend`.

    Raises:
        UserError: no catalogue ships for it.
    """
    if backend not in BACKENDS:
        nearest = find_nearest(backend, BACKENDS)
        hint = f"; did you mean `{nearest}`?" if nearest else ""
        raise UserError(f"no argument catalogue for the backend `{backend}`; there are {', '.join(BACKENDS)}{hint}")
    return read_catalogue(_CATALOGUE_DIR / f"{backend}.json")


def read_catalogue(path: Path) -> Catalogue:
    """A catalogue from a file.

    Raises:
        FlagScaleError: the file is missing or is not a catalogue; it ships with the package, so no user wrote it.
    """
    try:
        whole = json.loads(path.read_bytes())
        rows: dict[str, Row] = whole["arguments"]
        aliases = {spell(flag): name for name, row in rows.items() for flag in row.get("flags", ()) if flag}
        return Catalogue(
            backend=whole["backend"],
            version=whole["version"],
            title=whole["title"],
            source=whole["source"],
            rows=rows,
            aliases={alias: name for alias, name in aliases.items() if alias not in rows},
            negatives={spell(flag): name for name, row in rows.items() for flag in _negatives(name, row)},
            dropped={name: Dropped(name, **row) for name, row in whole["dropped"].items()},
            dotted=whole.get("dotted", False),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlagScaleError(f"{path}: not an argument catalogue: {error!r}") from error


def _fault_of_dropped(dropped: Dropped, path: str, what: str) -> Fault:
    since = f" (gone since {dropped.since})" if dropped.since else ""
    return Fault(
        path, f"{what}{since}: {dropped.reason}", f"`{dropped.instead}` in its place" if dropped.instead else None
    )


def _argument(name: str, row: Row) -> Argument:
    kind: Kind = row.get("kind", "store")
    is_flag = kind in ("store_true", "store_false")
    choices = row.get("choices")
    return Argument(
        name=name,
        flags=tuple(row.get("flags") or (f"--{name.replace('_', '-')}",)),
        kind=kind,
        type=row.get("type", "str"),
        nargs=row.get("nargs"),
        choices=None if choices is None else tuple(choices),
        words=tuple(row.get("words", ())),
        default=False if is_flag else row.get("default"),
        help=row.get("help", ""),
        negative_flag=next(iter(_negatives(name, row)), None),
    )


def _negatives(name: str, row: Row) -> tuple[str, ...]:
    if row.get("kind") != "optional_bool":
        return ()
    return tuple(row.get("negatives") or (f"--no-{name.replace('_', '-')}",))


def _find_expected_of_one(argument: Argument, value: Any) -> str | None:
    if argument.choices is not None:
        return _find_expected_choice(argument.choices, value)
    if isinstance(value, str) and value in argument.words:
        return None
    expected = _EXPECTED[argument.type]
    if argument.words:
        expected += f", or {', '.join(argument.words)}"
    return None if _fits(argument.type, value) else expected


def _find_expected_choice(choices: tuple[Any, ...], value: Any) -> str | None:
    if isinstance(value, bool):
        if value in [choice for choice in choices if isinstance(choice, bool)]:
            return None
        quoted = {"on", "off", "yes", "no", "true", "false"} & {str(choice) for choice in choices}
        hint = ", in quotes: YAML reads a bare on, off, yes or no as true or false" if quoted else ""
        return f"one of {', '.join(map(_shorten, choices))}{hint}"
    if isinstance(value, str | int | float) and str(value) in {str(choice) for choice in choices}:
        return None
    expected = f"one of {', '.join(map(str, choices))}"
    nearest = find_nearest(str(value), [str(choice) for choice in choices])
    return f"{expected} (nearest: {nearest})" if nearest else expected


_EXPECTED: dict[ValueType, str] = {
    "str": "one plain value",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "size": "a whole number, or one such as 4k (4000) or 4K (4096)",
    "iec_size": "a whole number, or one such as 4k (4000) or 4Ki (4096)",
    "pattern": "a whole number, or a quoted pattern such as ([1]*3+[0])*2",
    "json": "a mapping or a list (it is passed on as JSON)",
    "any": "a plain value, a mapping or a list",
}


def _fits(wanted: ValueType, value: Any) -> bool:
    match wanted:
        case "any":
            return True
        case "bool":
            return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))
        case "json":
            return isinstance(value, Mapping | list | tuple) or (isinstance(value, str) and _parses(json.loads, value))
        case "str":
            return isinstance(value, str | int | float) and not isinstance(value, bool)
        case "int":
            # YAML reads 1e6 as a float; a whole one is rendered as the int that the engine's parser wants
            return _is_int(value) or _is_whole(value) or (isinstance(value, str) and _parses(int, value))
        case "float":
            return _is_int(value) or isinstance(value, float) or (isinstance(value, str) and _parses(float, value))
        case "size":
            return _is_int(value) or (isinstance(value, str) and _SIZE.fullmatch(value) is not None)
        case "iec_size":
            return _is_int(value) or (isinstance(value, str) and _IEC_SIZE.fullmatch(value) is not None)
        case "pattern":
            return _is_int(value) or (isinstance(value, str) and _PATTERN.fullmatch(value) is not None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _parses(parse: Any, text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _shorten(value: Any) -> str:
    """A value as YAML would write it, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_one_edit(key: str, name: str) -> bool:
    """Whether one letter added, dropped, replaced or swapped with its neighbour makes `name` of `key`."""
    if abs(len(key) - len(name)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(key, name, strict=False)) if a != b), min(len(key), len(name)))
    rest, other = key[start:], name[start:]
    swapped = rest[1:2] + rest[:1] + rest[2:]
    return rest[1:] == other[1:] or rest[1:] == other or rest == other[1:] or swapped == other
