"""From pydantic's errors to faults in our voice: dotted path, what is wrong, what was expected, the nearest name."""

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flagscale.errors import Fault, find_nearest

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string (in quotes, where YAML reads a number)",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "mapping": "a mapping",
}


def read_faults(error: ValidationError, model: type[BaseModel], prefix: str) -> list[Fault]:
    """Every fault that pydantic found in a section that stands at `prefix`, one for each path.

    A value that fits no member of a union fails once for each; together they say what was expected.
    """
    found: dict[tuple[str, str], list[Fault]] = {}
    for row in error.errors(include_url=False):
        fault = _fault(dict(row), model, prefix)
        found.setdefault((fault.path, fault.message), []).append(fault)
    faults = []
    for (path, message), rows in found.items():
        expected = " or ".join(dict.fromkeys(row.expected for row in rows if row.expected))
        faults.append(Fault(path, message, expected or None, rows[0].suggestion))
    return faults


def unknown_key(path: str, key: str, known: list[str], noun: str = "key") -> Fault:
    near = find_nearest(key.replace("-", "_"), known)
    expected = None if near else f"one of {', '.join(known)}" if 0 < len(known) <= 12 else None
    return Fault(path, f"there is no {noun} `{key}` here", expected=expected, suggestion=near)


def _fault(row: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Fault:
    location: tuple[str | int, ...] = row["loc"]
    path = ".".join([prefix, *_named(model, location)])
    kind: str = row["type"]
    context: Mapping[str, Any] = row.get("ctx", {})
    given = row.get("input")
    if kind == "extra_forbidden":
        return unknown_key(path, str(location[-1]), _fields_at(model, location[:-1]))
    if kind == "missing":
        return Fault(path, "is missing", expected="a value")
    if kind == "two_spellings":
        return Fault(path, str(row["msg"]))
    if kind in ("literal_error", "enum"):
        choices = str(context.get("expected", ""))
        near = find_nearest(str(given), [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")])
        return Fault(path, f"is `{_shown(given)}`", expected=choices.replace("'", ""), suggestion=near)
    for name, expected in KINDS.items():
        if kind in (f"{name}_type", f"{name}_parsing", f"{name}_attributes_type", f"{name}_from_float"):
            return Fault(path, f"is `{_shown(given)}`", expected=expected)
    text = str(row["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return Fault(path, f"is `{_shown(given)}`", expected=text)


def _shown(value: Any) -> str:
    """The value as YAML would have it, cut to a length that fits a message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _named(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys and indices of a location, without the marks that pydantic puts in: which member of a union was
    tried, and that a key is meant and not its value."""
    named: list[str] = []
    annotation: Any = model
    for part in location:
        if part == "[key]":
            continue
        if annotation is not None and len(_members(annotation)) > 1:
            annotation = None
            continue
        named.append(str(part))
        annotation = _annotation_at(annotation, str(part))
    return named


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [member for member in get_args(annotation) if member is not NoneType]


def _annotation_at(annotation: Any, key: str) -> Any:
    """What stands below an annotation at a key or an index; None where that is anything."""
    inner = _members(annotation)[0] if annotation is not None else None
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return next(
            (field.annotation for name, field in inner.model_fields.items() if key in (name, field.alias)), None
        )
    arguments = get_args(inner)
    return arguments[-1] if get_origin(inner) in (dict, list) and arguments else None


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the model that stands at a location below `model`."""
    annotation: Any = model
    for part in location:
        annotation = _annotation_at(annotation, str(part))
    inner = _members(annotation)[0] if annotation is not None else None
    if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
        return []
    return [field.alias or name for name, field in inner.model_fields.items()]
