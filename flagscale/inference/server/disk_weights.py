"""The tensors in a model's folder, checked to be all that a running model has."""

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagscale.errors import ConfigError, Fault, UserError, find_nearest
from flagscale.inference.engine.weights import name_views


def read_weights(folder: Path, model: Any) -> dict[str, Any]:
    """The mapped tensors of a folder's safetensors files by name, in the number format of the running model.

    Raises:
        UserError: there are no such files, one cannot be read, or a tensor of the model is in none of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: no *.safetensors file; expected a folder with a model in the format of transformers"
        )
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
    views = name_views(model)
    if missing := find_missing(model, {name: view for name, view in views.items() if name in tensors}):
        nearest = {name: find_nearest(name, tensors) for name in missing}
        raise ConfigError(
            [Fault(f"weights.{name}", "is in none of the files", None, nearest[name]) for name in missing]
        )
    formats = {name: view.dtype for name, view in views.items() if view.is_floating_point()}
    return {name: tensor.to(formats.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def find_missing(model: Any, given: Mapping[str, Any]) -> list[str]:
    """The model's parameters that the given views do not cover whole; experts may be given one by one."""
    parameters = {each.data_ptr(): (name, each.numel()) for name, each in model.named_parameters()}
    starts = sorted(parameters)
    covered = dict.fromkeys(starts, 0)
    for at, count in {(view.data_ptr(), view.numel()) for view in given.values()}:
        covered[starts[bisect_right(starts, at) - 1]] += count
    return [parameters[at][0] for at in starts if covered[at] < parameters[at][1]]
