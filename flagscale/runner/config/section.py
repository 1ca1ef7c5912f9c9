"""The base of every YAML section that we compute with: frozen, and strict about the names of its keys."""

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


class Section(BaseModel):
    """A section of a configuration.

    A key may be spelled with hyphens or underscores. A null is as good as leaving the key out, unless the field itself
    may be None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _spell(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        spelled: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_") if isinstance(key, str) and key.replace("-", "_") in fields else key
            field = fields.get(name)
            if field is not None and value is None and not admits(field.annotation, type(None)):
                continue
            target = field.alias if field is not None and field.alias else name
            if target in spelled and spelled[target] != value:
                raise PydanticCustomError(
                    "two_spellings", "`{key}` stands here in two spellings that differ", {"key": name}
                )
            spelled[target] = value if field is None else _without_nulls(value, field.annotation)
        return spelled

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as the number 1."""
        if not isinstance(value, bool) or info.field_name is None:
            return value
        annotation = cls.model_fields[info.field_name].annotation
        wanted = [KINDS[kind] for kind in (int, float, str) if admits(annotation, kind)]
        if wanted and not admits(annotation, bool):
            raise ValueError(" or ".join(wanted))
        return value


def admits(annotation: Any, kind: type) -> bool:
    """Whether a value of this type may stand in a field annotated so."""
    if annotation is Any or annotation is kind:
        return True
    return get_origin(annotation) in (Union, UnionType) and any(admits(item, kind) for item in get_args(annotation))


def _without_nulls(value: Any, annotation: Any) -> Any:
    """A mapping whose values are sections or mappings, without those that are null."""
    if not isinstance(value, dict) or get_origin(annotation) is not dict:
        return value
    inner = get_args(annotation)[1]
    if admits(inner, type(None)):
        return value
    return {key: _without_nulls(item, inner) for key, item in value.items() if item is not None}
