"""What a model is, and what each of its tensors is called by Megatron and by transformers.

A table of rows is all there is to an architecture: names on both sides and the operation between them. A new
architecture is a few rows, and nothing else knows names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flagscale.errors import ConfigError, Fault, find_nearest

Family = Literal["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
Join = Literal["same", "qkv", "halves", "vocab"]
"""how the parts on the side of transformers make Megatron's tensor: as it is; queries, keys and values woven group by
group; gate and up one after the other; with rows of zeros at the end"""

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder with rotary positions, RMSNorm and gated SiLU, dense or of experts.

    num_groups: heads of keys and values; padded_vocab_size: rows of the embedding in Megatron
    qkv_bias: queries, keys and values have a bias; renormalises: the weights of the chosen experts add up to one
    rope_scaling: Llama 3.1's factor, with its other constants; end_token: what ends a document, where it is known
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int
    max_len: int
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    renormalises: bool = True
    end_token: int | None = None

    @property
    def family(self) -> Family:
        """The architecture of transformers that computes the same."""
        if self.num_experts:
            return "qwen3_moe" if self.qk_norm else "mixtral"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor.

    megatron: its names below the layer, one for each way to build the layer (Transformer Engine's first)
    hf: the names of its parts; `*` stands for the expert
    axis: which dimension tensor parallelism cuts
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    join: Join = "same"
    axis: int | None = None


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    Row(("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"), ("input_layernorm.weight",)),
    Row(("self_attention.linear_qkv.weight",), tuple(f"{name}.weight" for name in QKV), "qkv", 0),
    Row(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), axis=1),
)
QKV_BIAS = (Row(("self_attention.linear_qkv.bias",), tuple(f"{name}.bias" for name in QKV), "qkv", 0),)
QK_NORM = (
    Row(("self_attention.q_layernorm.weight",), ("self_attn.q_norm.weight",)),
    Row(("self_attention.k_layernorm.weight",), ("self_attn.k_norm.weight",)),
)
DENSE = (
    Row(("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), ("post_attention_layernorm.weight",)),
    Row(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "halves", 0),
    Row(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), axis=1),
)
EXPERT_NORM = Row(
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), ("post_attention_layernorm.weight",)
)
EXPERTS: Mapping[Family, tuple[Row, ...]] = {
    "qwen3_moe": (
        EXPERT_NORM,
        Row(("mlp.router.weight",), ("mlp.gate.weight",)),
        Row(
            ("mlp.experts.experts.linear_fc1.weight",),
            ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
            "halves",
            0,
        ),
        Row(("mlp.experts.experts.linear_fc2.weight",), ("mlp.experts.*.down_proj.weight",), axis=1),
    ),
    "mixtral": (
        EXPERT_NORM,
        Row(("mlp.router.weight",), ("block_sparse_moe.gate.weight",)),
        Row(
            ("mlp.experts.experts.linear_fc1.weight",),
            ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
            "halves",
            0,
        ),
        Row(("mlp.experts.experts.linear_fc2.weight",), ("block_sparse_moe.experts.*.w2.weight",), axis=1),
    ),
}
FIRST = Row(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocab", 0)
LAST = Row(("decoder.final_layernorm.weight",), ("model.norm.weight",))
HEAD = Row(("output_layer.weight",), ("lm_head.weight",), "vocab", 0)


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of one model: a row with its layer and expert filled in, and all shapes.

    layer, expert: where it lies in a tensor that Megatron's checkpoints keep stacked; None: it is not stacked
    hf: (name, shape) of each part
    """

    row: Row
    layer: int | None
    expert: int | None
    hf: tuple[tuple[str, Size], ...]
    size: Size
    """of Megatron's tensor, whole"""


def list_rows(shape: ModelShape) -> tuple[Row, ...]:
    """The kinds of tensors in a layer."""
    rows = (*ATTENTION, *(QKV_BIAS if shape.qkv_bias else ()), *(QK_NORM if shape.qk_norm else ()))
    return rows + (EXPERTS[shape.family] if shape.num_experts else DENSE)


def list_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """Every tensor of a model, in the order of the network."""
    return tuple(_list_rules(shape))


def _list_rules(shape: ModelShape) -> Iterator[Rule]:
    yield _make_rule(shape, FIRST, None, None)
    for layer in range(shape.num_layers):
        for row in list_rows(shape):
            for expert in range(shape.num_experts) if "*" in row.hf[0] else (None,):
                yield _make_rule(shape, row, layer, expert)
    yield _make_rule(shape, LAST, None, None)
    if not shape.tied:
        yield _make_rule(shape, HEAD, None, None)


def _make_rule(shape: ModelShape, row: Row, layer: int | None, expert: int | None) -> Rule:
    prefix = "" if layer is None else f"model.layers.{layer}."
    parts = tuple((prefix + name.replace("*", str(expert)), _size(shape, name)) for name in row.hf)
    rows = shape.padded_vocab_size if row.join == "vocab" else sum(size[0] for _, size in parts)
    return Rule(row, layer, expert, parts, (rows, *parts[0][1][1:]))


def _size(shape: ModelShape, name: str) -> Size:
    """The shape of a part, by the last words of its name."""
    hidden, heads = shape.hidden_size, shape.head_dim
    ffn = shape.expert_ffn_size if "*" in name else shape.ffn_size
    sizes: dict[str, Size] = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (shape.num_heads * heads, hidden),
        "k_proj": (shape.num_groups * heads, hidden),
        "v_proj": (shape.num_groups * heads, hidden),
        "o_proj": (hidden, shape.num_heads * heads),
        "q_norm": (heads,),
        "k_norm": (heads,),
        "gate": (shape.num_experts, hidden),
        **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), (ffn, hidden)),
        **dict.fromkeys(("down_proj", "w2"), (hidden, ffn)),
    }
    *_, owner, kind = name.split(".")
    size = sizes.get(owner, (hidden,))
    return size[:1] if kind == "bias" else size


def check_names(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str, ignored: Sequence[str] = ()
) -> None:
    """
    Raises:
        ConfigError: tensors are missing, unknown or of another shape; all of them at once.
    """
    faults = []
    for name, size in expected.items():
        if name not in found:
            faults.append(Fault(name, "is missing", f"a tensor of shape {list(size)}", find_nearest(name, found)))
        elif tuple(found[name]) != tuple(size):
            faults.append(Fault(name, f"shape {list(found[name])}", f"{list(size)}"))
    for name in found:
        if name not in expected and not name.endswith(tuple(ignored)):
            faults.append(Fault(name, "is no tensor of this architecture", None, find_nearest(name, expected)))
    if faults:
        raise ConfigError([fault.at(where) for fault in faults])
