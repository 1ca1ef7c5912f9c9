"""What of a Python file a patch changes, by name, and whether another release still has it and uses it.

A patch can apply cleanly to code that nobody calls any more: lines match, the meaning is gone. Names are read from the
syntax tree; uses are looked for in the text first, and in the syntax tree only of files that have the word.
"""

import ast
import re
from collections.abc import Iterable, Iterator

from flagscale.patch.diffs import read_hunks

WORD = re.compile(rb"[A-Za-z_\x80-\xff][\w\x80-\xff]*")
BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, above: str = "") -> Iterator[tuple[str, Definition]]:
    """What a node defines, by its dotted name; looked for in blocks only, since no expression holds a definition."""
    for block in BLOCKS:
        for child in getattr(node, block, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield above + child.name, child
                yield from _definitions(child, f"{above}{child.name}.")
            else:
                yield from _definitions(child, above)


def _parse(data: bytes) -> ast.AST | None:
    try:
        return ast.parse(data)
    except (SyntaxError, ValueError):
        return None


def find_defined(data: bytes) -> frozenset[str]:
    """The dotted names of the functions and classes of a file."""
    tree = _parse(data)
    return frozenset(name for name, _ in _definitions(tree)) if tree else frozenset()


def _changed_lines(diff: bytes) -> Iterator[int]:
    """The lines of the old file that are removed, or that something is put before or after."""
    for hunk in read_hunks(diff):
        line = hunk.start
        for text in hunk.lines:
            if text[:1] != b" ":
                yield line if text[:1] == b"-" else max(line - 1, 1)
            line += text[:1] != b"+"


def find_changed(base: bytes, diff: bytes) -> frozenset[str]:
    """The innermost functions and classes of the old file that a diff changes."""
    tree = _parse(base)
    if tree is None:
        return frozenset()
    places = [(name, node.lineno, node.end_lineno or node.lineno) for name, node in _definitions(tree)]
    found = set()
    for line in _changed_lines(diff):
        around = [(end - start, name) for name, start, end in places if start <= line <= end]
        found |= {min(around)[1]} if around else set()
    return frozenset(found)


def _used_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.rpartition(".")[2]


def _is_mentioned(word: bytes, data: bytes) -> bool:
    """Whether a file has a word elsewhere than where something of that name is defined."""
    return data.count(word) > data.count(b"def " + word) + data.count(b"class " + word)


def find_unused(names: Iterable[str], files: Iterable[bytes]) -> frozenset[str]:
    """Those of the dotted names whose last part no file uses; names that Python itself calls count as used."""
    last = {name: name.rpartition(".")[2] for name in names}
    left = {word.encode() for word in last.values() if not (word.startswith("__") and word.endswith("__"))}
    for data in files:
        if not left:
            break
        mentioned = left.intersection(WORD.findall(data))
        if any(_is_mentioned(word, data) for word in mentioned) and (tree := _parse(data)):
            used = set(_used_names(tree))
            left = {word for word in left if word.decode() not in used}
    return frozenset(name for name, word in last.items() if word.encode() in left)
