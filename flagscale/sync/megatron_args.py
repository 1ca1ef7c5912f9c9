"""A model's dimensions in the arguments that Megatron keeps in its checkpoints.

Megatron has hundreds of arguments, of which most say nothing about the network and some make it another one. Those that
do and that no architecture here has are listed with the value that they must have, and are told all at once.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from flagscale.errors import ConfigError, Fault
from flagscale.sync.canon import ModelShape
from flagscale.train.token_files import END_OF_DOCUMENT, VOCAB_SIZE

NEEDED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
}
"""what must be there, and be one of these"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,), "rotary_interleaved": (False,), "rotary_seq_len_interpolation_factor": (None,),
    "apply_residual_connection_post_layernorm": (False,), "apply_layernorm_1p": (False,), "window_size": (None,),
    "multi_latent_attention": (False,), "mtp_num_layers": (None, 0), "attention_output_gate": (False,),
    "softmax_type": ("vanilla",), "qk_l2_norm": (False,), "no_rope_freq": (None,), "group_norm": (None,),
    "experimental_attention_variant": (None,), "hybrid_layer_pattern": (None,), "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,), "spec": (None,), "squared_relu": (False,), "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,), "moe_layer_freq": (1, [1]), "moe_router_num_groups": (None,),
    "moe_shared_expert_intermediate_size": (None,), "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,), "moe_router_topk_scaling_factor": (None,), "moe_latent_size": (None,),
}  # fmt: skip
"""what must be one of these where it is there"""


def read_args(args: Any, where: str) -> ModelShape:
    """The model that a run with these arguments has trained.

    Raises:
        ConfigError: no architecture of transformers that is known here computes the same.
    """
    if faults := list(_find_faults(args)):
        raise ConfigError([fault.at(where) for fault in faults])
    heads, num_experts = args.num_attention_heads, getattr(args, "num_experts", None) or 0
    padded = getattr(args, "padded_vocab_size", None) or args.vocab_size
    vocab = getattr(args, "vocab_size", None) or padded
    shape = ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_size=args.ffn_hidden_size,
        num_heads=heads,
        num_groups=args.num_query_groups if getattr(args, "group_query_attention", False) else heads,
        head_dim=getattr(args, "kv_channels", None) or args.hidden_size // heads,
        vocab_size=vocab,
        padded_vocab_size=padded,
        max_len=args.max_position_embeddings,
        tied=not args.untie_embeddings_and_output_weights,
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        norm_eps=getattr(args, "norm_epsilon", 1e-5),
        rope_base=float(getattr(args, "rotary_base", 10000)),
        rope_scaling=args.rope_scaling_factor if getattr(args, "use_rope_scaling", False) else None,
        num_experts=num_experts,
        experts_per_token=args.moe_router_topk if num_experts else 0,
        expert_ffn_size=(getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size) if num_experts else 0,
        renormalises=not getattr(args, "moe_router_pre_softmax", False),
        end_token=find_end_token(args, vocab),
    )
    check_shape(shape, where)
    return shape


def _find_faults(args: Any) -> Iterator[Fault]:
    dimensions = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings",
        "untie_embeddings_and_output_weights",
    )  # fmt: skip
    for name in dimensions:
        if getattr(args, name, None) is None:
            yield Fault(f"args.{name}", "is missing", "an argument of every model of Megatron")
    if getattr(args, "padded_vocab_size", None) is None and getattr(args, "vocab_size", None) is None:
        yield Fault("args.padded_vocab_size", "is missing", "the number of rows of the embedding")
    for name, values in NEEDED.items():
        if getattr(args, name, None) not in values:
            yield _fault(args, name, values)
    for name, values in NEUTRAL.items():
        if hasattr(args, name) and getattr(args, name) not in values:
            yield _fault(args, name, values)


def _fault(args: Any, name: str, values: tuple[Any, ...]) -> Fault:
    message = f"{getattr(args, name, None)!r}: no architecture that is known here has this"
    return Fault(f"args.{name}", message, " or ".join(map(repr, values)))


def check_shape(shape: ModelShape, where: str) -> None:
    """
    Raises:
        ConfigError: the parts exist, but nothing here puts them together so.
    """
    faults = []
    if shape.qkv_bias and (shape.qk_norm or shape.num_experts):
        faults.append(
            Fault("qkv_bias", "with norms of queries and keys, or with experts", "a dense model without them")
        )
    if shape.family == "mixtral" and not shape.renormalises:
        faults.append(Fault("renormalises", "Mixtral's experts have weights that add up to one"))
    if shape.family == "qwen2" and shape.head_dim * shape.num_heads != shape.hidden_size:
        faults.append(
            Fault("head_dim", f"{shape.head_dim}", f"{shape.hidden_size} / {shape.num_heads}, as Qwen2 has it")
        )
    if shape.rope_scaling is not None and shape.family != "llama":
        faults.append(Fault("rope_scaling", f"in a {shape.family}", "none, or a Llama"))
    if shape.num_heads % shape.num_groups:
        faults.append(Fault("num_groups", f"{shape.num_groups} does not divide {shape.num_heads} heads"))
    if faults:
        raise ConfigError([fault.at(where) for fault in faults])


def find_end_token(args: Any, vocab_size: int) -> int | None:
    """What ends a document for Megatron's tokenizer without a vocabulary; other tokenizers say it themselves."""
    if getattr(args, "tokenizer_type", None) != "NullTokenizer":
        return None
    told = getattr(args, "null_tokenizer_eod_id", None)
    return vocab_size - 1 if told is None else int(told)


def is_byte_model(shape: ModelShape) -> bool:
    """Whether its tokens can only be those of `flagscale.train.token_files`: the bytes and the end of a document."""
    can_be_bytes = shape.vocab_size == VOCAB_SIZE or VOCAB_SIZE < shape.vocab_size == shape.padded_vocab_size < 1024
    return can_be_bytes and shape.end_token == END_OF_DOCUMENT


def write_args(shape: ModelShape, dtype: Any) -> Namespace:
    """The arguments of a run that goes on with this model, as far as the model decides them."""
    experts = shape.num_experts or None
    return Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_groups != shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.head_dim,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size,
        max_position_embeddings=shape.max_len,
        seq_length=shape.max_len,
        untie_embeddings_and_output_weights=not shape.tied,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        norm_epsilon=shape.norm_eps,
        rotary_base=int(shape.rope_base),
        rotary_percent=1.0,
        use_rope_scaling=shape.rope_scaling is not None,
        rope_scaling_factor=shape.rope_scaling or 8.0,
        num_experts=experts,
        moe_router_topk=shape.experts_per_token or 2,
        moe_ffn_hidden_size=shape.expert_ffn_size or None,
        moe_router_pre_softmax=not shape.renormalises,
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        add_position_embedding=False,
        add_bias_linear=False,
        tokenizer_type="NullTokenizer" if is_byte_model(shape) else "HuggingFaceTokenizer",
        null_tokenizer_eod_id=shape.end_token if is_byte_model(shape) else None,
        params_dtype=dtype,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
