"""The arithmetic of parallel sizes agrees with an independent one."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.runner.config.arguments import GivenArgument
from flagscale.runner.config.parallel import World, check_parallelism

quick = settings(max_examples=200, deadline=None)
sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 16])


def given_of(**values: Any) -> tuple[GivenArgument, ...]:
    return tuple(GivenArgument(name, value, f"train.system.{name}") for name, value in values.items())


@quick
@given(ranks=st.integers(1, 64), tensor=sizes, pipeline=sizes, context=sizes)
def test_a_grid_fits_where_its_product_divides_the_ranks(ranks: int, tensor: int, pipeline: int, context: int) -> None:
    given = given_of(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    assert (check_parallelism(given, World(ranks, 1)) == []) == (ranks % (tensor * pipeline * context) == 0)


@quick
@given(tensor=sizes, data=sizes, micro=st.integers(1, 8), whole=st.integers(1, 200))
def test_a_batch_fits_where_steps_come_out_even(tensor: int, data: int, micro: int, whole: int) -> None:
    given = given_of(tensor_model_parallel_size=tensor, micro_batch_size=micro, global_batch_size=whole)
    assert (check_parallelism(given, World(tensor * data, 1)) == []) == (whole % (micro * data) == 0)


@quick
@given(stages=sizes, layers=st.integers(1, 64), first=st.none() | st.integers(1, 8), last=st.none() | st.integers(1, 8))
def test_stages_fit_where_the_layers_can_be_dealt(
    stages: int, layers: int, first: int | None, last: int | None
) -> None:
    uneven = {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    given = given_of(
        pipeline_model_parallel_size=stages, num_layers=layers, **{k: v for k, v in uneven.items() if v is not None}
    )
    middle_layers = layers - (first or 0) - (last or 0)
    middle_stages = stages - (first is not None) - (last is not None)
    fits = stages == 1 or (
        middle_layers >= 0 and (middle_layers % middle_stages == 0 if middle_stages > 0 else middle_layers == 0)
    )
    assert (check_parallelism(given, World(stages, 1)) == []) == fits


values = st.one_of(st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=4),
                   st.just("9" * 5000), st.lists(st.integers(), max_size=2))  # fmt: skip
NAMES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "num_layers"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts", "moe_router_topk", "hidden_size"),
    *("num_attention_heads", "num_query_groups", "group_query_attention", "seq_length", "max_position_embeddings"),
    *("micro_batch_size", "global_batch_size", "train_iters", "train_samples", "num_layers_per_virtual_pipeline_stage"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "kv_channels"),
)


@quick
@given(st.dictionaries(st.sampled_from(NAMES), values), st.integers(1, 9))
def test_whatever_is_given_comes_back_as_faults(arguments: dict[str, Any], ranks: int) -> None:
    for fault in check_parallelism(given_of(**arguments), World(ranks, 1)):
        assert fault.message
        assert fault.path.startswith("train.")
