"""What Megatron 0.19 needs on any chip, to run from its source archive and on Python 3.11."""

from typing import Any

from flagscale.hooks.hook import Hook

VERSIONS = ">=0.19.2,<0.20"


def keep_or_backport_override(original: Any) -> Any:
    if original is not None:
        return original
    from typing_extensions import override

    return override


def skip_compiling_the_dataset_module(_original: Any) -> Any:
    def compile_helpers() -> None:
        """The fetch has built it: `flagscale source status megatron` tells."""

    return compile_helpers


FIRST = (
    Hook(
        "typing:override",
        VERSIONS,
        "megatron.training.models imports typing.override, which Python 3.11 does not have",
        keep_or_backport_override,
        adds=True,
    ),
)
"""Installed before any module of Megatron is imported."""

LAST = (
    Hook(
        "megatron.core.datasets.utils:compile_helpers",
        VERSIONS,
        "the source archive has no Makefile, and `make` without one ends the job",
        skip_compiling_the_dataset_module,
    ),
)

HOOKS = FIRST + LAST
