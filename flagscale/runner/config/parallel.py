"""The arithmetic of Megatron's parallelism: what must divide what, before any process starts.

Every check names the argument at fault and gives both numbers. Rules are those of Megatron-LM's `validate_args` and
`parallel_state.initialize_model_parallel`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flagscale.errors import Fault
from flagscale.runner.config.arguments import GivenArgument


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that a job has: `num_ranks` slots on `num_hosts` hosts."""

    num_ranks: int
    num_hosts: int

    def __str__(self) -> str:
        slots = "slot" if self.num_ranks == 1 else "slots"
        return f"{self.num_ranks} {slots} on {self.num_hosts} host{'' if self.num_hosts == 1 else 's'}"


class _Sizes:
    """Whole numbers among the given arguments, by name; what is not a whole number was reported elsewhere."""

    def __init__(self, given: Mapping[str, GivenArgument]) -> None:
        self._given = given

    def find(self, name: str) -> int | None:
        value = self._given[name].value if name in self._given else None
        if isinstance(value, str) and value.isdecimal() and len(value) < 19:
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def get(self, name: str, default: int) -> int:
        found = self.find(name)
        return default if found is None else found

    def is_set(self, name: str) -> bool:
        return bool(self._given[name].value) if name in self._given else False

    def path(self, name: str, section: str = "train.system") -> str:
        return self._given[name].path if name in self._given else f"{section}.{name}"


def check_parallelism(given: tuple[GivenArgument, ...], world: World) -> list[Fault]:
    """Every impossible combination of the given Megatron arguments on this world."""
    sizes = _Sizes({argument.name: argument for argument in given})
    faults = list(_check_positive(sizes))
    if faults:
        return faults
    faults += _check_world(sizes, world)
    faults += _check_model(sizes)
    faults += _check_batches(sizes, world)
    return faults


def _check_positive(sizes: _Sizes) -> Iterator[Fault]:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "micro_batch_size",
        "global_batch_size",
    ):
        value = sizes.find(name)
        if value is not None and value < 1:
            yield Fault(sizes.path(name), f"is {value}", expected="a whole number above 0")


def _tensor_pipeline_context(sizes: _Sizes) -> tuple[int, int, int]:
    return (
        sizes.get("tensor_model_parallel_size", 1),
        sizes.get("pipeline_model_parallel_size", 1),
        sizes.get("context_parallel_size", 1),
    )


def _check_world(sizes: _Sizes, world: World) -> Iterator[Fault]:
    tensor, pipeline, context = _tensor_pipeline_context(sizes)
    fits = True
    for name, size in (
        ("tensor_model_parallel_size", tensor),
        ("pipeline_model_parallel_size", pipeline),
        ("context_parallel_size", context),
    ):
        if world.num_ranks % size:
            fits = False
            yield Fault(sizes.path(name), f"{size} does not divide {world}")
    product = tensor * pipeline * context
    if fits and world.num_ranks % product:
        text = f"{tensor} × {pipeline} × {context} = {product} (tensor × pipeline × context) does not divide {world}"
        yield Fault(sizes.path("tensor_model_parallel_size"), text)
    expert, expert_tensor = sizes.get("expert_model_parallel_size", 1), sizes.get("expert_tensor_parallel_size", tensor)
    product = expert * expert_tensor * pipeline
    if expert > 1 and world.num_ranks % product:
        text = (
            f"{expert} × {expert_tensor} × {pipeline} = {product} (expert × expert tensor × pipeline) does not divide"
        )
        yield Fault(sizes.path("expert_model_parallel_size"), f"{text} {world}")


def _check_divides(
    sizes: _Sizes, name: str, whole: str, default: int | None = None, section: str = "train.model"
) -> Iterator[Fault]:
    part, total = sizes.get(name, 1), sizes.find(whole)
    total = default if total is None else total
    if total is not None and total % part:
        path = sizes.path(name) if sizes.find(name) is not None else sizes.path(whole, section)
        yield Fault(path, f"{part} does not divide {whole}: {total}")


