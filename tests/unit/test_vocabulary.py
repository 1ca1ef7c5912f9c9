"""The common vocabulary in each engine's own words, and one precedence for all three."""

from pathlib import Path
from typing import Any

import pytest
from factories import load, serve_model, serve_tree

from flagscale.errors import ConfigError
from flagscale.runner.config.vocabulary import parse_size, translate_engine_args


def words(engine: str, common: dict[str, Any], specific: dict[str, Any] | None = None) -> dict[str, Any]:
    given = translate_engine_args(engine, common, {engine: specific or {}}, "serve.0")
    return {argument.name: argument.value for argument in given}


COMMON = {
    "model": "/m", "seed": 7, "max_model_len": "4K", "max_num_seqs": 8, "uvicorn_log_level": "warning",
    "show_hidden_metrics_for_version": "0.7", "served_model_name": "me", "tensor-parallel-size": 2, "nothing": None,
}  # fmt: skip


def test_vllm_words_are_the_common_ones() -> None:
    assert words("vllm", COMMON)["max_model_len"] == "4K"
    assert "nothing" not in words("vllm", COMMON)


def test_sglang_words() -> None:
    assert words("sglang", COMMON) == {
        "model_path": "/m", "random_seed": 7, "context_length": 4096, "max_running_requests": 8,
        "log_level": "warning", "enable_metrics": True, "served_model_name": "me", "tp_size": 2,
    }  # fmt: skip


def test_llama_cpp_words() -> None:
    common = {
        **COMMON, "kv_cache_dtype": "fp8_e5m2", "reasoning_parser": "deepseek_r1", "disable_uvicorn_access_log": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    }  # fmt: skip
    del common["tensor-parallel-size"]
    assert words("llama_cpp", common) == {
        "model": "/m", "seed": 7, "ctx_size": 4096, "parallel": 8, "verbosity": 0, "metrics": True, "alias": "me",
        "cache_type_k": "q8_0", "cache_type_v": "q8_0", "reasoning_format": "deepseek", "log_disable": True,
        "rope_scaling": "yarn", "rope_scale": 4.0, "yarn_orig_ctx": 4096,
    }  # fmt: skip
    assert words("llama_cpp", {"kv_cache_dtype": "auto", "uvicorn_log_level": "debug"}) == {"verbosity": 1}


def test_a_scaling_that_llama_cpp_lacks_is_told_and_not_dropped() -> None:
    model = serve_model("llama_cpp", engine_args={"model": "/m", "rope_scaling": {"rope_type": "dynamic", "factor": 2}})
    with pytest.raises(ConfigError, match=r'"dynamic" is not right for `--rope-scaling`'):
        load(serve_tree(model))


@pytest.mark.parametrize(
    ("engine", "common", "specific", "name"),
    [
        ("vllm", {"gpu_memory_utilization": 0.9}, {"gpu-memory-utilization": 0.5}, "gpu_memory_utilization"),
        ("sglang", {"gpu_memory_utilization": 0.9}, {"mem_fraction_static": 0.5}, "mem_fraction_static"),
        ("sglang", {"tensor_parallel_size": 0.9}, {"tp": 0.5}, "tp_size"),
        ("sglang", {"model": 0.9}, {"model_path": 0.5}, "model_path"),
        ("sglang", {"model": 0.9}, {"model": 0.5}, "model_path"),
        ("llama_cpp", {"max_model_len": 0.9}, {"ctx_size": 0.5}, "ctx_size"),
        ("llama_cpp", {"max_model_len": 0.9}, {"c": 0.5}, "ctx_size"),
    ],
)
def test_the_engines_own_words_win_in_every_spelling(
    engine: str, common: dict[str, Any], specific: dict[str, Any], name: str
) -> None:
    assert words(engine, common, specific) == {name: 0.5}


def test_a_null_changes_nothing() -> None:
    assert words("vllm", {"seed": 7}, {"seed": None}) == {"seed": 7}


def test_arguments_know_where_they_were_written() -> None:
    given = translate_engine_args("sglang", {"model": "/m"}, {"sglang": {"tp": 2}}, "serve.0")
    assert [argument.path for argument in given] == [
        "serve.0.engine_args.model",
        "serve.0.engine_args_specific.sglang.tp",
    ]


def test_other_engines_words_are_not_ours() -> None:
    assert translate_engine_args("vllm", {}, {"sglang": {"tp": 2}}, "serve.0") == ()


@pytest.mark.parametrize(
    ("value", "size"),
    [("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2M", 2 * 1024**2), ("1g", 10**9), (5, 5), ("k", "k"), ("4kk", "4kk"),
     ("9" * 5000 + "k", "9" * 5000 + "k"), (None, None), ("-4k", "-4k")],
)  # fmt: skip
def test_sizes(value: Any, size: Any) -> None:
    assert parse_size(value) == size


def test_a_folder_of_weights_becomes_its_first_file(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "c.txt"):
        (tmp_path / name).touch()
    assert words("llama_cpp", {"model": str(tmp_path)}) == {"model": str(tmp_path / "a.gguf")}
    assert words("llama_cpp", {"model": str(tmp_path / "b.gguf")}) == {"model": str(tmp_path / "b.gguf")}
    assert words("vllm", {"model": str(tmp_path)}) == {"model": str(tmp_path)}
