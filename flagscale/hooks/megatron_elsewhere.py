"""For checking, on a machine without GPUs, the arguments of a job that will run on one with them.

Only Megatron's parser and its checks run under these hooks, never a training.
"""

from typing import Any

from flagscale.hooks.hook import Hook
from flagscale.hooks.megatron import VERSIONS
from flagscale.hooks.megatron_cpu import HOOKS as ON_CPU

ASSUMED_TRANSFORMER_ENGINE = "2.9.0"
"""The oldest release that has all that Megatron 0.19 asks for when it checks arguments."""


def assume_transformer_engine(original: Any) -> Any:
    from packaging.version import Version

    return original or Version(ASSUMED_TRANSFORMER_ENGINE)


HOOKS = (
    *ON_CPU,
    Hook(
        "megatron.core.utils:_te_version",
        VERSIONS,
        "the checks ask which Transformer Engine is installed here, not on the machine the job is for",
        assume_transformer_engine,
        adds=True,
    ),
)
