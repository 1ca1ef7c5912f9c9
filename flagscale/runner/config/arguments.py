"""Backend arguments as a user wrote them: one flat list, each with its dotted path, checked against a catalogue.

Nesting inside `train.system`, `train.model` and `train.data` only groups; a group's name has no meaning, unless it is
so near to a customary one that it must be a slip.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flagscale.errors import Fault, find_nearest
from flagscale.runner.config.catalogue import Catalogue

CUSTOMARY_GROUPS = (
    "precision",
    "logging",
    "checkpoint",
    "recompute",
    "hetero",
    "optimizer",
    "lr_scheduler",
    "tokenizer",
    "moe",
)

LAUNCHER_KEYS = frozenset({"log_dir", "details_dir", "scripts_dir", "pids_dir"})
"""keys under `train` that FlagScale's launcher reads and its backends do not"""


@dataclass(frozen=True, slots=True)
class GivenArgument:
    """An argument for a backend: `name` is the key with underscores, `path` where the user wrote it."""

    name: str
    value: Any
    path: str


def flatten_sections(
    sections: Mapping[str, Mapping[str, Any]], root: str, catalogue: Catalogue | None
) -> tuple[tuple[GivenArgument, ...], list[Fault]]:
    """Every argument of the sections, in order, groups dissolved.

    An argument given twice keeps its first place and takes its last value, as FlagScale's `dict.update` has it.
    """
    given: dict[str, GivenArgument] = {}
    faults: list[Fault] = []
    for section, values in sections.items():
        for argument in _flatten(values, f"{root}.{section}", catalogue, faults):
            given[argument.name] = argument
    return tuple(given.values()), faults


def _flatten(
    values: Mapping[str, Any], path: str, catalogue: Catalogue | None, faults: list[Fault]
) -> Iterator[GivenArgument]:
    for key, value in values.items():
        name, here = str(key).replace("-", "_"), f"{path}.{key}"
        if name in LAUNCHER_KEYS:
            continue
        if isinstance(value, dict) and not _takes_mapping(name, catalogue):
            near = find_nearest(name, CUSTOMARY_GROUPS)
            if near and near != name:
                faults.append(Fault(here, "this group of arguments has an unusual name", suggestion=near))
            yield from _flatten(value, here, catalogue, faults)
        else:
            yield GivenArgument(name, value, here)


def _takes_mapping(name: str, catalogue: Catalogue | None) -> bool:
    """Whether a mapping is a value of this argument, rather than a group that bears its name (`optimizer`)."""
    argument = catalogue.find(name) if catalogue else None
    return argument is not None and argument.type in ("json", "any")


def read_switch(value: Any) -> Any:
    """The contract writes a switch of one host or chip as the string "true" or "false"."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def check_arguments(
    given: tuple[GivenArgument, ...],
    catalogue: Catalogue,
    unknown_args: Literal["error", "warn", "pass"],
    references: frozenset[str] = frozenset(),
) -> tuple[list[Fault], list[Fault]]:
    """(faults, warnings) of the arguments against the backend's own parser."""
    faults: list[Fault] = []
    warnings: list[Fault] = []
    for argument in given:
        fault = catalogue.check(argument.name, argument.value, argument.path)
        if fault is None:
            continue
        if catalogue.find(argument.name) is not None or (unknown_args == "error" and argument.path not in references):
            faults.append(fault)
        elif unknown_args == "warn":
            warnings.append(fault)
    return faults, warnings
