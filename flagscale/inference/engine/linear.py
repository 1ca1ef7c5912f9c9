"""Linear layers as the engine runs them.

The output head is one very wide layer for few rows, the case that a CPU's matrix product is worst at: cut into blocks
of output columns that stay in the caches, the same product takes a third of the time. The weight stays the model's own.
"""

from typing import Any

import torch

BLOCK = 1024
"""output columns in a block; measured"""


class BlockedLinear(torch.nn.Linear):  # type: ignore[misc]
    """A linear layer computed in blocks of output columns."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        for start in range(0, self.out_features, BLOCK):
            block = slice(start, start + BLOCK)
            torch.mm(flat, self.weight[block].t(), out=out[:, block])
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, rows.shape[:-1])


def block_head(model: Any) -> None:
    """Have the model's output head computed in blocks, where it is a plain linear layer on a CPU and wide enough."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.device.type != "cpu" or head.out_features <= 2 * BLOCK:
        return
    blocked = BlockedLinear(head.in_features, head.out_features, head.bias is not None, device="meta")
    blocked.weight, blocked.bias = head.weight, head.bias
    model.set_output_embeddings(blocked)
