"""Linear layers as the engine runs them on a CPU: weight first.

A step has few rows, and that is the case that a CPU's matrix product is worst at. So the product is computed the other
way round, weight times rows, and lies transposed: from a few rows up to some dozens that takes half to three quarters
of the time. The weight stays the model's own, and nothing is packed or copied.
"""

from typing import Any

import torch
from torch.nn.functional import linear

FEWEST_ROWS = {torch.float32: 5, torch.bfloat16: 2}
"""rows from which on weight first is quicker; measured"""
MOST_ROWS = 64
"""rows up to which it is; beyond, what reads the transposed result loses more"""


class WeightFirstLinear(torch.nn.Linear):  # type: ignore[misc]
    """A linear layer that computes few rows weight first; their result lies transposed in memory."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        num_rows = rows.numel() // rows.shape[-1]
        if not FEWEST_ROWS.get(rows.dtype, MOST_ROWS + 1) <= num_rows <= MOST_ROWS:
            return linear(rows, weight, bias)
        flat = rows.reshape(num_rows, -1).t()
        out = torch.mm(weight, flat) if bias is None else torch.addmm(bias[:, None], weight, flat)
        return out.t().view(*rows.shape[:-1], -1)


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
