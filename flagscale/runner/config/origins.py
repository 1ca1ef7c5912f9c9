"""Which file and line, or which override, set each value of a composed configuration.

Hydra knows the order in which files were merged and where each was put; YAML's own nodes know the lines. Put together
they answer `flagscale explain` and place every fault. Files are parsed a second time, only when somebody asks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


def display_path(path: Path) -> str:
    """The path as a user would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@dataclass(frozen=True, slots=True)
class Merged:
    """A file that Hydra merged: its path under the config directory, and the package it was put in (`train`)."""

    name: str
    package: str


def read_defaults(loader: Any, config_name: str, overrides: Sequence[str]) -> tuple[Merged, ...]:
    """The files of a configuration in the order in which they were merged, Hydra's own left out."""
    from hydra.types import RunMode

    listed = loader.compute_defaults_list(config_name=config_name, overrides=list(overrides), run_mode=RunMode.RUN)
    return tuple(
        Merged(row.config_path, row.package or "")
        for row in listed.defaults
        if row.config_path and row.config_path != "hydra/config" and not (row.package or "").startswith("hydra")
    )


@dataclass(frozen=True)
class Origins:
    """dotted path -> every place that set it, in the order of merging: the last one won."""

    places: dict[str, tuple[str, ...]]
    fallback: str

    @classmethod
    def read(
        cls, defaults: Sequence[Merged], config_dir: Path, config_name: str, overrides: Sequence[str]
    ) -> "Origins":
        places: dict[str, list[str]] = {}
        for merged in defaults:
            file = config_dir / f"{merged.name}.yaml"
            if file.is_file():
                for path, line in read_lines(file, merged.package):
                    places.setdefault(path, []).append(f"{display_path(file)}:{line}")
        for override in overrides:
            key = override.lstrip("+~").split("=", 1)[0].split("@", 1)[0]
            places.setdefault(key.replace("/", "."), []).append(f"override `{override}`")
        primary = display_path(config_dir / f"{config_name}.yaml")
        return cls({path: tuple(found) for path, found in places.items()}, primary)

    def get(self, path: str) -> tuple[str, ...]:
        """Every place that set this value or the section that holds it, first to last."""
        while path:
            if found := self.places.get(path):
                return found
            path = path.rpartition(".")[0]
        return ()

    def get_nearest(self, path: str) -> str:
        """The place that a fault at this path is best looked for."""
        found = self.get(path)
        return found[-1] if found else self.fallback


def read_lines(file: Path, package: str) -> Iterator[tuple[str, int]]:
    """(dotted path, line) of every key of a YAML file, as it stands in the composed configuration."""
    with file.open(encoding="utf-8") as stream:
        root = yaml.compose(stream, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        skip = [pair for pair in root.value if pair[0].value == "defaults"]
        root.value = [pair for pair in root.value if pair not in skip]
    if root is not None:
        yield from _walk(root, package)


def _walk(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
    children: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), value, key.start_mark.line + 1) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), value, value.start_mark.line + 1) for index, value in enumerate(node.value)]
    for name, value, line in children:
        here = f"{path}.{name}" if path else name
        if name == "<<":
            yield from _walk(value, path)
            continue
        yield here, line
        yield from _walk(value, here)
