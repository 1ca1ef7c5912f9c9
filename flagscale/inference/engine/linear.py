"""Linear layers as the engine runs them on a CPU: weight first.

A step has few rows, and that is the case that a CPU's matrix product is worst at. So the product is computed the other
way round, weight times rows, and lies transposed: from a few rows up to some dozens that takes half to three quarters
of the time. The weight stays the model's own, and nothing is packed or copied.

One row alone goes another way through the libraries, as a vector. Where a chip has tiles for bf16 (AMX) that is the
slower one, so the row is computed as often as makes it a matrix: four times the arithmetic in two thirds of the time.
"""

from typing import Any

import torch
from torch.nn.functional import linear

FEWEST_ROWS = {torch.float32: 6, torch.bfloat16: 2}
"""rows from which on weight first is quicker; measured"""
MOST_ROWS = 64
"""rows up to which it is; beyond, what reads the transposed result loses more"""
ROWS_OF_ONE = 4
"""how often a single row is computed on a chip with tiles; measured"""


class WeightFirstLinear(torch.nn.Linear):  # type: ignore[misc]
    """A linear layer that computes few rows weight first; their result lies transposed in memory."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        num_rows = rows.numel() // rows.shape[-1]
        if num_rows == 1 and rows.dtype is torch.bfloat16 and HAS_TILES:
            out = _multiply(weight, rows.reshape(1, -1).expand(ROWS_OF_ONE, -1), bias)
            return out[:, 0].contiguous().view(*rows.shape[:-1], -1)
        if not FEWEST_ROWS.get(rows.dtype, MOST_ROWS + 1) <= num_rows <= MOST_ROWS:
            return linear(rows, weight, bias)
        return _multiply(weight, rows.reshape(num_rows, -1), bias).t().view(*rows.shape[:-1], -1)


def _multiply(weight: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[outputs, rows]"""
    return torch.mm(weight, rows.t()) if bias is None else torch.addmm(bias[:, None], weight, rows.t())


def _has_tiles() -> bool:
    """Whether this CPU multiplies bf16 by AMX; no release of torch says so by a public name."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is not None and bool(ask())


HAS_TILES = _has_tiles()


def put_weights_first(model: Any) -> None:
    """Replace the plain linear layers of a model that is on a CPU."""
    if model.device.type != "cpu":
        return
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            parent, _, own = name.rpartition(".")
            first = WeightFirstLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
            first.weight, first.bias = module.weight, module.bias
            setattr(model.get_submodule(parent), own, first)
