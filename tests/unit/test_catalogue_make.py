"""The extractors, against a real argparse parser and a piece of a real `llama-server --help`."""

import argparse
import enum
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flagscale.env import source_dir
from flagscale.runner.config.catalogue import read_catalogue

TOOLS = Path(__file__).parents[2] / "tools" / "catalogue"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module(name)


@pytest.fixture
def dump(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("argparse_dump", monkeypatch)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("llama_cpp_help", monkeypatch)


class Backend(enum.Enum):
    flash = 1
    fused = 2


def pick_backend(name: str) -> Backend:
    return Backend[name]


def parse_size(text: str) -> int:
    return int(float(text[:-1]) * 1000) if text.endswith("k") else int(text)


def parse_size_or_auto(text: str) -> int:
    return -1 if text == "auto" else parse_size(text)


def parse_iec_size(text: str) -> int:
    return int(text[:-2]) * 1024 if text.endswith("Ki") else parse_size(text)


def parse_pattern(text: str) -> Any:
    inner = text.partition("]*")[0].strip("[")
    return [int(inner)] * int(text.partition("]*")[2]) if "]*" in text else int(text)


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(text)
    return text.lower() == "true"


def parse_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse_mapping_or_text(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


class Shout(argparse.Action):
    """An action class of a backend's own, that takes no value."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        raise AssertionError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--version", action="version", version="1")
    parser.add_argument("--lr", type=float, help="Initial rate. Depending on the style, more is said here.")
    parser.add_argument("--save_interval", "--save-interval", "-s", type=int, default=10)
    parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int)
    parser.add_argument("--pp-depth", type=int)
    parser.add_argument("--no-bias", action="store_false", dest="bias")
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--round", dest="round", action="store_true", help="Round it.")
    parser.add_argument("--no-round", dest="round", action="store_false")
    parser.add_argument("--attention", type=pick_backend, choices=list(Backend), default=Backend.fused)
    parser.add_argument("--tag", action="append")
    parser.add_argument("--mask", type=int, nargs=3)
    parser.add_argument("--extra", type=json.loads, default={"a": 1})
    parser.add_argument("--cache", default=str(Path.home() / "cache"))
    parser.add_argument("--thing", default=object())
    parser.add_argument("--onnx-safe", type=bool)
    parser.add_argument("--old", action=Shout, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument("--kernel", choices={"b", "a", "c"})
    parser.add_argument("--pick", choices=["a", None], default=False)
    return parser


def test_dump_parser_knows_every_kind(dump: ModuleType) -> None:
    rows = dump.dump_parser(make_parser())
    assert rows == {
        "lr": {"type": "float", "help": "Initial rate."},
        "save_interval": {"flags": ["--save-interval", "--save_interval", "-s"], "type": "int", "default": 10},
        "tp_size": {"flags": ["--tp-size", "--tensor-parallel-size", "--tp"], "type": "int", "default": 1},
        "pp_size": {"type": "int"},
        "pp_depth": {"type": "int"},
        "no_bias": {"kind": "store_false"},
        "prefix_caching": {"kind": "optional_bool"},
        "round": {"kind": "optional_bool", "help": "Round it."},
        "attention": {"choices": ["flash", "fused"], "default": "fused"},
        "tag": {"kind": "append"},
        "mask": {"type": "int", "nargs": 3},
        "extra": {"type": "json", "default": {"a": 1}},
        "cache": {},
        "thing": {},
        "onnx_safe": {"type": "bool", "choices": [True]},
        "old": {"kind": "store_true"},
        "kernel": {"choices": ["a", "b", "c"]},
        "pick": {"choices": ["a"]},
    }


def test_abbreviations_are_those_that_the_parser_takes(dump: ModuleType) -> None:
    parser = make_parser()
    rows = dump.dump_parser(parser)
    assert parser.parse_args(["--tp", "2"]).tp_size == 2
    assert "--tp" in rows["tp_size"]["flags"]
    assert "flags" not in rows["pp_size"]  # `--pp` could be `--pp-depth`
    strict = argparse.ArgumentParser(allow_abbrev=False)
    strict.add_argument("--tp-size", type=int)
    assert dump.dump_parser(strict) == {"tp_size": {"type": "int"}}


@pytest.mark.parametrize(
    ("parse", "expected"),
    [
        (None, ("str", [])),
        (str, ("str", [])),
        (int, ("int", [])),
        (float, ("float", [])),
        (bool, ("bool", [])),
        (json.loads, ("json", [])),
        (parse_size, ("size", [])),
        (parse_size_or_auto, ("size", ["auto"])),
        (parse_iec_size, ("iec_size", [])),
        (parse_pattern, ("pattern", [])),
        (parse_bool, ("bool", [])),
        (parse_tuple, ("str", [])),
        (parse_mapping_or_text, ("any", [])),
        (lambda text: text, ("str", [])),
    ],
)
def test_infer_type_tries_words(dump: ModuleType, parse: Any, expected: tuple[str, list[str]]) -> None:
    assert dump.infer_type(parse) == expected


def test_shorten_help(dump: ModuleType) -> None:
    assert dump.shorten_help(None) == ""
    assert dump.shorten_help(argparse.SUPPRESS) == ""
    assert dump.shorten_help("Two\n   lines of text. Then more.") == "Two lines of text."
    assert dump.shorten_help("Half of it, 50%%, e.g. 0.5") == "Half of it, 50%, e.g. 0.5"
    assert dump.shorten_help("Cached under /home/someone/.cache") == ""
    long = dump.shorten_help("word " * 100)
    assert len(long) <= 160
    assert long.endswith("…")


def test_as_plain_keeps_values_and_drops_objects_and_places(dump: ModuleType) -> None:
    assert dump.as_plain((1, "a", None)) == [1, "a", None]
    assert dump.as_plain({"b", "a"}) == ["a", "b"]
    assert dump.as_plain(Backend.flash) == "flash"
    assert dump.as_plain({"a": object()}) is None
    assert dump.as_plain(object()) is None
    assert dump.as_plain("/home/someone/x") is None


HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-t,    --threads N                      number of CPU threads to use during generation (default: -1)
                                        (env: LLAMA_ARG_THREADS)
--cpu-strict <0|1>                      use strict CPU placement (default: 0)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
                                        (env: LLAMA_ARG_FLASH_ATTN)
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to enable KV cache offloading (default: enabled)
                                        (env: LLAMA_ARG_KV_OFFLOAD)
--repack, -nr, --no-repack              whether to enable weight repacking (default: enabled)
-cb,   --cont-batching, -nocb, --no-cont-batching
                                        whether to enable continuous batching
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
                                        (default: f16)
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
                                        'auto', or 'all' (default: auto)
--temp, --temperature N                 temperature (default: 0.80)
--control-vector-layer-range START END
                                        layer range to apply the control vector(s) to, start and end inclusive
-j,    --json-schema SCHEMA             JSON schema to constrain generations (https://json-schema.org/), e.g.
                                        `{"type": "object"}` for any JSON object
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
--metrics                               enable prometheus compatible metrics endpoint (default: disabled)
--context-shift                         shift the context when it is full
--no-context-shift                      do not


----- sampling params -----

-s,    --seed SEED                      RNG seed (default: -1, use random seed for -1)
"""


def test_parse_help_of_llama_server(llama: ModuleType) -> None:
    rows = llama.parse_help(HELP)
    helps = {name: row.pop("help") for name, row in rows.items()}
    assert helps["threads"] == "number of CPU threads to use during generation"
    assert rows == {
        "threads": {"flags": ["--threads", "-t"], "type": "int", "default": -1},
        "cpu_strict": {"type": "int", "choices": [0, 1], "default": 0},
        "flash_attn": {"flags": ["--flash-attn", "-fa"], "choices": ["on", "off", "auto"], "default": "auto"},
        "kv_offload": {
            "flags": ["--kv-offload", "-kvo"],
            "kind": "optional_bool",
            "negatives": ["--no-kv-offload", "-nkvo"],
            "default": True,
        },
        "repack": {"kind": "optional_bool", "negatives": ["--no-repack", "-nr"], "default": True},
        "cont_batching": {
            "flags": ["--cont-batching", "-cb"],
            "kind": "optional_bool",
            "negatives": ["--no-cont-batching", "-nocb"],
        },
        "cache_type_k": {
            "flags": ["--cache-type-k", "-ctk"],
            "choices": ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"],
            "default": "f16",
        },
        "gpu_layers": {
            "flags": ["--gpu-layers", "--n-gpu-layers", "-ngl"],
            "type": "int",
            "words": ["auto", "all"],
            "default": "auto",
        },
        "temp": {"flags": ["--temp", "--temperature"], "type": "float", "default": 0.8},
        "control_vector_layer_range": {"nargs": 2},
        "json_schema": {"flags": ["--json-schema", "-j"], "type": "json"},
        "override_tensor": {"flags": ["--override-tensor", "-ot"]},
        "metrics": {"kind": "store_true"},
        "context_shift": {"kind": "optional_bool"},
        "seed": {"flags": ["--seed", "-s"], "type": "int", "default": -1},
    }


def test_split_signature_finds_where_the_help_starts(llama: ModuleType) -> None:
    assert llama.split_signature("--metrics" + " " * 31 + "enable it") == (["--metrics"], "", "enable it")
    assert llama.split_signature("-ot, --override-tensor <a b>=<c d>,...") == (
        ["-ot", "--override-tensor"],
        "<a b>=<c d>,...",
        "",
    )


def test_rendered_file_is_read_back_and_keeps_dropped_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = load("catalogue_file", monkeypatch)
    head = {"backend": "toy", "title": "Toy", "version": "1", "source": "a test"}
    rows = load("argparse_dump", monkeypatch).dump_parser(make_parser())
    path = tmp_path / "toy.json"
    text = files.render_catalogue(head, rows, {"gone": {"reason": "r", "since": "1", "instead": "lr"}})
    path.write_text(text)
    catalogue = read_catalogue(path)
    assert list(catalogue.rows) == list(rows)
    assert catalogue.dropped["gone"].instead == "lr"
    assert files.read_dropped(path) == {"gone": {"reason": "r", "since": "1", "instead": "lr"}}
    assert files.read_dropped(tmp_path / "absent.json") == {}
    assert files.find_differences(text, text) == []
    assert files.find_differences(text, text.replace('"default": 10', '"default": 11'))[0].startswith('- "save_int')
    lines = text.splitlines()
    shuffled = "\n".join([*lines[:7], lines[8], lines[7], *lines[9:]])
    assert files.find_differences(text, shuffled) == ["the order of the lines"]


@pytest.fixture
def toy_server(tmp_path: Path) -> Path:
    """A program that answers `--version` and `--help` as a llama-server does."""
    path = tmp_path / "llama-server"
    version = "version: 0.5.0-dev (build 1, commit 0c1e570)"
    path.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo '{version}' >&2 && exit\ncat <<'END'\n{HELP}\nEND\n")
    path.chmod(0o755)
    return path


def run_make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / "make.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def test_make_check_tells_differences_and_writes_nothing(toy_server: Path) -> None:
    committed = TOOLS.parents[1] / "flagscale/runner/config/catalogues/llama_cpp.json"
    before = committed.read_bytes()
    done = run_make("llama_cpp", "--source", str(toy_server), "--check")
    assert done.returncode == 1
    assert '- "ctx_size": ' in done.stdout
    assert committed.read_bytes() == before


def test_make_refuses_another_version(toy_server: Path) -> None:
    toy_server.write_text(toy_server.read_text().replace("0c1e570", "fffffff"))
    done = run_make("llama_cpp", "--source", str(toy_server))
    assert done.returncode == 1
    assert "found version 0.5.0-dev (fffffff), the catalogue is pinned to 0.5.0-dev (0c1e570)" in done.stderr


def test_make_needs_a_server_and_a_known_backend() -> None:
    assert "has to name a built llama-server" in run_make("llama_cpp").stderr
    assert "invalid choice" in run_make("tensorrt").stderr
    assert "--check" in run_make("--help").stdout


@pytest.mark.engine
@pytest.mark.skipif(not (source_dir("Megatron-LM") / "megatron").is_dir(), reason="Megatron-LM is not fetched")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_catalogue_of_megatron_is_what_its_source_says() -> None:
    done = run_make("megatron", "--source", str(source_dir("Megatron-LM")), "--check")
    assert done.stdout.strip() == "megatron.json is up to date", done.stderr
    assert done.returncode == 0


def test_make_refuses_overrides_of_nothing_and_revived_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_server: Path
) -> None:
    parsers = load("backend_parsers", monkeypatch)
    make = load("make", monkeypatch)
    recipe = parsers.Recipe("Toy", "1", "a test", "nothing", lambda _source: ("1", {"lr": {}}))
    monkeypatch.setitem(parsers.RECIPES, "toy", recipe)
    path = tmp_path / "toy.json"
    path.write_text(make.make("toy", None, path))
    assert read_catalogue(path).find("lr") is not None
    path.write_text(path.read_text().replace('"dropped": {', '"dropped": {"lr": {"reason": "gone"}'))
    with pytest.raises(SystemExit, match=r"dropped, yet there: \['lr'\]"):
        make.make("toy", toy_server, path)


def test_stand_ins_take_what_an_import_does_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = load("backend_parsers", monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, parsers._Absent("absent_toy_package")])
    module = importlib.import_module("absent_toy_package.language")
    for name in [name for name in sys.modules if name.startswith("absent_toy_package")]:
        monkeypatch.delitem(sys.modules, name)

    @module.jit
    def kernel() -> str:
        return "kept"

    assert kernel() == "kept"
    assert module.constexpr[3] is not None
    assert module.Config({"a": 1}, num_warps=4).anything
    assert not hasattr(module, "__wrapped__")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("another_absent_toy_package")
