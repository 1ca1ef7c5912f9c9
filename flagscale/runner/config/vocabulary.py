"""The common vocabulary of engine arguments, and what each engine calls its words.

`engine_args` are spelled as vLLM spells them; `engine_args_specific.<engine>` are the engine's own and win. A word of
the common vocabulary that an engine lacks is left as it is, so that the engine's catalogue can name the fault.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flagscale.runner.config.arguments import GivenArgument
from flagscale.runner.config.catalogue import load_catalogue

SGLANG_NAMES = {
    "model": "model_path",
    "seed": "random_seed",
    "max_model_len": "context_length",
    "max_num_seqs": "max_running_requests",
    "uvicorn_log_level": "log_level",
    "show_hidden_metrics_for_version": "enable_metrics",
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "gpu_memory_utilization": "mem_fraction_static",
}

LLAMA_CPP_NAMES = {
    "max_num_seqs": "parallel",
    "served_model_name": "alias",
    "show_hidden_metrics_for_version": "metrics",
    "disable_uvicorn_access_log": "log_disable",
    "ssl_keyfile": "ssl_key_file",
    "ssl_certfile": "ssl_cert_file",
    "rope_theta": "rope_freq_base",
}

NATIVE_NAMES = {
    "max_num_seqs": "max_running",
    "max_num_batched_tokens": "max_tokens_per_step",
    "block_size": "page_size",
}

LLAMA_CPP_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
QUIET_LEVELS = ("warning", "error", "critical", "trace")
SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)([kKmMgG])")
SIZE_SUFFIXES = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}


def parse_size(value: Any) -> Any:
    """`4k` as 4000 and `4K` as 4096, the way vLLM reads them; anything else as it is."""
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    return int(float(match[1]) * SIZE_SUFFIXES[match[2]]) if match else value


def _sglang(name: str, value: Any) -> list[tuple[str, Any]]:
    if name == "max_model_len":
        value = parse_size(value)
    if name == "show_hidden_metrics_for_version":
        value = bool(value)
    return [(SGLANG_NAMES.get(name, name), value)]


def _llama_cpp(name: str, value: Any) -> list[tuple[str, Any]]:
    match name:
        case "model":
            return [(name, find_gguf(value))]
        case "max_model_len":
            return [("ctx_size", parse_size(value))]
        case "uvicorn_log_level":
            return [("log_verbosity", 0 if value in QUIET_LEVELS else 1)]
        case "kv_cache_dtype":
            kind = "q8_0" if str(value).startswith("fp8") else value
            if kind == "auto":
                return []
            return [("cache_type_k", kind), ("cache_type_v", kind)]
        case "rope_scaling" if isinstance(value, dict):
            kind = value.get("rope_type", value.get("type"))
            trained = value.get("original_max_position_embeddings")
            return [("rope_scaling", kind), ("rope_scale", value.get("factor")), ("yarn_orig_ctx", trained)]
        case "reasoning_parser":
            return [("reasoning_format", "deepseek")]
        case "show_hidden_metrics_for_version" | "disable_uvicorn_access_log":
            return [(LLAMA_CPP_NAMES[name], bool(value))]
    return [(LLAMA_CPP_NAMES.get(name, name), value)]


def _native(name: str, value: Any) -> list[tuple[str, Any]]:
    match name:
        case "max_model_len":
            return [(name, parse_size(value))]
        case "enable_prefix_caching":
            return [("no_prefix_caching", not value)]
    return [(NATIVE_NAMES.get(name, name), value)]


def find_gguf(model: Any) -> Any:
    """The first `*.gguf` file in the folder `model`; a file, or what is not on this machine, as it is."""
    if isinstance(model, str) and Path(model).is_dir():
        found = sorted(Path(model).glob("*.gguf"))
        return str(found[0]) if found else model
    return model


Translate = Callable[[str, Any], list[tuple[str, Any]]]
TRANSLATIONS: dict[str, Translate] = {
    "vllm": lambda name, value: [(name, value)],
    "sglang": _sglang,
    "llama_cpp": _llama_cpp,
    "native": _native,
}


def translate_engine_args(
    engine: str, common: Mapping[str, Any], specific: Mapping[Any, Mapping[str, Any]], path: str
) -> tuple[GivenArgument, ...]:
    """The arguments of one model in its engine's own words, nulls left out.

    `path` is the model's dotted path (`serve.0`). `specific` wins over `common` for every engine, in whichever of an
    argument's spellings either is written.
    """
    given: dict[str, GivenArgument] = {}
    for key, value in common.items():
        if value is None:
            continue
        for name, word in TRANSLATIONS[engine](str(key).replace("-", "_"), value):
            _put(given, engine, GivenArgument(name, word, f"{path}.engine_args.{key}"))
    for key, value in specific.get(engine, {}).items():
        name = str(key).replace("-", "_")
        _put(given, engine, GivenArgument(name, value, f"{path}.engine_args_specific.{engine}.{key}"))
    return tuple(given.values())


def _put(given: dict[str, GivenArgument], engine: str, argument: GivenArgument) -> None:
    """Lay an argument over an earlier one of the same meaning; a null changes nothing."""
    if argument.value is None:
        return
    known = load_catalogue(engine).find(argument.name)
    name = known.name if known else argument.name
    given[name] = GivenArgument(name, argument.value, argument.path)
