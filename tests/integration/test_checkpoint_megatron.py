"""Checkpoints of the real Megatron, converted: transformers, the engine and Megatron itself compute the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_megatron_cpu import CPU_ARGUMENTS, LLAMA, ROOT, TINY, environment, flags, source, train_well  # noqa: E402

from flagscale.inference.engine import Engine, SamplingParams  # noqa: E402
from flagscale.sync.checkpoint import convert  # noqa: E402
from flagscale.sync.hf_folder import load_config  # noqa: E402

__all__ = ["source"]
pytestmark = pytest.mark.engine

BYTES = {**LLAMA, "vocab_size": 257, "make_vocab_size_divisible_by": 64, "train_iters": 4, "save_interval": 4}
TINYS = {**BYTES, "group_query_attention": False, "num_query_groups": None, "qk_layernorm": False}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall", "moe_ffn_hidden_size": 48}
CASES = [
    pytest.param("LlamaForCausalLM", 2, {**TINYS, "tensor_model_parallel_size": 2}, id="tiny, two ranks"),
    pytest.param(
        "Qwen3ForCausalLM",
        1,
        {**BYTES, "untie_embeddings_and_output_weights": False, "kv_channels": 24, "rotary_base": 500000},
        id="qwen3, tied",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "Qwen2ForCausalLM",
        2,
        {**TINYS, "add_qkv_bias": True, "pipeline_model_parallel_size": 2},
        id="qwen2, in a pipeline",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "Qwen3MoeForCausalLM",
        2,
        {**BYTES, **EXPERTS, "expert_model_parallel_size": 2},
        id="qwen3 moe, experts in parallel",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "MixtralForCausalLM",
        1,
        {**BYTES, **EXPERTS, "qk_layernorm": False, "moe_router_pre_softmax": False},
        id="mixtral",
        marks=pytest.mark.slow,
    ),
]


def megatron_logits(source: Path, args: dict[str, Any], checkpoint: Path, output: Path) -> Any:
    alone = dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"), None
    )
    settings = {**CPU_ARGUMENTS, **TINY, **args, **alone, "load": checkpoint, "train_iters": 9, "finetune": True}
    script = ROOT / "tests" / "integration" / "megatron_logits.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone", script, output]
    ran = subprocess.run(
        [*words, *flags(settings)], env=environment(source), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert output.is_file(), ran.stdout.decode()[-4000:]
    assert b"could not find the metadata file" not in ran.stdout
    return torch.load(output)


@pytest.mark.parametrize(("architecture", "num_ranks", "args"), CASES)
def test_a_trained_model_computes_the_same_on_both_sides(
    source: Path, architecture: str, num_ranks: int, args: dict[str, Any], tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    train_well(source, num_ranks, {**args, "save": trained})
    tokens, logits = megatron_logits(source, args, trained, tmp_path / "before")

    folder = convert(trained, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(model).__name__ == architecture
    with torch.no_grad():
        found = model(tokens).logits
    # Megatron leaves the rows of padding in its output, the converted model has none.
    assert found.shape[-1] == 257 < logits.shape[-1]
    torch.testing.assert_close(found, logits[..., :257], atol=2e-4, rtol=1e-3)
    assert found.std() > 0.01

    engine = Engine.from_folder(folder)
    (told,) = engine.generate([tokens[0].tolist()], SamplingParams(max_tokens=6, temperature=0))
    ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert list(told.completions[0].token_ids) == ids[0, tokens.shape[1] :].tolist()
    (text,) = engine.generate(["Tale 1: "], SamplingParams(max_tokens=4))
    assert text.prompt_token_ids == tuple(b"Tale 1: ")

    whole = convert(trained, tmp_path / "padded", keep_padding=True)
    num_rows = load_config(whole)["vocab_size"]
    back = convert(whole, tmp_path / "back", to="megatron", padded_vocab_size=num_rows)
    _, again = megatron_logits(source, args, back, tmp_path / "after")
    assert torch.equal(again, logits)
    last = convert(back, tmp_path / "last", keep_padding=True)
    assert (last / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
