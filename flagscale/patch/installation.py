"""How a backend comes onto a machine, and what is missing for it: known before anything is downloaded.

Three ways. A backend of pure Python goes on the path of jobs as a source tree, patched for the chip. One with kernels
is taken as the index's wheel on the chips that the wheel was built for, and built from its patched source on the chips
that upstream can be built for. For every other chip the vendor's own build has to be there already, and that is said.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.errors import SourceError
from flagscale.patch.extension import find_compiler
from flagscale.patch.pins import Pin

RUNTIME = {
    "megatron": ("torch", "numpy", "packaging", "psutil", "pybind11", "typing_extensions"),
    "verl": ("torch", "numpy", "ray", "transformers"),
}
"""What a backend that is imported from its tree needs beside it."""

WHEELS = {("vllm", "NVIDIA"), ("sglang", "NVIDIA")}
"""(backend, chip) for which the index's wheel was built. With the CUDA libraries it requires it takes gigabytes."""


@dataclass(frozen=True, slots=True)
class Need:
    """Something that a build needs: how it is looked for, what it is, and how to get it."""

    is_there: Callable[[], bool]
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Build:
    """How a backend is built for a chip: the commands, run one after the other, `{tree}` being its source.

    program: what is built, below the folder that holds the source; "" for a package of this interpreter
    """

    needs: tuple[Need, ...]
    commands: tuple[tuple[str, ...], ...]
    env: Mapping[str, str] = field(default_factory=dict)
    program: str = ""


def _program(name: str, remedy: str) -> Need:
    return Need(lambda: shutil.which(name) is not None, f"the program `{name}`", remedy)


def has_module(name: str) -> bool:
    """Whether this interpreter could import a module, without importing it."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _module(name: str, remedy: str) -> Need:
    return Need(lambda: has_module(name), f"the Python package `{name}`", remedy)


def _header(name: str, remedy: str) -> Need:
    return Need(lambda: Path("/usr/include", name).is_file(), f"the header {name}", remedy)


COMPILER = Need(lambda: find_compiler() is not None, "a C++ compiler", "apt install g++, or set CXX to one")
CMAKE = _program("cmake", "apt install cmake, or pip install cmake")

BUILDS = {
    ("vllm", "Generic_CPU"): Build(
        needs=(
            COMPILER,
            CMAKE,
            _program("ninja", "apt install ninja-build, or pip install ninja"),
            _program("cargo", "https://rustup.rs: parts of vLLM are written in Rust"),
            _header("numa.h", "apt install libnuma-dev"),
            _module("torch", "pip install torch --index-url https://download.pytorch.org/whl/cpu"),
            _module("setuptools_scm", "pip install setuptools-scm"),
            _module("setuptools_rust", "pip install setuptools-rust"),
        ),
        commands=((sys.executable, "-m", "pip", "install", "--no-build-isolation", "{tree}"),),
        env={"VLLM_TARGET_DEVICE": "cpu"},
    ),
    ("llama_cpp", "Generic_CPU"): Build(
        needs=(COMPILER, CMAKE),
        commands=(
            ("cmake", "-S", "{tree}", "-B", "{tree}/../build", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF",
             "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DBUILD_SHARED_LIBS=OFF"),
            ("cmake", "--build", "{tree}/../build", "--target", "llama-server", "--parallel", "{cores}"),
        ),
        program="build/bin/llama-server",
    ),
}  # fmt: skip
"""(backend, chip) for which upstream's source can be built."""


def find_missing(pin: Pin) -> tuple[str, ...]:
    """What this interpreter lacks to import the backend from its tree."""
    return tuple(name for name in RUNTIME.get(pin.backend, ()) if not has_module(name))


def find_built(pin: Pin, chip: str, tree: Path) -> Path | None:
    """Where the program is, or will be, that is built of the source at `tree`; None for what is no program."""
    build = BUILDS.get((pin.backend, chip))
    return tree.parent / build.program if build and build.program else None


def check_way(pin: Pin, chip: str, here: str) -> None:
    """
    here: the chip of this machine

    Raises:
        SourceError: this backend cannot be installed here for this chip; with everything that is missing.
    """
    if pin.on_path is not None:
        return
    if (pin.backend, chip) in WHEELS:
        if chip != here:
            raise SourceError(
                f"{pin.project} {pin.version} for {chip} is a wheel that brings gigabytes of libraries for that chip, "
                f"and this machine has none ({here}): run this where the chip is; or, where one comes later, as in the "
                "build of an image, with --without-chip"
            )
        return
    build = BUILDS.get((pin.backend, chip))
    if build is None:
        raise SourceError(
            f"{pin.project} {pin.version} is not installed, and for {chip} there is neither a wheel of it on the index "
            f"nor a way to build upstream's source: install the vendor's own build of {pin.project} {pin.version} for "
            "this chip, and run this again to patch it"
        )
    missing = [f"{need.what}: {need.remedy}" for need in build.needs if not need.is_there()]
    if missing:
        raise SourceError(
            f"{pin.project} {pin.version} has to be built for {chip}, and {len(missing)} things are missing:\n  "
            + "\n  ".join(missing)
        )


def list_commands(pin: Pin, chip: str, tree: Path) -> tuple[tuple[str, ...], ...]:
    """The commands that install a backend for a chip; none for one that is imported from its tree."""
    if pin.on_path is not None:
        return ()
    if (pin.backend, chip) in WHEELS:
        return ((sys.executable, "-m", "pip", "install", f"{pin.project}=={pin.version}"),)
    words = {"{tree}": str(tree), "{tree}/../build": str(tree.parent / "build")}
    words["{cores}"] = str(len(os.sched_getaffinity(0)))
    return tuple(tuple(words.get(word, word) for word in command) for command in BUILDS[pin.backend, chip].commands)


def run_commands(pin: Pin, chip: str, commands: Sequence[Sequence[str]]) -> None:
    """Run them one after the other, their output shown as it comes.

    Raises:
        SourceError: one failed.
    """
    sys.stdout.flush()
    build = BUILDS.get((pin.backend, chip))
    env = {**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": pin.version, **(build.env if build else {})}
    for command in commands:
        code = subprocess.run(command, env=env, check=False).returncode
        if code:
            raise SourceError(f"installing {pin.project} {pin.version} failed (exit code {code}): {' '.join(command)}")
