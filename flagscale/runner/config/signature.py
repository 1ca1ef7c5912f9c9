"""What a class of a Python file takes, read from its text: the file's imports may need chips, and are not run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class UnreadableError(Exception):
    """The file cannot be read as Python; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a method, without the object that it belongs to.

    positional: those that may be given by position; required: those without a default, by whatever way they are given
    keyword_only: those that may not; takes_more: it has `*args`; takes_names: it has `**kwargs`
    by_position_only: the first so many of `positional` may not be given by name
    """

    positional: tuple[str, ...]
    required: frozenset[str]
    keyword_only: tuple[str, ...] = ()
    takes_more: bool = False
    takes_names: bool = False
    by_position_only: int = 0
    is_async: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """The parameters that may be given by name."""
        return (*self.positional[self.by_position_only :], *self.keyword_only)

    def __str__(self) -> str:
        marks = (f"{name}" if name in self.required else f"{name}=…" for name in (*self.positional, *self.keyword_only))
        return f"({', '.join([*marks, *['*args'] * self.takes_more, *['**kwargs'] * self.takes_names])})"


@dataclass(frozen=True, slots=True)
class ClassOutline:
    """What the text of a class says. `is_whole` is False where a base class or a decorator may bring more."""

    methods: dict[str, Signature | None]
    """None: an attribute of this name, of which the text does not say what it takes"""
    is_whole: bool


@dataclass(frozen=True, slots=True)
class FileOutline:
    """The classes at the top of a file; `others` are further names there, such as imported ones."""

    classes: dict[str, ClassOutline]
    others: frozenset[str]


def read_outline(path: Path) -> FileOutline:
    """
    Raises:
        UnreadableError: the file is missing, no text, or no Python.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise UnreadableError(f"{path}:{error.lineno or 1}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is no Python: {error}") from None
    nodes: dict[str, ast.ClassDef] = {}
    others: set[str] = set()
    for statement in _list_statements(tree.body):
        if isinstance(statement, ast.ClassDef):
            nodes[statement.name] = statement
        else:
            others.update(_list_bound(statement))
    classes = {name: _outline_class(node, nodes, frozenset()) for name, node in nodes.items()}
    return FileOutline(classes, frozenset(others - nodes.keys()))


def _list_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a block, and of the branches in it that bind names in the same scope."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _list_statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from _list_statements(handler.body)


def _list_bound(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.split(".")[0] for alias in names)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def _outline_class(node: ast.ClassDef, nodes: dict[str, ast.ClassDef], seen: frozenset[str]) -> ClassOutline:
    """seen: the classes that inherit from this one, for a file may hold a circle of them"""
    methods: dict[str, Signature | None] = {}
    is_whole = not node.decorator_list and not node.keywords
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and base.id in nodes and base.id not in seen | {node.name}:
            above = _outline_class(nodes[base.id], nodes, seen | {node.name})
            methods |= above.methods
            is_whole = is_whole and above.is_whole
        elif not (isinstance(base, ast.Name) and base.id == "object"):
            is_whole = False
    for statement in _list_statements(node.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            methods[statement.name] = _read_signature(statement)
        else:
            methods |= dict.fromkeys(_list_bound(statement))
    return ClassOutline(methods, is_whole)


def _read_signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    decorators = {item.id for item in function.decorator_list if isinstance(item, ast.Name)}
    num_bound = 0 if "staticmethod" in decorators else 1
    first_default = len(names) - len(given.defaults)
    required = {*names[num_bound:first_default]}
    required |= {
        argument.arg for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None
    }
    return Signature(
        positional=tuple(names[num_bound:]),
        required=frozenset(required),
        keyword_only=tuple(argument.arg for argument in given.kwonlyargs),
        takes_more=given.vararg is not None,
        takes_names=given.kwarg is not None,
        by_position_only=max(0, len(given.posonlyargs) - num_bound),
        is_async=isinstance(function, ast.AsyncFunctionDef),
    )
