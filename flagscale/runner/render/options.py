"""From names and values to command-line options, for backends whose catalogue says how each argument is spelled.

Null is left out. A value that the engine reads as JSON is rendered as JSON. What no catalogue knows is rendered by the
contract's plain rule: true is the bare flag, false is nothing, a list is its items behind one flag.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from flagscale.runner.config.catalogue import Argument, load_catalogue

Renderer = Callable[[tuple[tuple[str, Any], ...]], tuple[str, ...]]


def render_value(value: Any) -> str:
    """One word. Booleans and structures as JSON spells them, numbers as Python's `repr` does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=_thaw, ensure_ascii=False)
    return str(value)


def _thaw(value: Any) -> Any:
    return dict(value)


def _without_fractions(value: Any) -> Any:
    """Whole floats as ints: YAML reads `1e6` as a float, which a parser of ints refuses."""
    if isinstance(value, list | tuple):
        return tuple(_without_fractions(item) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")
"""the negative numbers that argparse knows for a value: `-1e-05` is to it an option"""


def _with_flag(flag: str, word: str) -> tuple[str, ...]:
    """The flag and its value; joined by `=` where argparse would take the value for another option."""
    return (f"{flag}={word}",) if word.startswith("-") and not _NEGATIVE.fullmatch(word) else (flag, word)


def _render_item(value: Any) -> str:
    """One of several values behind a flag, where `=` cannot help."""
    word = render_value(value)
    if isinstance(value, float) and word.startswith("-") and not _NEGATIVE.fullmatch(word) and math.isfinite(value):
        return format(Decimal(word), "f")
    return word


def render_option(name: str, value: Any, argument: Argument | None) -> tuple[str, ...]:
    """The words of one argument."""
    flag = argument.flag if argument else "--" + name.replace("_", "-")
    if value is None:
        return ()
    if argument is not None and argument.type == "int":
        value = _without_fractions(value)
    if argument is None or not argument.takes_value:
        if value is True:
            return (flag,)
        if value is False:
            return (argument.negative_flag,) if argument and argument.negative_flag else ()
    if argument is not None and argument.kind == "append":
        items = value if isinstance(value, tuple | list) else (value,)
        return tuple(word for item in items for word in _with_flag(flag, render_value(item)))
    if isinstance(value, tuple | list) and (argument is None or argument.takes_list):
        return (flag, *map(_render_item, value))
    if argument is not None and argument.nargs in ("?", "*") and value is True:
        return (flag,)
    return _with_flag(flag, render_value(value))


def catalogue_renderer(backend: str) -> Renderer:
    """The renderer of a backend whose every argument is an option."""

    @cache
    def find(name: str) -> Argument | None:
        return load_catalogue(backend).find(name)

    def render(arguments: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
        return tuple(word for name, value in arguments for word in render_option(name, value, find(name)))

    return render


def render_plain(arguments: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    """The contract's rule for a backend without a catalogue."""
    return tuple(word for name, value in arguments for word in render_option(name, value, None))
