"""From pydantic's errors to faults in our voice: dotted path, what is wrong, what was expected, the nearest name."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from flagscale.errors import Fault, find_nearest

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "mapping": "a mapping",
}


def read_faults(error: ValidationError, model: type[BaseModel], prefix: str) -> list[Fault]:
    """Every fault that pydantic found in a section that stands at `prefix`."""
    return [_fault(dict(row), model, prefix) for row in error.errors(include_url=False)]


def unknown_key(path: str, key: str, known: list[str], noun: str = "key") -> Fault:
    near = find_nearest(key.replace("-", "_"), known)
    expected = None if near else f"one of {', '.join(known)}" if 0 < len(known) <= 12 else None
    return Fault(path, f"there is no {noun} `{key}` here", expected=expected, suggestion=near)


def _fault(row: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Fault:
    location: tuple[str | int, ...] = row["loc"]
    named = [str(part) for part in location if not _is_union_tag(part)]
    path = ".".join([prefix, *named])
    kind: str = row["type"]
    context: Mapping[str, Any] = row.get("ctx", {})
    given = row.get("input")
    if kind == "extra_forbidden":
        return unknown_key(path, str(location[-1]), _fields_at(model, location[:-1]))
    if kind == "missing":
        return Fault(path, "is missing", expected="a value")
    if kind in ("literal_error", "enum"):
        choices = str(context.get("expected", ""))
        near = find_nearest(str(given), [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")])
        return Fault(path, f"is `{given}`", expected=choices.replace("'", ""), suggestion=near)
    for name, expected in KINDS.items():
        if kind.startswith((f"{name}_", f"{name}_type")):
            return Fault(path, f"is `{_shown(given)}`", expected=expected)
    text = str(row["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return Fault(path, f"is `{_shown(given)}`", expected=text)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_union_tag(part: str | int) -> bool:
    """pydantic puts the tried member of a union (`int`, `str`, `dict[str,any]`) into the location."""
    return isinstance(part, str) and (part in ("int", "str", "float", "bool") or "[" in part)


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the model that stands at a location below `model`."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None and (inner := _find_model(field.annotation)):
            model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _find_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _find_model(argument))), None)
