"""The build backend: setuptools', and before it the backend that `--config-settings` asks for.

    pip install . --config-settings backend=megatron --config-settings device=cpu
    pip install . --config-settings backend=megatron,device=cpu

fetches, patches and puts on the path what `flagscale install --backend megatron --device cpu` would. Without these
settings it is setuptools alone. What must be installed into an environment (vllm, sglang) cannot come from here: a
build runs in an environment of its own, which is gone when it ends, so it is refused with the command that does it.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any] | None
OWN = ("backend", "device")
NEEDED_TO_FETCH = ["pyyaml", "pybind11"]


def read_settings(settings: Settings) -> tuple[dict[str, str], dict[str, Any]]:
    """(what is ours, what is setuptools'); `backend=a,device=b` in one word is both."""
    ours: dict[str, str] = {}
    theirs: dict[str, Any] = {}
    for name, value in (settings or {}).items():
        if name not in OWN:
            theirs[name] = value
            continue
        for word in f"{name}={value}".split(","):
            key, _, text = word.partition("=")
            if key.strip() not in OWN or not text.strip():
                raise SystemExit(f"--config-settings {name}={value}: expected backend=<name>,device=<chip>")
            ours[key.strip()] = text.strip()
    if ours and set(ours) != set(OWN):
        missing = "device" if "backend" in ours else "backend"
        raise SystemExit(f"--config-settings: `{missing}` is missing; expected backend=<name>,device=<chip>")
    return ours, theirs


def install_backend(ours: Mapping[str, str], *, is_editable: bool) -> None:
    """Do what `flagscale install` would, where the installed toolkit looks: the checkout, or a wheel's folder."""
    if not ours:
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from flagscale import env
    from flagscale.cli.install import install_for_build
    from flagscale.errors import FlagScaleError

    if not is_editable:
        os.environ.setdefault(env.SOURCE_DIR, str(env.wheel_dir() / "third_party"))
    try:
        install_for_build(ours["backend"], ours["device"])
    except FlagScaleError as error:
        raise SystemExit(f"error: {error}") from None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    ours, theirs = read_settings(config_settings)
    return build_meta.get_requires_for_build_wheel(theirs) + (NEEDED_TO_FETCH if ours else [])


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    ours, theirs = read_settings(config_settings)
    return build_meta.get_requires_for_build_editable(theirs) + (NEEDED_TO_FETCH if ours else [])


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    ours, theirs = read_settings(config_settings)
    install_backend(ours, is_editable=False)
    return build_meta.build_wheel(wheel_directory, theirs, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    ours, theirs = read_settings(config_settings)
    install_backend(ours, is_editable=True)
    return build_meta.build_editable(wheel_directory, theirs, metadata_directory)
