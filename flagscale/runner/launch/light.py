"""What the files of an agent and of the errands need of `dataclasses`, in a twentieth of its time.

A host's Python starts in 60 ms, and without this file in 85: the standard module imports `inspect`, and writes and
compiles the methods of each class. On a host nothing asks for their signatures, so methods that look up the names of
the fields will do. `archive.py` puts this file into its archives as `dataclasses.py`, where only the files of the
archive find it; on the launching machine, and where foreign code is loaded (Ray), there is the standard module.

What is not here is not used there: `tests/unit/test_light.py` holds both against each other, over every class that is
carried.
"""

from collections.abc import Callable
from typing import Any


class _Missing:
    """Where a field has no default."""


class FrozenInstanceError(AttributeError):
    """A field of a frozen class was assigned to."""


class Field:
    """A field's name and what it has by itself."""

    __slots__ = ("default", "default_factory", "name")

    def __init__(self, default: Any, default_factory: Any) -> None:
        self.name = ""
        self.default, self.default_factory = default, default_factory


def field(*, default: Any = _Missing, default_factory: Any = _Missing) -> Any:
    return Field(default, default_factory)


def fields(item: Any) -> tuple[Field, ...]:
    return tuple(item.__dataclass_fields__.values())


def is_dataclass(item: Any) -> bool:
    return hasattr(item, "__dataclass_fields__")


def asdict(item: Any) -> Any:
    return _unfold(item, lambda names, values: dict(zip(names, values, strict=True)))


def astuple(item: Any) -> Any:
    return _unfold(item, lambda _, values: tuple(values))


def _unfold(item: Any, make: Callable[[list[str], list[Any]], Any]) -> Any:
    """Also what lies in fields, lists, tuples and mappings."""
    if hasattr(type(item), "__dataclass_fields__"):
        names = list(item.__dataclass_fields__)
        return make(names, [_unfold(getattr(item, name), make) for name in names])
    if isinstance(item, dict):
        return {_unfold(key, make): _unfold(value, make) for key, value in item.items()}
    return type(item)(_unfold(value, make) for value in item) if isinstance(item, list | tuple) else item


def replace(item: Any, /, **changes: Any) -> Any:
    return type(item)(**{**{name: getattr(item, name) for name in item.__dataclass_fields__}, **changes})


def _init(self: Any, *args: Any, **given: Any) -> None:
    known = self.__dataclass_fields__
    names = list(known)
    values = dict(zip(names, args, strict=False))
    if len(args) > len(names) or values.keys() & given.keys() or not given.keys() <= known.keys():
        raise TypeError(
            f"{type(self).__name__}: {len(args)} values and {', '.join(given)}; expected {', '.join(names)}"
        )
    values.update(given)
    for name, row in known.items():
        if name in values:
            value = values[name]
        elif row.default_factory is not _Missing:
            value = row.default_factory()
        elif row.default is not _Missing:
            value = row.default
        else:
            raise TypeError(f"{type(self).__name__}: {name} is missing")
        object.__setattr__(self, name, value)


def _values(item: Any) -> tuple[Any, ...]:
    return tuple(getattr(item, name) for name in item.__dataclass_fields__)


def _repr(self: Any) -> str:
    pairs = zip(self.__dataclass_fields__, _values(self), strict=True)
    return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in pairs)})"


def _eq(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _refuse(self: Any, name: str, *_: object) -> None:
    raise FrozenInstanceError(f"{type(self).__name__}: cannot assign to field {name!r}")


def dataclass(*, frozen: bool = False, slots: bool = False) -> Callable[[type], type]:
    """Both in any combination; classes have slots either way only if they say so."""

    def make(cls: type) -> type:
        body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
        found: dict[str, Field] = {}
        for name in body.get("__annotations__", {}):
            value = body.pop(name, _Missing)
            found[name] = row = value if isinstance(value, Field) else Field(value, _Missing)
            row.name = name
        own: dict[str, Any] = {"__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": None}
        own |= {"__hash__": _hash, "__setattr__": _refuse, "__delattr__": _refuse} if frozen else {}
        own |= {"__slots__": tuple(found)} if slots else {}
        return type(cls)(cls.__name__, cls.__bases__, {**own, **body, "__dataclass_fields__": found})

    return make
