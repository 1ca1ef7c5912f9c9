"""An installed package as a tree: where it lies, and a patch set of the source as one of the package's own folder."""

import re
from dataclasses import replace
from pathlib import Path

from flagscale.errors import UserError
from flagscale.patch.diffs import Change, show_name, split_diff
from flagscale.patch.series import Hashes, Patch, Series


def find_package(name: str) -> Path:
    """The folder of an installed package of this interpreter; it is not imported.

    Raises:
        UserError: there is none, or it is a single file or lies in several places.
    """
    import importlib.util

    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None:
        raise UserError(f"{name}: no such package in this interpreter's path; install it, or name a folder by --tree")
    places = list(found.submodule_search_locations or ())
    if len(places) != 1:
        what = f"lies in {len(places)} places ({', '.join(places)})" if places else "is a single file"
        raise UserError(f"{name}: {what}; name the one to patch by --tree")
    return Path(places[0])


def below_package(series: Series, package: str) -> Series:
    """The series with the names that its files have inside the package's folder.

    Raises:
        UserError: it changes files that are not in the package.
    """
    prefix = f"{package}/"
    outside = sorted(name for patch in series.patches for name in patch.names if not name.startswith(prefix))
    if outside:
        raise UserError(
            f"{series.name}: changes files that the installed package {package} does not have, and can only be applied "
            f"to its source: {', '.join(map(show_name, outside))}"
        )
    return replace(series, patches=tuple(_below(patch, prefix) for patch in series.patches))


def _below(patch: Patch, prefix: str) -> Patch:
    def strip(hashes: Hashes) -> Hashes:
        return {name.removeprefix(prefix): sha for name, sha in hashes.items()}

    ends = ((change.old, change.new) for change in patch.changes)
    changes = tuple(Change(*(end and end.removeprefix(prefix) for end in pair)) for pair in ends)
    diff = b"".join(_strip_diff(part, prefix.encode()) for part in split_diff(patch.diff))
    return replace(patch, diff=diff, base=strip(patch.base), result=strip(patch.result), changes=changes)


def _strip_diff(part: bytes, prefix: bytes) -> bytes:
    """Take the folder out of the names in a diff's head."""
    head_end = re.search(rb"^(@@ |GIT binary patch)", part, re.MULTILINE)
    end = head_end.start() if head_end else len(part)
    first, newline, rest = part[:end].partition(b"\n")
    folder = re.escape(prefix)
    first = re.sub(rb'( "?[ab]/)' + folder, rb"\1", first, count=2)
    rest = re.sub(rb'^((?:---|\+\+\+) "?[ab]/|rename (?:from|to) "?)' + folder, rb"\1", rest, flags=re.MULTILINE)
    return first + newline + rest + part[end:]
