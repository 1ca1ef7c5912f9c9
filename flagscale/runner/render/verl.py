"""verl takes its configuration as Hydra overrides: `a.b.c=value`, `+a.b=value` for what its own configuration lacks.

Null is an override like any other here, since it replaces a value of verl's own configuration. Values follow Hydra's
override grammar (https://hydra.cc/docs/advanced/override_grammar/basic/): lists `[a,b]`, mappings `{k:v}`, and strings
that the grammar would read as something else in single quotes.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.@+-]*")
_KEYWORDS = frozenset({"true", "false", "null", "none", "nan", "inf", "yes", "no", "on", "off"})


def render_verl(arguments: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    return tuple(word for name, value in arguments for word in _overrides(name, value))


def _overrides(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _overrides(f"{path}.{key}", item)
    else:
        yield f"{path}={render_hydra_value(value)}"


def render_hydra_value(value: Any) -> str:
    """A value that Hydra's override parser reads back as it is."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{render_hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(render_hydra_value, value)) + "]"
    return _string(str(value))


def _key(key: Any) -> str:
    return _string(str(key))


def _string(text: str) -> str:
    if _BARE.fullmatch(text) and text.lower() not in _KEYWORDS:
        return text
    # Hydra reads a backslash literally unless it stands before a quote or at the end of a run of them before one
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * tail + "'"
