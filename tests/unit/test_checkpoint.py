"""Folders of both formats: real models of transformers there and back, and everything that a folder can be wrong in."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine_models import make_model  # noqa: E402
from factories import ROOT  # noqa: E402

from flagscale.errors import ConfigError, UserError  # noqa: E402
from flagscale.inference.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from flagscale.sync import hf_folder  # noqa: E402
from flagscale.sync.checkpoint import RELEASE, TRACKER, convert, find_iteration  # noqa: E402
from flagscale.sync.hf_config import read_config  # noqa: E402
from flagscale.sync.hf_folder import HfReader, load_config  # noqa: E402
from flagscale.sync.inert import Inert, load_inert, load_inert_pickle  # noqa: E402
from flagscale.sync.megatron_args import NEEDED, read_args, write_args  # noqa: E402
from flagscale.sync.torch_dist import TorchDistReader  # noqa: E402

BYTES = {"vocab_size": 257, "eos_token_id": 256}
TOKENS = torch.arange(1, 20)[None] * 11 % 250


def save(folder: Path, family: str = "llama", **changes: Any) -> Path:
    model = make_model(family, **{**BYTES, **changes})
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    reader = HfReader(folder)
    return {name: reader.load(name) for name in reader.sizes}


@torch.no_grad()
def logits_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="module")
def megatron(llama: Path) -> Path:
    return convert(llama, llama.parent / "megatron", to="megatron")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("mixtral", {"sliding_window": None}),
    ],
)  # fmt: skip
def test_a_model_of_transformers_there_and_back_is_the_same(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: Any
) -> None:
    folder = save(tmp_path / "hf", family, dtype=dtype, **changes)
    back = convert(convert(folder, tmp_path / "megatron", to="megatron"), tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert torch.equal(logits_of(folder), logits_of(back))
    assert read_config(load_config(back), "") == read_config(load_config(folder), "")


def test_the_byte_tokenizer_comes_with_a_model_of_bytes_and_no_other(megatron: Path, tmp_path: Path) -> None:
    back = convert(megatron, tmp_path / "back", max_len=300)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
    assert load_config(back)["max_position_embeddings"] == 300
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 256
    other = convert(save(tmp_path / "other", vocab_size=300, eos_token_id=299), tmp_path / "m", to="megatron")
    bare = convert(other, tmp_path / "bare")
    assert not (bare / "tokenizer.json").exists()
    own = tmp_path / "own"
    own.mkdir()
    write_byte_tokenizer(own, 9)
    given = convert(other, tmp_path / "given", tokenizer=own)
    assert (given / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()


def test_padding_is_left_out_or_kept(megatron: Path, llama: Path, tmp_path: Path) -> None:
    kept = convert(megatron, tmp_path / "kept", keep_padding=True)
    assert load_config(kept)["vocab_size"] == 384
    head = HfReader(kept).load("lm_head.weight")
    assert torch.equal(head[:257], HfReader(llama).load("lm_head.weight"))
    assert not head[257:].any()
    wide = convert(llama, tmp_path / "wide", to="megatron", padded_vocab_size=512)
    assert TorchDistReader(wide / RELEASE).tensors["output_layer.weight"].size == (512, 32)
    with pytest.raises(ConfigError, match="padded_vocab_size: 200 rows do not hold 257 tokens"):
        convert(llama, tmp_path / "narrow", to="megatron", padded_vocab_size=200)


def test_a_large_model_is_written_in_several_files(
    megatron: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 40_000)
    parts = convert(megatron, tmp_path / "parts")
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert torch.equal(logits_of(parts), logits_of(llama))
    monkeypatch.undo()
    again = convert(convert(parts, tmp_path / "m", to="megatron"), tmp_path / "again")
    assert all(torch.equal(tensor, tensors_of(llama)[name]) for name, tensor in tensors_of(again).items())


def test_an_iteration_is_found_by_its_number_or_the_tracker(megatron: Path, tmp_path: Path) -> None:
    assert find_iteration(megatron) == find_iteration(megatron / RELEASE) == megatron / RELEASE
    shutil.copytree(megatron / RELEASE, tmp_path / "iter_0000012")
    (tmp_path / TRACKER).write_text("12")
    assert find_iteration(tmp_path) == find_iteration(tmp_path, 12) == tmp_path / "iter_0000012"
    with pytest.raises(UserError, match=r"iter_0000013: no distributed checkpoint .* there is iter_0000012"):
        find_iteration(tmp_path, 13)
    with pytest.raises(UserError, match=r"no latest_checkpointed_iteration\.txt; expected a folder with checkpoints"):
        find_iteration(tmp_path / "nowhere")


def test_older_checkpoints_keep_their_arguments_in_a_file(megatron: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(megatron / RELEASE, tmp_path / "old")
    args = TorchDistReader(folder).load_common()["args"]
    torch.save({"args": Namespace(**{**vars(args), "norm_epsilon": 0.25})}, folder / "common.pt")
    assert load_config(convert(folder, tmp_path / "hf"))["rms_norm_eps"] == 0.25


def test_what_cannot_be_written_leaves_nothing(megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full: is not empty; expected a folder that does not exist yet"):
        convert(megatron, tmp_path / "full")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        convert(megatron, tmp_path / "new", tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: has no file of a tokenizer"):
        convert(megatron, tmp_path / "new", tokenizer=tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    broken = shutil.copytree(megatron, tmp_path / "broken")
    data = next(broken.glob("*/*.distcp"))
    os.truncate(data, data.stat().st_size - 20_000)
    with pytest.raises(UserError, match="cannot be read"):
        convert(broken, tmp_path / "new")
    data.unlink()
    with pytest.raises(UserError, match="No such file"):
        convert(broken, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


def test_all_that_no_architecture_has_is_told_at_once(llama: Path) -> None:
    shape = read_config(load_config(llama), "")
    args = write_args(shape, torch.float32)
    assert read_args(args, "") == shape
    args.normalization, args.swiglu, args.mtp_num_layers, args.num_layers = "LayerNorm", False, 1, None
    del args.position_embedding_type
    with pytest.raises(ConfigError) as caught:
        read_args(args, "somewhere")
    text = str(caught.value)
    assert "somewhere: args.normalization: 'LayerNorm': no architecture that is known here has this; expected" in text
    assert [fault.path.removeprefix("args.") for fault in caught.value.faults] == [
        "num_layers", "normalization", "swiglu", "position_embedding_type", "mtp_num_layers"
    ]  # fmt: skip
    assert set(NEEDED) <= set(vars(write_args(shape, None)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "`lama` cannot be converted; expected one of llama, .*; did you mean `llama`"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "(?s)2 faults.*hidden_act: 'gelu'.*mlp_bias: True"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: .*yarn.* cannot be converted"),
        ({"num_key_value_heads": 3}, "num_groups: 3 does not divide 4 heads"),
        ({"model_type": "qwen3", "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, "rope_scaling: in a qwen3"),
        ({"model_type": "mixtral", "sliding_window": 9, "num_local_experts": 2}, "sliding_window: 9"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_converted_says_why(llama: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config({**load_config(llama), **changes}, "config.json")


def test_tensors_that_do_not_fit_are_told_at_once(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = tensors_of(llama)
    tensors["model.norm.weigh"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:9].clone()
    shutil.copy(llama / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, tmp_path / "new", to="megatron")
    told = {fault.path: str(fault) for fault in caught.value.faults}
    assert told.keys() == {"model.norm.weight", "model.norm.weigh", "lm_head.weight"}
    assert "is missing" in told["model.norm.weight"]
    assert "did you mean `model.norm.weigh`" in told["model.norm.weight"]
    assert "shape [9, 32]; expected [257, 32]" in told["lm_head.weight"]
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        convert(tmp_path, tmp_path / "new", to="megatron")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        convert(tmp_path, tmp_path / "new", to="megatron")
    assert not (tmp_path / "new").exists()


class Dangerous:
    """What unpickles by running a command."""

    def __init__(self, run: Any, file: Path) -> None:
        self.run, self.file = run, file

    def __reduce__(self) -> Any:
        return (self.run, (f"touch {self.file}",))


def test_what_a_checkpoint_wants_to_run_is_not_run(tmp_path: Path) -> None:
    victim, index, saved = tmp_path / "victim", tmp_path / ".metadata", io.BytesIO()
    index.write_bytes(
        pickle.dumps({"state": Dangerous(os.system, victim), "size": torch.Size([2, 3]), "dtype": torch.bfloat16})
    )
    found = load_inert_pickle(index)
    assert isinstance(found["state"], Inert)
    assert (found["size"], found["dtype"]) == ((2, 3), torch.bfloat16)
    torch.save({"args": Namespace(layers=3), "bad": Dangerous(subprocess.getoutput, victim), "t": torch.ones(2)}, saved)
    common = load_inert(saved.getvalue(), "here")
    assert (common["args"].layers, common["t"].sum()) == (3, 2)
    torch.save(Dangerous(os.system, victim), saved := io.BytesIO())
    for data in (saved.getvalue(), b"nothing"):
        with pytest.raises(UserError, match="here: cannot be read"):
            load_inert(data, "here")
    assert not victim.exists()
    index.write_bytes(b"\x80\x04nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_inert_pickle(index)


def test_the_tool_converts_and_answers_with_one_line(llama: Path, tmp_path: Path) -> None:
    def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, ROOT / "tools" / "checkpoint" / "convert.py", *words]
        return subprocess.run(argv, capture_output=True, text=True)

    done = run("--from", "hf", "--to", "megatron", llama, tmp_path / "m")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/m\n"), done.stderr
    done = run("--from", "megatron", "--to", "hf", "--max-len", "64", tmp_path / "m", tmp_path / "hf")
    assert (done.returncode, load_config(tmp_path / "hf")["max_position_embeddings"]) == (0, 64)
    done = run("--from", "megatron", "--to", "hf", tmp_path / "m", tmp_path / "hf")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/hf: is not empty")
    done = run("--from", "hf", "--to", "hf", llama, tmp_path / "x")
    assert (done.returncode, "--from and --to are both hf" in done.stderr) == (2, True)
    done = run("--from", "hf", "--to", "megatron", "--keep-padding", llama, tmp_path / "x")
    assert (done.returncode, "--keep-padding has no meaning for --to megatron" in done.stderr) == (2, True)
