"""What must divide what: every fault gives both numbers and the argument's own path."""

from typing import Any

import pytest
from factories import changed, load, train_tree

from flagscale.errors import ConfigError

SYSTEM, MODEL = "train.system.", "train.model."


def faults_of(ranks: int = 8, **sizes: Any) -> dict[str, str]:
    tree = train_tree(experiment__runner__nproc_per_node=ranks)
    del tree["train"]["system"]["tensor_model_parallel_size"]
    system = ("parallel_size", "layout", "virtual", "sequence_parallel")
    paths = {(SYSTEM if any(mark in name for mark in system) else MODEL) + name: size for name, size in sizes.items()}
    try:
        load(changed(tree, paths))
    except ConfigError as error:
        found: dict[str, str] = {}
        for fault in error.faults:
            name = fault.path.rpartition(".")[2]
            found[name] = found[name] + "\n" + fault.message if name in found else fault.message
        return found
    return {}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 4},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
        {"num_experts": 8, "expert_model_parallel_size": 4, "moe_router_topk": 2},
        {"pipeline_model_parallel_size": 2, "num_layers": 5, "decoder_first_pipeline_num_layers": 2},
        {"pipeline_model_parallel_size": 4, "num_layers": 8, "num_layers_per_virtual_pipeline_stage": 1},
        {"pipeline_model_parallel_size": 2, "num_layers": 5, "pipeline_model_parallel_layout": "E|t*3,t*2,L"},
        {"group_query_attention": True, "num_query_groups": 2, "tensor_model_parallel_size": 2},
        {"num_attention_heads": 6, "hidden_size": 100, "kv_channels": 16},
    ],
)
def test_sizes_that_fit(sizes: dict[str, Any]) -> None:
    assert faults_of(global_batch_size=256, **sizes) == {}


@pytest.mark.parametrize(
    ("sizes", "name", "says"),
    [
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size", "3 does not divide 8 slots on 1 host"),
        ({"pipeline_model_parallel_size": 16}, "pipeline_model_parallel_size", "16 does not divide 8 slots on 1 host"),
        ({"context_parallel_size": 5}, "context_parallel_size", "5 does not divide 8 slots on 1 host"),
        ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4}, "tensor_model_parallel_size",
         "4 × 4 × 1 = 16 (tensor × pipeline × context) does not divide 8 slots on 1 host"),
        ({"num_experts": 16, "expert_model_parallel_size": 16}, "expert_model_parallel_size",
         "16 × 1 × 1 = 16 (expert × expert tensor × pipeline) does not divide 8 slots on 1 host"),
        ({"num_experts": 6, "expert_model_parallel_size": 4}, "expert_model_parallel_size",
         "4 does not divide num_experts: 6"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size",
         "is 2, but the model has no experts (num_experts)"),
        ({"num_experts": 2, "moe_router_topk": 4}, "moe_router_topk", "4 is more than num_experts: 2"),
        ({"num_attention_heads": 5}, "num_attention_heads", "5 does not divide hidden_size: 64"),
        ({"tensor_model_parallel_size": 8}, "tensor_model_parallel_size",
         "8 does not divide num_attention_heads: 4"),
        ({"group_query_attention": True, "num_query_groups": 3}, "num_query_groups",
         "3 does not divide num_attention_heads: 4"),
        ({"pipeline_model_parallel_size": 8}, "pipeline_model_parallel_size", "8 stages do not divide num_layers: 4"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
         "num_layers_per_virtual_pipeline_stage", "3 does not divide the 2 layers of a pipeline stage"),
        ({"context_parallel_size": 2, "seq_length": 126}, "seq_length",
         "126 is not a multiple of 2 × context_parallel_size = 4"),
        ({"seq_length": 256}, "seq_length", "256 is more than max_position_embeddings: 128"),
        ({"global_batch_size": 12}, "global_batch_size",
         "12 is not a multiple of micro_batch_size × data-parallel size = 2 × 8"),
        ({"train_samples": 100}, "train_samples", "cannot stand beside train_iters: give the length of the run once"),
        ({"num_layers": 0}, "num_layers", "is 0"),
        ({"micro_batch_size": -1}, "micro_batch_size", "is -1"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size", "is 0"),
    ],
)  # fmt: skip
def test_sizes_that_do_not(sizes: dict[str, Any], name: str, says: str) -> None:
    batch = {} if "global_batch_size" in sizes else {"global_batch_size": 16 * 16}
    assert says in faults_of(**{**batch, **sizes})[name].split("\n")


def test_uneven_stages_are_counted_as_they_are_given() -> None:
    found = faults_of(
        pipeline_model_parallel_size=4, num_layers=9, decoder_first_pipeline_num_layers=2,
        decoder_last_pipeline_num_layers=2, global_batch_size=16,
    )  # fmt: skip
    assert found["pipeline_model_parallel_size"] == (
        "4 stages do not divide num_layers: 9 (decoder_first_pipeline_num_layers: 2, "
        "decoder_last_pipeline_num_layers: 2 leave 5 layers for 2 stages)"
    )


def test_a_batch_is_checked_even_where_no_length_is_given_twice() -> None:
    tree = train_tree(train__model__train_samples=5)
    del tree["train"]["model"]["global_batch_size"]
    with pytest.raises(ConfigError, match="cannot stand beside train_iters"):
        load(tree)


def test_hosts_and_slots_are_in_the_message() -> None:
    with pytest.raises(ConfigError, match="2 does not divide 1 slot on 1 host"):
        load(train_tree(experiment__runner={"nproc_per_node": 1}))


def test_what_is_no_whole_number_is_left_to_the_catalogue() -> None:
    assert "is not right for" in faults_of(tensor_model_parallel_size="many")["tensor_model_parallel_size"]
    assert faults_of(tensor_model_parallel_size="2", global_batch_size=256) == {}