def _check_model(sizes: _Sizes) -> Iterator[Fault]:
    heads = sizes.find("num_attention_heads")
    if heads and not sizes.find("kv_channels") and not sizes.is_set("multi_latent_attention"):
        yield from _check_divides(sizes, "num_attention_heads", "hidden_size")
    yield from _check_divides(sizes, "tensor_model_parallel_size", "num_attention_heads")
    if sizes.is_set("group_query_attention"):
        yield from _check_query_groups(sizes, heads)
    yield from _check_stages(sizes)
    experts = sizes.find("num_experts")
    if experts:
        yield from _check_divides(sizes, "expert_model_parallel_size", "num_experts")
    elif sizes.get("expert_model_parallel_size", 1) > 1:
        size = sizes.get("expert_model_parallel_size", 1)
        yield Fault(sizes.path("expert_model_parallel_size"), f"is {size}, but the model has no experts (num_experts)")
    if sizes.get("moe_router_topk", 0) > (experts or 10**9):
        topk = sizes.get("moe_router_topk", 0)
        yield Fault(sizes.path("moe_router_topk"), f"{topk} is more than num_experts: {experts}")
    context = sizes.get("context_parallel_size", 1)
    if context > 1:
        sequence = sizes.find("seq_length")
        if sequence and sequence % (2 * context):
            yield Fault(
                sizes.path("seq_length"), f"{sequence} is not a multiple of 2 × context_parallel_size = {2 * context}"
            )
    if sizes.find("train_iters") and sizes.find("train_samples"):
        yield Fault(sizes.path("train_samples"), "cannot stand beside train_iters: give the length of the run once")
    sequence, positions = sizes.find("seq_length"), sizes.find("max_position_embeddings")
    if sequence and positions and sequence > positions:
        yield Fault(sizes.path("seq_length"), f"{sequence} is more than max_position_embeddings: {positions}")


def _check_query_groups(sizes: _Sizes, heads: int | None) -> Iterator[Fault]:
    groups = sizes.find("num_query_groups")
    if groups and heads and heads % groups:
        yield Fault(sizes.path("num_query_groups"), f"{groups} does not divide num_attention_heads: {heads}")
    tensor = sizes.get("tensor_model_parallel_size", 1)
    if groups and groups % tensor and tensor % groups:
        yield Fault(
            sizes.path("num_query_groups"),
            f"{groups} and tensor_model_parallel_size: {tensor}: neither divides the other",
        )


def _check_stages(sizes: _Sizes) -> Iterator[Fault]:
    """Layers against pipeline stages, with an uneven first and last stage where they are given."""
    layers, stages = sizes.find("num_layers"), sizes.get("pipeline_model_parallel_size", 1)
    if not layers or stages == 1 or sizes.is_set("pipeline_model_parallel_layout"):
        return
    layers += sum(
        sizes.is_set(name) for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    )
    middle_layers, middle_stages, uneven = layers, stages, []
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        given = sizes.find(name)
        if given is not None:
            middle_layers, middle_stages = middle_layers - given, middle_stages - 1
            uneven.append(f"{name}: {given}")
    path = sizes.path("pipeline_model_parallel_size")
    left = f" ({', '.join(uneven)} leave {middle_layers} layers for {middle_stages} stages)" if uneven else ""
    if middle_layers < 0 or (middle_layers % middle_stages if middle_stages > 0 else middle_layers):
        yield Fault(path, f"{stages} stages do not divide num_layers: {layers}{left}")
        return
    per_chunk = sizes.find("num_layers_per_virtual_pipeline_stage")
    if per_chunk and not uneven and (layers // stages) % per_chunk:
        text = f"{per_chunk} does not divide the {layers // stages} layers of a pipeline stage"
        yield Fault(sizes.path("num_layers_per_virtual_pipeline_stage"), text)


def _check_batches(sizes: _Sizes, world: World) -> Iterator[Fault]:
    tensor, pipeline, context = _tensor_pipeline_context(sizes)
    micro, whole = sizes.find("micro_batch_size"), sizes.find("global_batch_size")
    product = tensor * pipeline * context
    if world.num_ranks % product or not micro or not whole:
        return
    replicas = world.num_ranks // product
    if whole % (micro * replicas):
        text = f"{whole} is not a multiple of micro_batch_size × data-parallel size = {micro} × {replicas}"
        yield Fault(sizes.path("global_batch_size"), text)
