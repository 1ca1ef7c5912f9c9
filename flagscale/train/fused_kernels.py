"""The compiled kernels that Megatron takes for granted, and the arguments that do without them.

Transformer Engine and Apex are built for one chip, one CUDA and one torch, so that many machines have neither. Megatron
names one missing module after the other, each after half a minute of starting; here all are named at once.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

from flagscale.errors import UserError

TRANSFORMER_ENGINE, APEX = "Transformer Engine", "Apex with its CUDA extensions"
SOFTMAX = "masked_softmax_fusion"


class Kernels(NamedTuple):
    """What asks for a module.

    field, without: a field of Megatron's namespace, and its value that needs no such module
    argument: what gives it that value
    """

    module: str
    package: str
    field: str
    without: object
    argument: str


KERNELS = (
    Kernels("transformer_engine", TRANSFORMER_ENGINE, "transformer_impl", "local", "transformer_impl: local"),
    Kernels("transformer_engine", TRANSFORMER_ENGINE, "apply_rope_fusion", False, "no_rope_fusion: true"),
    Kernels("transformer_engine", TRANSFORMER_ENGINE, "no_persist_layer_norm", True, "no_persist_layer_norm: true"),
    Kernels(
        "fused_weight_gradient_mlp_cuda", APEX, "gradient_accumulation_fusion", False,
        "no_gradient_accumulation_fusion: true",
    ),
    Kernels("scaled_masked_softmax_cuda", APEX, SOFTMAX, False, "no_masked_softmax_fusion: true"),
)  # fmt: skip


def check_kernels(args: Any) -> None:
    """args: Megatron's namespace, as it was parsed.

    Raises:
        UserError: a package is not installed whose kernels the arguments ask for; names every argument that does
            without.
    """
    missing = [row for row in KERNELS if find_spec(row.module) is None]
    is_local = args.transformer_impl == "local" or any(row.package == TRANSFORMER_ENGINE for row in missing)
    if not (is_local and (args.fp16 or args.bf16)):  # Transformer Engine has a softmax of its own, and fp32 torch's
        missing = [row for row in missing if row.field != SOFTMAX]
    asked = [row for row in missing if getattr(args, row.field) != row.without]
    if asked:
        packages = " and ".join(dict.fromkeys(row.package for row in asked))
        raise UserError(
            f"the arguments ask for kernels of what is not installed here: {packages}. Install it, or train without: "
            f"`train.model: {{{', '.join(row.argument for row in asked)}}}`"
        )
