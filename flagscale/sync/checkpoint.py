"""Converting checkpoints between Megatron and transformers: everything is checked first, then written whole or not.

    convert("outputs/tiny/checkpoints", "models/tiny")          # to transformers
    convert("models/tiny", "checkpoints/tiny", to="megatron")   # and back

What the source is, is seen from its files. Tensors go through one at a time on the way to transformers; on the way back
all are held, as torch writes them at once.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flagscale.errors import UserError
from flagscale.sync.canon import ModelShape, Rule, Size, check_names, list_rows, list_rules
from flagscale.sync.hf_config import read_config, write_config
from flagscale.sync.hf_folder import HfReader, copy_tokenizer, load_config, write_json, write_tensors
from flagscale.sync.layout import to_hf, to_megatron
from flagscale.sync.megatron_args import is_byte_model, read_args, write_args
from flagscale.sync.torch_dist import TorchDistReader, write_torch_dist

Format = Literal["hf", "megatron"]
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint that has weights alone and stands at no iteration"""

STATELESS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""layers whose extra state Megatron looks for in a checkpoint"""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Format = "hf",
    tokenizer: str | Path | None = None,
    iteration: int | None = None,
    keep_padding: bool = False,
    max_len: int | None = None,
    padded_vocab_size: int | None = None,
    transformer_impl: Literal["local", "transformer_engine"] = "local",
) -> Path:
    """Write the model in `src` into the new folder `dst` in the other format, and return `dst`.

    src: of Megatron, the folder of a run's checkpoints or of one iteration; of transformers, a model's folder
    tokenizer: folder with the tokenizer for `dst`; None: for transformers the byte tokenizer, where the model can only
        have been trained with it, and none else
    iteration: of Megatron's checkpoints; None: the latest
    keep_padding: keep the rows of the embedding that belong to no token, so that nothing at all is lost
    max_len: tokens of one text for transformers; None: those of the training. Rotary positions have no limit of their
        own, but a model is worse beyond what it was trained on
    padded_vocab_size: rows of the embedding in Megatron; None: the next multiple of 128
    transformer_impl: the layers for which Megatron's tensors are named

    Raises:
        UserError: a folder is not what it should be, or no architecture fits; nothing was written.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is not empty; expected a folder that does not exist yet")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise UserError(f"{tokenizer}: no such folder; expected one with a tokenizer of transformers")
    if to == "hf":
        write = _plan_hf(src, None if tokenizer is None else Path(tokenizer), iteration, keep_padding, max_len)
    else:
        write = _plan_megatron(src, padded_vocab_size, transformer_impl)
    write_whole(dst, write)
    return dst


