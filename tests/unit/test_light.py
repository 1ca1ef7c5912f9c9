"""The light classes that hosts make do with are the standard ones, as far as carried files use them."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from factories import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.launch import light
from flagscale.runner.launch.archive import AGENT, RAY_ERRANDS, SURVEY, build_archive
from flagscale.runner.launch.errands import BOOT
from flagscale.runner.launch.reach import pack_archive, pack_request

CARRIED = tuple(ROOT / "flagscale" / file for file in SURVEY)


def list_names() -> Iterator[tuple[str, str]]:
    """(file, what it imports from dataclasses) of all that is carried."""
    for path in CARRIED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "dataclasses":
                yield from ((path.name, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dataclasses":
                yield path.name, node.attr


def list_classes() -> Iterator[type]:
    for path in CARRIED:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for item in vars(module).values():
            if isinstance(item, type) and item.__module__ == module.__name__ and dataclasses.is_dataclass(item):
                yield item


CLASSES = tuple(dict.fromkeys(list_classes()))


def lighten(cls: type) -> Any:
    """The same class, its body run again under the light decorator."""
    source = Path(str(sys.modules[cls.__module__].__file__)).read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
    names = {name: getattr(light, name) for name in ("dataclass", "field", "asdict", "replace", "fields")}
    scope = {**vars(sys.modules[cls.__module__]), **names, "dataclasses": light}
    exec(compile(tree, cls.__module__, "exec"), scope)  # noqa: S102 our own text
    return scope[cls.__name__]


def test_carried_files_ask_for_nothing_that_is_not_there() -> None:
    assert {name for _, name in list_names()} <= set(vars(light))
    assert len(CLASSES) > 15


def vars_of(item: Any) -> list[Any]:
    return [getattr(item, row.name) for row in dataclasses.fields(item)]


def hash_of(item: Any) -> int | None:
    try:
        return hash(item)
    except TypeError:  # of a value in it
        return None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_light_class_is_as_the_standard_one(cls: type) -> None:
    mine = lighten(cls)
    required = [
        row.name
        for row in dataclasses.fields(cls)
        if row.default is dataclasses.MISSING and row.default_factory is dataclasses.MISSING
    ]
    is_needed = bool(required)
    required = required or [dataclasses.fields(cls)[0].name]
    values = {name: f"<{name}>" for name in required}
    one, other = cls(**values), mine(**values)
    assert repr(one) == repr(other)
    if not any(isinstance(value, MappingProxyType) for value in vars_of(one)):  # the standard one copies no such thing
        assert dataclasses.asdict(one) == light.asdict(other)
        assert dataclasses.astuple(one) == light.astuple(other)
    assert [row.name for row in dataclasses.fields(cls)] == [row.name for row in light.fields(other)]
    assert other == mine(*values.values())
    assert other != one
    changed = {required[0]: 7}
    assert repr(dataclasses.replace(one, **changed)) == repr(light.replace(other, **changed))
    assert light.replace(other, **changed) != other
    if is_needed:
        with pytest.raises(TypeError):
            mine(**dict(list(values.items())[1:]))
    with pytest.raises(TypeError):
        mine(**values, nosuchfield=1)
    with pytest.raises(TypeError):
        mine(*range(100))
    is_frozen = cls.__hash__ is not None
    assert (mine.__hash__ is not None) is is_frozen
    if is_frozen:
        assert hash_of(one) == hash_of(other)
        for name in (required[0], "nosuchfield"):
            with pytest.raises((AttributeError, TypeError)):
                setattr(other, name, 1)
    else:
        setattr(other, required[0], 1)
    assert hasattr(other, "__dict__") is hasattr(one, "__dict__")
    for name, item in vars(cls).items():
        if isinstance(item, property) or (callable(item) and not name.startswith("__")):
            assert name in vars(mine)


@given(st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner) | st.tuples(inner, inner)))
def test_nested_values_become_plain_ones_alike(value: Any) -> None:
    def make(dataclass: Callable[..., Any], field: Callable[..., Any]) -> Any:
        class Row:
            first: Any
            more: Any = field(default_factory=dict)

        return dataclass(frozen=True)(Row)

    standard, mine = make(dataclasses.dataclass, dataclasses.field), make(light.dataclass, light.field)
    one, other = (row(value, {"x": [row(value), (row(0), 1)]}) for row in (standard, mine))
    assert light.asdict(other) == dataclasses.asdict(one)
    assert light.astuple(other) == dataclasses.astuple(one)
    assert mine(1).more is not mine(1).more


@pytest.mark.parametrize(("files", "is_light"), [(SURVEY, True), (AGENT, True), (RAY_ERRANDS, False)])
def test_only_where_no_foreign_code_is_loaded(files: tuple[str, ...], is_light: bool, tmp_path: Path) -> None:
    path = tmp_path / "carried.zip"
    path.write_bytes(build_archive(files))
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import dataclasses; print(dataclasses.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(path)) is is_light


def test_one_python_answers_until_there_are_no_more_questions() -> None:
    ask = pack_request("ask", {"machine": "elsewhere", "pids": [], "token": "nobody's"})
    words = [sys.executable, "-I", "-S", "-c", BOOT.format(module="survey")]
    packed = pack_archive(build_archive(SURVEY)) + 3 * ask
    done = subprocess.run(words, input=packed, capture_output=True, timeout=60, check=True, cwd="/")
    assert done.stdout == 3 * b'flagscale answers: {"is_watched": false, "num_left": 0}\n'
