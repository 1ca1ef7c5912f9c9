"""Linear layers in int8: weights by output channel, activations by token, both symmetric.

A weight becomes whole numbers of at most 127 and one float for each of its rows; so does each token, when it comes. The
product of whole numbers is exact, so all of the error is in the two roundings, and each is at most half a scale. Memory
falls to one byte a weight. Time falls only on chips that multiply int8 in hardware.

Embeddings, the output head, norms and fused experts stay as they are.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flagscale.errors import UserError
from flagscale.inference.engine.weights import Tensors

LARGEST = 127


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 of the same shape, float32 scales [rows, 1]): their product is `rows` to half a scale."""
    rows = rows.float()
    scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return torch.round(rows / scales).clamp_(-LARGEST, LARGEST).to(torch.int8), scales


class Int8Linear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with an int8 weight [outputs, inputs]; `weight_scale` is [outputs]."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = quantise(linear.weight.detach())
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", scales[:, 0].contiguous())
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        tokens, scales = quantise(rows.reshape(-1, self.in_features))
        out = _multiply(tokens, self.weight).float().mul_(scales).mul_(self.weight_scale)
        if self.bias is not None:
            out += self.bias
        return out.to(rows.dtype).unflatten(0, rows.shape[:-1])


def _multiply(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The int32 product of int8 [tokens, inputs] and [outputs, inputs]."""
    if weight.shape[1] == 1:
        # torch 2.13 gets this one wrong on a CPU with VNNI.
        return tokens.int() * weight.int().t()
    return torch._int_mm(tokens, weight.t())


def quantise_linears(model: Any) -> None:
    """Replace the model's linear layers, all but its output head.

    Raises:
        UserError: the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise UserError(f"engine.quantization: int8 runs on a CPU, and the model is on `{model.device}`")
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Int8Linear(module))


def quantise_update(views: Mapping[str, torch.Tensor], tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """An update with the weights that the model has in int8 made so; what does not fit goes through as it is."""
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        view = views.get(name)
        if view is None or view.dtype != torch.int8 or view.shape != tensor.shape or not tensor.is_floating_point():
            yield name, tensor
            continue
        weight, scales = quantise(tensor)
        yield name, weight
        yield f"{name}_scale", scales[:, 0]
