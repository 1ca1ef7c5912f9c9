"""Reading git's diffs: which files each one changes, and its hunks.

Applying and making diffs is left to git; this reads only what is needed to check a patch before git sees it and to
explain afterwards what did not fit. The format is that of git-diff(1), "Generating patch text with -p".
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
ESCAPES = {b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r"}


@dataclass(frozen=True, slots=True)
class Change:
    """One file's change; `old` is None for a new file, `new` for a deleted one, and they differ for a rename."""

    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Hunk:
    """A hunk: its first line in the old file, counted from 1, and its lines with their ` `, `-` or `+`."""

    start: int
    lines: tuple[bytes, ...]

    @property
    def before(self) -> tuple[bytes, ...]:
        return tuple(line[1:] for line in self.lines if line[:1] in b" -")

    @property
    def after(self) -> tuple[bytes, ...]:
        return tuple(line[1:] for line in self.lines if line[:1] in b" +")


def unquote(name: bytes) -> bytes:
    """A name as git writes it, in quotes with C's escapes where it must."""
    found = QUOTED.fullmatch(name) if name.startswith(b'"') else None
    if not found:
        return name
    return re.sub(
        rb"\\([0-7]{3}|.)",
        lambda m: bytes([int(m[1], 8)]) if len(m[1]) == 3 else ESCAPES.get(m[1], m[1]),
        found[1],
    )


def quote(name: str) -> bytes:
    """The name in quotes, with all but plain ASCII as octal escapes: what `unquote` and git read back."""
    plain = os.fsencode(name)
    return b'"' + b"".join(bytes([c]) if c not in b'"\\' and 32 <= c < 127 else b"\\%03o" % c for c in plain) + b'"'


def show_name(name: str) -> str:
    """The name as text: in git's quotes where it is not printable."""
    return name if name.isprintable() and not name.startswith('"') else quote(name).decode()


def read_name(text: str) -> str:
    """The name that `show_name` showed."""
    return os.fsdecode(unquote(os.fsencode(text)))


def split_diff(diff: bytes) -> list[bytes]:
    """The diffs of single files; what stands before the first is left out."""
    starts = [found.start() for found in re.finditer(rb"^diff --git ", diff, re.MULTILINE)]
    return [diff[start:end] for start, end in zip(starts, [*starts[1:], len(diff)], strict=False)]


def _both_names(line: bytes) -> tuple[bytes, bytes]:
    """The names of `diff --git a/x b/x`, which are the same unless other lines say so."""
    rest = line.removeprefix(b"diff --git ")
    quoted = re.fullmatch(rb'("(?:[^"\\]|\\.)*"|\S.*?) ("(?:[^"\\]|\\.)*")', rest)
    if quoted:
        old, new = unquote(quoted[1]), unquote(quoted[2])
    elif rest.startswith(b'"') and (first := QUOTED.match(rest)):
        old, new = unquote(first[0]), rest[first.end() + 1 :]
    else:
        half = len(rest) // 2
        old, new = rest[:half], rest[half + 1 :]
    return old[2:], new[2:]


def read_change(diff: bytes) -> Change:
    """Which file the diff of a single file changes."""
    lines = diff.partition(b"\n@@ ")[0].partition(b"\nGIT binary patch")[0].split(b"\n")
    old, new = _both_names(lines[0])
    words = {line.partition(b" ")[0]: line for line in lines[1:]}
    for line in lines[1:]:
        for prefix, side in ((b"rename from ", 0), (b"rename to ", 1), (b"--- ", 2), (b"+++ ", 3)):
            if not line.startswith(prefix):
                continue
            name = unquote(line.removeprefix(prefix).removesuffix(b"\t"))
            if side >= 2 and name != b"/dev/null":
                name = name[2:]
            if name != b"/dev/null" and side % 2 == 0:
                old = name
            elif name != b"/dev/null":
                new = name
    return Change(
        None if b"new" in words and words[b"new"].startswith(b"new file") else os.fsdecode(old),
        None if b"deleted" in words else os.fsdecode(new),
    )


def read_changes(diff: bytes) -> tuple[Change, ...]:
    """What a patch changes; a file that is deleted and made anew (as a link becomes a file) is one that changed."""
    changes = [read_change(part) for part in split_diff(diff)]
    deleted = {change.old for change in changes if change.new is None}
    made = {change.new for change in changes if change.old is None}
    both = sorted(name for name in deleted & made if name is not None)
    rest = [change for change in changes if not ({change.old, change.new} & set(both))]
    return (*rest, *(Change(name, name) for name in both))


def read_hunks(diff: bytes) -> tuple[Hunk, ...]:
    """The hunks of the diff of a single file."""
    return tuple(_hunks(diff.split(b"\n")))


def _hunks(lines: list[bytes]) -> Iterator[Hunk]:
    at = 0
    while at < len(lines):
        head = HUNK.match(lines[at])
        at += 1
        if not head:
            continue
        old, new = (int(number) if number is not None else 1 for number in (head[2], head[4]))
        body: list[bytes] = []
        while at < len(lines) and (old > 0 or new > 0):
            line = lines[at]
            old -= line[:1] in (b" ", b"-")
            new -= line[:1] in (b" ", b"+")
            if line[:1] in (b" ", b"-", b"+"):
                body.append(line)
            at += 1
        yield Hunk(int(head[1]), tuple(body))


PLAIN_HEAD = re.compile(
    rb"diff --git [^\n]*\nindex [0-9a-f]+\.\.[0-9a-f]+ 100(?:644|755)\n--- [^\n]*\n\+\+\+ [^\n]*(?=\n@@ )"
)
PLACE = re.compile(rb"-(\d+)")


def apply_plain(old: bytes, diff: bytes) -> bytes | None:
    """What the diff of a single file makes of exactly the file that it was made of; None where that takes git.

    It takes git for all but changed lines of a regular file whose every line is where the diff says it is. The caller
    compares the result with the hash that is promised, which covers the lines that are in no hunk.
    """
    head = PLAIN_HEAD.match(diff)
    if head is None or b"\n\\ No newline" in diff:
        return None
    source = old.split(b"\n")
    out: list[bytes] = []
    done = 0
    for hunk in diff[head.end() :].removesuffix(b"\n").split(b"\n@@ ")[1:]:
        place, *rows = hunk.split(b"\n")
        found = PLACE.match(place)
        before = [row[1:] for row in rows if row[:1] != b"+"]
        start = int(found[1]) - bool(before) if found else 0
        if found is None or source[start : start + len(before)] != before:
            return None
        out += source[done:start]
        out += [row[1:] for row in rows if row[:1] != b"-"]
        done = start + len(before)
    return b"\n".join([*out, *source[done:]])
