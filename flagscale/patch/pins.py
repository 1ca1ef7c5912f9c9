"""Which source a backend is, down to the byte: the pin, one `third_party/<backend>/pin.yaml` each.

A pin names an archive of the package index, which every site can reach, and beside it the upstream repository, tag and
commit as far as the archive lets them be known: the hash is what is checked, the commit is what a person looks up.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.errors import SourceError, UserError, find_nearest
from flagscale.patch.extension import Extension


@dataclass(frozen=True, slots=True)
class Pin:
    """One backend's source.

    backend: its name in a configuration: `experiment.task.backend`
    sha256, size_bytes: of the archive
    top: the folder of the archive that becomes the tree; "" is the archive's own top
    unpack: what of `top` is unpacked; nothing named is everything
    disk_bytes: about what a fetch takes on disk, archive, tree and git included
    commit: upstream's, where it is known; what is given may be its beginning
    on_path: the folder below the tree that goes on a job's PYTHONPATH; None for a backend that must be installed
    """

    name: str
    backend: str
    repository: str
    tag: str | None
    project: str
    version: str
    archive: str
    sha256: str
    size_bytes: int
    disk_bytes: int = 0
    top: str = ""
    unpack: tuple[str, ...] = ()
    commit: str | None = None
    on_path: str | None = None
    extensions: tuple[Extension, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for two pins that leave the same tree."""
        extensions = [dataclasses.astuple(extension) for extension in self.extensions]
        row = [self.version, self.sha256, self.top, self.unpack, extensions]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def load_pin(path: Path) -> Pin:
    """Read a pin.yaml.

    Raises:
        SourceError: there is none, or it lacks or misnames a field.
    """
    import yaml

    try:
        row: dict[str, Any] = yaml.safe_load(path.read_text())
        extensions = tuple(
            Extension(**{**extension, "sources": tuple(extension["sources"])})
            for extension in row.pop("extensions", ())
        )
        return Pin(**{**row, "unpack": tuple(row.get("unpack", ())), "extensions": extensions})
    except FileNotFoundError:
        raise SourceError(f"{path}: no such pin") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{path}: not a pin: {error}") from None


def load_pins(third_party: Path) -> Mapping[str, Pin]:
    """Every pin below `third_party`, by the name of its folder."""
    return {path.parent.name: load_pin(path) for path in sorted(third_party.glob("*/pin.yaml"))}


def find_pin(name: str, third_party: Path) -> Pin:
    """The pin that `name` means: the backend's folder, its name in a configuration, or its project on the index.

    Raises:
        UserError: no backend of that name has a pin.
    """
    pins = load_pins(third_party)
    by_word = {word.lower(): pin for pin in pins.values() for word in (pin.project, pin.backend, pin.name)}
    found = by_word.get(name.lower())
    if found is None:
        near = find_nearest(name.lower(), by_word)
        hint = f"; did you mean `{near}`?" if near else ""
        known = ", ".join(sorted(pin.backend for pin in pins.values()))
        raise UserError(f"{name}: no backend with a pinned source; there are: {known}{hint}")
    return found
