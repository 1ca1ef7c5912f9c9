"""How a tensor of Megatron is made of those of transformers, and cut over ranks; each way there has its way back.

Tensors are torch's, but nothing here computes: reshaping, joining and cutting keep every bit.
"""

from collections.abc import Sequence
from typing import Any

from flagscale.sync.canon import ModelShape, Rule


def to_megatron(rule: Rule, shape: ModelShape, parts: Sequence[Any]) -> Any:
    """Megatron's whole tensor, of `rule.size`, from the parts in the order of `rule.hf`."""
    import torch

    if rule.row.join == "qkv":
        groups = [part.reshape(shape.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, 1).reshape(rule.size)
    if rule.row.join == "halves":
        return torch.cat(list(parts))
    (part,) = parts
    if rule.row.join == "vocab":
        return torch.cat([part, part.new_zeros(rule.size[0] - part.shape[0], *part.shape[1:])])
    return part


def to_hf(rule: Rule, shape: ModelShape, whole: Any) -> list[Any]:
    """The parts in the order of `rule.hf`; what `to_megatron` was given, but for the rows of padding."""
    sizes = [size[0] for _, size in rule.hf]
    if rule.row.join == "qkv":
        groups = whole.reshape(shape.num_groups, -1, *whole.shape[1:])
        parts = groups.split([size // shape.num_groups for size in sizes], 1)
        return [part.reshape(size) for part, (_, size) in zip(parts, rule.hf, strict=True)]
    return [part.contiguous() for part in whole[: sum(sizes)].split(sizes)]


def cut(rule: Rule, whole: Any, num_ranks: int) -> list[Any]:
    """What each rank of a tensor-parallel group holds of Megatron's whole tensor."""
    axis = rule.row.axis
    if axis is None:
        return [whole] * num_ranks
    if rule.row.join == "halves":
        import torch

        gates, ups = (half.chunk(num_ranks) for half in whole.chunk(2))
        return [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    return list(whole.chunk(num_ranks, axis))


def uncut(rule: Rule, pieces: Sequence[Any]) -> Any:
    """The whole tensor from the pieces of all ranks."""
    import torch

    axis = rule.row.axis
    if axis is None:
        return pieces[0]
    if rule.row.join == "halves":
        halves = [piece.chunk(2) for piece in pieces]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(list(pieces), axis)
