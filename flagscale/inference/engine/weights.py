"""Replacing weights in place: all of an update, or nothing of it.

Every name that a checkpoint may use is a view of the running model's memory. Where transformers keeps experts fused in
one tensor, each expert's own name is a slice of it, so the tensors of a trainer or of a checkpoint on disk go in by the
names they have there. An update is checked whole, then copied; copying checked tensors into memory that exists cannot
fail.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flagscale.errors import ConfigError, Fault, find_nearest

Tensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Naming:
    """How names on disk differ from the model's own.

    renamed: (part of the model's name, what stands on disk)
    fused: (end of the model's name, ends on disk with `*` for the expert's number), in the order of the fused halves
    """

    renamed: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, tuple[str, ...]], ...]

    def on_disk(self, name: str) -> str:
        for own, disk in self.renamed:
            name = name.replace(own, disk)
        return name


def name_views(model: Any) -> dict[str, torch.Tensor]:
    """Every name by which a tensor of the model can be written, and the memory behind it."""
    views: dict[str, torch.Tensor] = {}
    naming = _find_naming(model.config.get_text_config().model_type)
    for name, parameter in model.state_dict(keep_vars=True).items():
        tensor = parameter.detach()
        views[name] = views[naming.on_disk(name)] = tensor
        for ending, sources in naming.fused:
            if name.endswith(ending):
                for source, halves in zip(sources, tensor.chunk(len(sources), dim=1), strict=True):
                    disk = naming.on_disk(name.removesuffix(ending) + source)
                    views.update({disk.replace("*", str(i)): half for i, half in enumerate(halves)})
    return views


def _find_naming(model_type: str) -> _Naming:
    """What transformers does to the names of this architecture when it loads a checkpoint.

    Of its conversions only those are known that renaming and slicing can undo; a tensor under another one goes by the
    model's own name alone.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    renamed, fused = [], []
    for rule in get_checkpoint_conversion_mapping(model_type) or []:
        # The public lists are already turned into regular expressions.
        disk, own = rule._original_source_patterns, rule._original_target_patterns
        if isinstance(rule, WeightRenaming) and not re.search(r"[\\^$*+()\[\]]", disk[0] + own[0]):
            renamed.append((own[0], disk[0]))
        elif isinstance(rule, WeightConverter):
            kinds = [(type(each), each.dim) for each in rule.operations]
            if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                fused.append((own[0], tuple(disk)))
    return _Naming(tuple(renamed), tuple(fused))


def plan_update(views: Mapping[str, torch.Tensor], tensors: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(memory, what goes there) for each tensor of an update; the tensors may come from an iterator.

    Raises:
        ConfigError: unknown names, wrong shapes or types, two different tensors for one place; all of them at once.
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    faults: list[Fault] = []
    places: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    copies = []
    for name, tensor in pairs:
        view = views.get(name)
        if view is None:
            faults.append(
                Fault(f"weights.{name}", "the model has no such tensor", suggestion=find_nearest(name, views))
            )
            continue
        if tensor.shape != view.shape:
            faults.append(Fault(f"weights.{name}", f"shape {list(tensor.shape)}", f"{list(view.shape)}"))
        elif tensor.dtype != view.dtype:
            faults.append(Fault(f"weights.{name}", f"type {tensor.dtype}", f"{view.dtype}"))
        else:
            other = places.setdefault((view.data_ptr(), view.shape), (name, tensor))
            if other[1] is not tensor and not torch.equal(other[1], tensor):
                faults.append(Fault(f"weights.{name}", f"is the same memory as `{other[0]}`, and the two differ"))
            copies.append((view, tensor))
    if faults:
        raise ConfigError(faults)
    return copies


def apply_update(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy what `plan_update` allowed."""
    with torch.no_grad():
        for view, tensor in copies:
            view.copy_(tensor)