def write_whole(dst: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that becomes `dst` once it is whole; a failure leaves nothing."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        write(part)
        part.chmod(0o755)
        part.rename(dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _plan_hf(
    src: Path, tokenizer: Path | None, iteration: int | None, keep_padding: bool, max_len: int | None
) -> Callable[[Path], None]:
    reader = DistCheckpoint(find_iteration(src, iteration))
    shape = reader.read_shape()
    if keep_padding:
        shape = replace(shape, vocab_size=shape.padded_vocab_size)
    if max_len is not None:
        shape = replace(shape, max_len=max_len)
    rules = list_rules(shape)

    def tensors() -> Iterator[tuple[str, Any]]:
        for rule in rules:
            parts = to_hf(rule, shape, reader.load_rule(rule))
            yield from zip((name for name, _ in rule.hf), parts, strict=True)

    def write(folder: Path) -> None:
        write_tensors(folder, tensors())
        write_json(folder / "config.json", write_config(shape, str(reader.dtype).removeprefix("torch.")))
        write_json(folder / "generation_config.json", {"eos_token_id": shape.end_token, "do_sample": True})
        _write_tokenizer(folder, shape, tokenizer)

    return write


def _write_tokenizer(folder: Path, shape: ModelShape, tokenizer: Path | None) -> None:
    from flagscale.inference.byte_tokenizer import write_byte_tokenizer

    if tokenizer is not None:
        if not copy_tokenizer(tokenizer, folder):
            raise UserError(f"{tokenizer}: has no file of a tokenizer; expected tokenizer.json or tokenizer.model")
    elif is_byte_model(shape):
        write_byte_tokenizer(folder, shape.max_len)


def _plan_megatron(src: Path, padded_vocab_size: int | None, impl: str) -> Callable[[Path], None]:
    shape = read_config(load_config(src), str(src / "config.json"), padded_vocab_size)
    reader = HfReader(src)
    rules = list_rules(shape)
    ignored = ("rotary_emb.inv_freq", *(("lm_head.weight",) if shape.tied else ()))
    check_names({name: size for rule in rules for name, size in rule.hf}, reader.sizes, str(src), ignored)
    names = {rule.row: _stacked(rule, impl) for rule in rules}

    def write(folder: Path) -> None:
        import torch

        content: dict[str, Any] = {}
        for rule in rules:
            whole = to_megatron(rule, shape, [reader.load(name) for name, _ in rule.hf])
            lead = _lead(rule, shape)
            target = content.get(names[rule.row])
            if target is None:
                target = content[names[rule.row]] = torch.empty((*lead, *rule.size), dtype=whole.dtype)
            target[tuple(i for i in (rule.layer, rule.expert) if i is not None)] = whole
        common = {
            "args": write_args(shape, content[names[rules[0].row]].dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {},
        }
        write_torch_dist(folder / RELEASE, content.items(), _list_states(shape), common)
        (folder / TRACKER).write_text(RELEASE, encoding="utf-8")

    return write


def _lead(rule: Rule, shape: ModelShape) -> Size:
    """The dimensions by which Megatron stacks a tensor."""
    return (
        *(() if rule.layer is None else (shape.num_layers,)),
        *(() if rule.expert is None else (shape.num_experts,)),
    )


def _stacked(rule: Rule, impl: str) -> str:
    """A tensor's name in a distributed checkpoint, where norms are named as if they were fused, except before experts
    of Transformer Engine."""
    if rule.layer is None:
        return rule.row.megatron[0]
    is_expert_norm = rule.row.megatron[0] == "pre_mlp_layernorm.weight"
    return f"decoder.layers.{rule.row.megatron[1 if is_expert_norm and impl == 'local' else 0]}"


def _list_states(shape: ModelShape) -> Iterator[str]:
    """The extra states of all layers and experts, by their places in what Megatron stacks."""
    for row in list_rows(shape):
        owner, _, kind = row.megatron[0].rpartition(".")
        if kind == "weight" and owner.rpartition(".")[2] in STATELESS:
            sizes = (shape.num_layers, shape.num_experts) if "*" in row.hf[0] else (shape.num_layers,)
            of = ".".join(map(str, sizes))
            for place in itertools.product(*map(range, sizes)):
                yield f"decoder.layers.{owner}._extra_state/shard_{'.'.join(map(str, place))}_{of}"


class DistCheckpoint:
    """One iteration of a distributed checkpoint, by the rules of its architecture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = TorchDistReader(folder)
        self._names: Mapping[Any, str] = {}

    def read_shape(self) -> ModelShape:
        """
        Raises:
            ConfigError: the architecture is not known, or the tensors are not what the arguments say.
        """
        args = self._reader.load_common().get("args")
        shape = read_args(args, f"{self.folder}: args")
        found = {name: stored.size for name, stored in self._reader.tensors.items()}
        names, expected = {}, {}
        for rule in list_rules(shape):
            prefix = "" if rule.layer is None else "decoder.layers."
            known = [prefix + name for name in rule.row.megatron]
            names[rule.row] = next((name for name in known if name in found), known[0])
            expected[names[rule.row]] = (*_lead(rule, shape), *rule.size)
        check_names(expected, found, str(self.folder), ("_extra_state",))
        self._names = names
        return shape

    @property
    def dtype(self) -> Any:
        return self._reader.tensors["embedding.word_embeddings.weight"].dtype

    def load_rule(self, rule: Rule) -> Any:
        index = tuple(i for i in (rule.layer, rule.expert) if i is not None)
        return self._reader.load(self._names[rule.row], index)


def find_iteration(src: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration, `src` itself or one below it.

    Raises:
        UserError: there is no such checkpoint.
    """
    if (src / ".metadata").is_file():
        return src
    if iteration is None:
        try:
            told = (src / TRACKER).read_text(encoding="utf-8").strip()
        except OSError:
            raise UserError(f"{src}: no {TRACKER}; expected a folder with checkpoints of Megatron") from None
        name = told if told == RELEASE else f"iter_{told:0>7}"
    else:
        name = f"iter_{iteration:07}"
    folder = src / name
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder}: no distributed checkpoint of Megatron (torch_dist) is there{_others(src)}")
    return folder


def _others(src: Path) -> str:
    found: Sequence[str] = sorted(path.parent.name for path in src.glob("*/.metadata"))
    return f"; there is {', '.join(found)}" if found else ""
