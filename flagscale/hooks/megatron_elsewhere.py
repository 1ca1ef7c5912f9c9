"""For checking, on one machine, the arguments of a job that will run on another.

Only Megatron's parser and its checks run under these hooks, never a training. What they change is true of one process
and false of the next, so no file of Megatron's can say it: that is why they are hooks and no patches.
"""

from typing import Any

from flagscale.hooks.hook import Hook

ASSUMED_TRANSFORMER_ENGINE = "2.9.0"
"""The oldest release that has all that Megatron 0.19 asks for when it checks arguments."""


def assume_transformer_engine(original: Any) -> Any:
    from packaging.version import Version

    return original or Version(ASSUMED_TRANSFORMER_ENGINE)


HOOKS = (
    Hook(
        "megatron.core.utils:_te_version",
        ">=0.19.2,<0.20",
        "the checks ask which Transformer Engine is installed here, not on the machine the job is for",
        assume_transformer_engine,
        adds=True,
    ),
)
