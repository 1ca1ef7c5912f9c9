"""The catalogues as they ship, and the check of one argument."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import FlagScaleError, UserError
from flagscale.runner.config.catalogue import BACKENDS, Argument, load_catalogue, read_catalogue, spell

CATALOGUES = [load_catalogue(backend) for backend in BACKENDS]
MIB = 1024 * 1024


def expect(argument: Argument, value: Any) -> str:
    expected = argument.find_expected(value)
    assert expected is not None
    return expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_catalogue_loads_and_says_what_it_is(backend: str) -> None:
    catalogue = load_catalogue(backend)
    assert catalogue.backend == backend
    assert catalogue.full_name == f"{catalogue.title} {catalogue.version}"
    assert len(catalogue.rows) > (10 if backend == "native" else 200)
    assert catalogue.arguments.keys() == catalogue.rows.keys()
    assert load_catalogue(backend) is catalogue


@pytest.mark.parametrize(
    ("backend", "version"),
    [("megatron", "0.19.2"), ("vllm", "0.32.0"), ("sglang", "0.5.23"), ("llama_cpp", "0.5.0-dev (0c1e570)")],
)
def test_catalogue_is_of_the_pinned_version(backend: str, version: str) -> None:
    assert load_catalogue(backend).version == version


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `vllm`"):
        load_catalogue("vlllm")
    with pytest.raises(UserError, match=r"there are megatron, vllm, sglang, llama_cpp, native$"):
        load_catalogue("zzz")


@pytest.mark.parametrize("text", ["", "[]", '{"arguments": 3}', '{"arguments": {}}', "not json"])
def test_broken_file_is_said_to_be_no_catalogue(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(FlagScaleError, match=r"broken\.json: not an argument catalogue"):
        read_catalogue(path)
    with pytest.raises(FlagScaleError, match=r"absent\.json: not an argument catalogue"):
        read_catalogue(tmp_path / "absent.json")


def test_loading_imports_no_backend() -> None:
    code = (
        "import sys; from flagscale.runner.config.catalogue import BACKENDS, load_catalogue\n"
        "for backend in BACKENDS: load_catalogue(backend)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'numpy', 'pydantic', 'omegaconf', 'hydra', 'megatron', 'vllm', 'sglang', 'argparse'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=BACKENDS)
def test_file_is_compact_and_depends_on_no_machine(catalogue: Any) -> None:
    path = Path(__file__).parents[2] / "flagscale/runner/config/catalogues" / f"{catalogue.backend}.json"
    text = path.read_text()
    assert len(text) < MIB / 4
    for trace in ("/root/", "/home/", "/tmp/", "site-packages", " object at 0x"):
        assert trace not in text
    lines = text.splitlines()
    for name in catalogue.rows:
        assert sum(line.startswith(f'    "{name}": ') for line in lines) == 1


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=BACKENDS)
def test_no_spelling_means_two_arguments(catalogue: Any) -> None:
    seen: dict[str, str] = {}
    for name, argument in catalogue.arguments.items():
        for flag in argument.flags:
            assert seen.setdefault(spell(flag), name) == name
        assert argument.flag.startswith("--")
        assert spell(argument.flag) == name


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=BACKENDS)
def test_dropped_names_are_gone_and_point_at_what_is_there(catalogue: Any) -> None:
    for name, dropped in catalogue.dropped.items():
        owner, _, value = name.partition("=")
        if value:
            argument = catalogue.find(owner)
            assert argument is not None
            assert argument.find_expected(value) is not None
            assert dropped.instead is None or argument.find_expected(dropped.instead) is None
            continue
        assert catalogue.find(name) is None
        assert dropped.reason
        assert dropped.instead is None or catalogue.find(dropped.instead) is not None


@pytest.mark.parametrize(
    ("backend", "key", "value"),
    [
        ("megatron", "lr", "1e-5"),
        ("megatron", "lr", 1),
        ("megatron", "num_layers", "32"),
        ("megatron", "num-layers", 32),
        ("megatron", "no_position_embedding", True),
        ("megatron", "swiglu", False),
        ("megatron", "data_path", ["0.3", "a", 0.7, "b"]),
        ("megatron", "data_path", "a"),
        ("megatron", "rampup_batch_size", [16, 8, 1000]),
        ("megatron", "moe_layer_freq", "([1]*3+[0])*2"),
        ("megatron", "moe_layer_freq", 2),
        ("megatron", "persistent_save_interval", 10),
        ("megatron", "no_rl_skip_bos_token", True),
        ("megatron", "attention_backend", "flash"),
        ("megatron", "onnx_safe", True),
        ("megatron", "seed", None),
        ("vllm", "max_model_len", "4k"),
        ("vllm", "max-model-len", "auto"),
        ("vllm", "hf_overrides", {"rope": {"factor": 2}}),
        ("vllm", "limit_mm_per_prompt.image", 18),
        ("vllm", "compilation_config", '{"mode": 3}'),
        ("vllm", "tp", 2),
        ("vllm", "no_enable_prefix_caching", True),
        ("vllm", "enable_prefix_caching", False),
        ("vllm", "lora_modules", [{"name": "a", "path": "b"}, "c=d"]),
        ("vllm", "model", "Qwen/Qwen3-0.6B"),
        ("sglang", "tp", 8),
        ("sglang", "context_length", "4Ki"),
        ("sglang", "hisparse_config", {"top_k": 2048}),
        ("llama_cpp", "n_gpu_layers", "all"),
        ("llama_cpp", "ngl", 99),
        ("llama_cpp", "flash_attn", "on"),
        ("llama_cpp", "no_webui", True),
        ("llama_cpp", "control_vector_layer_range", [1, 2]),
    ],
)
def test_right_values_pass(backend: str, key: str, value: Any) -> None:
    assert load_catalogue(backend).check(key, value, key) is None


@pytest.mark.parametrize(
    ("backend", "key", "value", "told"),
    [
        ("megatron", "lr", "fast", '"fast" is not right for `--lr` of Megatron-LM 0.19.2; expected a number'),
        ("megatron", "num_layers", 3.5, "expected a whole number"),
        ("megatron", "train_samples", 1.5, "expected a whole number"),
        ("megatron", "seed", True, "expected a whole number"),
        ("megatron", "swiglu", "yes", "expected true or false"),
        ("megatron", "swiglu", 1, "expected true or false"),
        ("megatron", "rampup_batch_size", [16, 8], "expected a list of 3 values, not 2"),
        ("megatron", "data_path", {"a": 1}, "expected one plain value"),
        ("megatron", "load", True, "expected one plain value"),
        ("megatron", "moe_layer_freq", "every 3", "quoted pattern"),
        ("megatron", "window_attn_skip_freq", [1, 0], "quoted pattern"),
        ("megatron", "onnx_safe", False, "expected one of true"),
        ("megatron", "position_embedding_type", "ropee", "(nearest: rope)"),
        ("megatron", "position_embedding_type", [1], "expected one of learned_absolute"),
        ("megatron", "tensor_model_paralel_size", 2, "did you mean `tensor_model_parallel_size`?"),
        ("megatron", "tensor-model-paralel-size", 2, "did you mean `tensor-model-parallel-size`?"),
        ("megatron", "lx", 2, "did you mean `lr`?"),
        ("megatron", "use_legacy_models", True, "(gone since 0.18)"),
        ("megatron", "tokenizer_path", "x", "expected `tokenizer_model` in its place"),
        ("vllm", "max_model_len", "4q", "such as 4k (4000) or 4K (4096), or auto"),
        ("vllm", "max_num_seqs", [1], "expected a whole number"),
        ("vllm", "limit_mm_per_prompt", "image=8", "a mapping or a list"),
        ("vllm", "max_model_len.a", 1, "has no argument"),
        ("vllm", "guided_decoding_backend", "x", "expected `structured_outputs_config` in its place"),
        ("sglang", "context_length", "4K", "4Ki"),
        ("llama_cpp", "flash_attn", True, "in quotes"),
        ("llama_cpp", "mlock", True, "`load_mode`"),
        ("llama_cpp", "n_gpu_layers", "some", "auto, all"),
    ],
)
def test_wrong_values_and_names_are_told(backend: str, key: str, value: Any, told: str) -> None:
    fault = load_catalogue(backend).check(key, value, f"section.{key}")
    assert fault is not None
    assert fault.path == f"section.{key}"
    assert told in str(fault)


def test_dropped_name_that_asks_for_nothing_passes() -> None:
    catalogue = load_catalogue("megatron")
    assert catalogue.check("enable_hetero", False, "p") is None
    assert catalogue.check("enable_hetero", None, "p") is None
    assert catalogue.check("enable_hetero", True, "p") is not None
    assert catalogue.check("enable_heteroo", False, "p") is not None


def test_find_gives_what_a_renderer_needs() -> None:
    vllm, megatron = load_catalogue("vllm"), load_catalogue("megatron")
    prefix = vllm.find("enable-prefix-caching")
    assert prefix is not None
    assert (prefix.flag, prefix.negative_flag, prefix.kind) == (
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "optional_bool",
    )
    negative = vllm.find("no_enable_prefix_caching")
    assert negative is not None
    assert (negative.flag, negative.kind, negative.takes_value) == ("--no-enable-prefix-caching", "store_false", False)
    dotted = vllm.find("limit_mm_per_prompt.image")
    assert dotted is not None
    assert (dotted.name, dotted.flag) == ("limit_mm_per_prompt.image", "--limit-mm-per-prompt.image")
    layer = megatron.find("no_masked_softmax_fusion")
    assert layer is not None
    assert (layer.kind, layer.default, layer.takes_list) == ("store_false", False, False)
    paths = megatron.find("data_path")
    assert paths is not None
    assert paths.takes_list
    assert megatron.find("limit_mm_per_prompt.image") is None


@pytest.mark.parametrize(
    ("argument", "good", "bad"),
    [
        (Argument("a", ("--a",), type="any"), [1, "x", {"k": 1}, [1], True], []),
        (Argument("a", ("--a",), type="bool"), [True, "false"], ["x", 1]),
        (Argument("a", ("--a",), type="json"), [{}, [], "{}", "[1]"], ["{", 1, True]),
        (Argument("a", ("--a",), type="size"), [1, "-1", "1.5k", "2M"], ["1.5K", "4Ki", 1.5]),
        (Argument("a", ("--a",), type="iec_size"), [1, "1.5k", "2Mi"], ["1.5Ki", "4K", 1.5]),
        (Argument("a", ("--a",), kind="append", type="int"), [1, [1, 2], []], ["x", [1, "x"]]),
        (Argument("a", ("--a",), nargs="?"), ["x", True, None], [False, ["x"]]),
        (Argument("a", ("--a",), nargs="*"), ["x", True, [], ["x", 1]], [False, [True]]),
        (Argument("a", ("--a",), nargs="+"), ["x", ["x"]], [True, []]),
        (Argument("a", ("--a",), nargs=2, type="int"), [[1, 2]], [1, [1], [1, 2, 3], [1, "x"]]),
        (Argument("a", ("--a",), choices=(1, 2)), [1, "2"], [3, True, "x"]),
    ],
)
def test_find_expected_by_kind_and_type(argument: Argument, good: list[Any], bad: list[Any]) -> None:
    assert [argument.find_expected(value) for value in good] == [None] * len(good)
    for value in bad:
        assert expect(argument, value)


def test_long_values_are_cut_in_messages() -> None:
    fault = load_catalogue("megatron").check("lr", "x" * 500, "p")
    assert fault is not None
    assert len(fault.message) < 150


def test_help_of_each_catalogue_is_short() -> None:
    for catalogue in CATALOGUES:
        assert max(len(argument.help) for argument in catalogue.arguments.values()) <= 160
        assert json.dumps(list(catalogue.names()))
