"""The C++ modules of a fetched source tree, built for the interpreter that will load them.

One compiler call does it: the modules are single files that need only Python's and pybind11's headers. On a machine
without a compiler the module can be taken from a wheel of another release, and is, if that wheel was made from
byte-identical sources.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import SourceError

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-Wall", "-shared", "-std=c++17", "-fPIC", "-fvisibility=hidden")


@dataclass(frozen=True, slots=True)
class Extension:
    """A pybind11 module: its dotted name, its sources below the tree, and a release whose wheels hold it prebuilt."""

    module: str
    sources: tuple[str, ...]
    prebuilt: str | None = None

    @property
    def built_path(self) -> str:
        """Where the running interpreter looks for the module, below the tree."""
        return self.module.replace(".", "/") + str(sysconfig.get_config_var("EXT_SUFFIX"))


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on the PATH."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


def _include_dirs() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise SourceError(
            f"building needs pybind11, which {sys.executable} does not have: `python -m pip install pybind11`"
        ) from None
    python_dir = sysconfig.get_path("include")
    if not (Path(python_dir) / "Python.h").is_file():
        raise SourceError(
            f"building needs {python_dir}/Python.h: install the headers (Debian: `apt install python3-dev`)"
        )
    return [str(pybind11.get_include()), python_dir]


def _compile(extension: Extension, tree: Path, dst: Path, compiler: str) -> None:
    includes = [f"-I{folder}" for folder in _include_dirs()]
    words = [compiler, *FLAGS, *includes, *(str(tree / source) for source in extension.sources), "-o", str(dst)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if ran.returncode:
        first_error = next((line for line in ran.stderr.splitlines() if "error" in line), ran.stderr.strip()[-300:])
        raise SourceError(f"{compiler} could not build {extension.module}: {first_error}")


def take_prebuilt(extension: Extension, tree: Path, dst: Path, wheel: Path) -> None:
    """Copy the built module out of `wheel` to `dst`.

    Raises:
        SourceError: the wheel was made from other sources, or has no module for this interpreter.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for source in extension.sources:
            if source not in names or archive.read(source) != (tree / source).read_bytes():
                raise SourceError(f"{wheel.name} was made from another {source}: its module cannot be used")
        if extension.built_path not in names:
            raise SourceError(f"{wheel.name} has no {extension.built_path}")
        dst.write_bytes(archive.read(extension.built_path))


def _download_wheel(project: str, version: str, folder: Path) -> Path | None:
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*words, "--dest", str(folder), f"{project}=={version}"], capture_output=True, check=False)
    return next(iter(sorted(folder.glob("*.whl"))), None)


def _explain_no_compiler(extension: Extension, why: str) -> SourceError:
    return SourceError(
        f"{extension.module} has to be built and there is no C++ compiler on the PATH ({why}). "
        "Install one (Debian: `apt install g++`; conda: `conda install gxx`), or set CXX to it."
    )


def build_extension(extension: Extension, tree: Path, project: str, compiler: str | None = None) -> str:
    """Build the module in place, atomically, and return the SHA-256 of what was built.

    Raises:
        SourceError: no compiler and no wheel that fits, or the compiler refused; the message says what to install.
    """
    compiler = compiler or find_compiler()
    dst = tree / extension.built_path
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".build-") as folder:
        built = Path(folder) / "built.so"
        if compiler:
            _compile(extension, tree, built, compiler)
        elif extension.prebuilt is None:
            raise _explain_no_compiler(extension, "no release has it prebuilt")
        else:
            wheel = _download_wheel(project, extension.prebuilt, Path(folder))
            if wheel is None:
                raise _explain_no_compiler(extension, f"no wheel of {project} {extension.prebuilt} for this Python")
            take_prebuilt(extension, tree, built, wheel)
        digest = hashlib.sha256(built.read_bytes()).hexdigest()
        built.replace(dst)
    return digest
