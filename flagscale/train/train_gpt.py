"""Pretrain a GPT with Megatron: its arguments, its model builder, its data sets, its loop; only the joints are here.

Which model it is follows from the arguments alone, as Megatron's own helpers read them: dense, mixture of experts,
multi-latent attention, multi-token prediction, Transformer Engine or plain torch layers. What is not here
(fine-tuning on packed conversations, images, reinforcement learning) is refused rather than half done.

A job of this entry point saves to and loads from one folder, so starting it again with the same arguments resumes:
no checkpoint there means iteration 0.
"""

import sys
from functools import partial
from typing import Any

from flagscale.errors import FlagScaleError, UserError
from flagscale.train.backend import (
    check_transformer_config,
    chip_of_this_job,
    parse_arguments,
    start_megatron,
    validate_arguments,
)
from flagscale.train.fused_kernels import check_kernels
from flagscale.train.readiness import announce_rank_up
from flagscale.train.token_files import check_data_paths

REFUSED = ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking", "perform_rl_step")
"""Switches of Megatron that ask for another entry point than this one."""

BATCH = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
DATASET_ARGUMENTS = (
    "allow_ambiguous_pad_tokens", "eod_mask_loss", "full_validation", "mid_level_dataset_surplus", "mmap_bin_files",
    "multiple_validation_sets", "num_dataset_builder_threads", "object_storage_cache_path", "reset_attention_mask",
    "reset_position_ids", "split",
)  # fmt: skip
"""Fields of Megatron's data set configuration that are called like the arguments they are set by."""

SPIKE_FACTOR = 10
"""With --check-for-spiky-loss: a loss this many times the largest seen is reported."""


def check_scope(args: Any) -> None:
    """Refuse what this entry point cannot do, and data that is not there, before anything is built.

    Raises:
        UserError: names the argument.
    """
    for name in REFUSED:
        if getattr(args, name, False):
            raise UserError(f"train_gpt.py pretrains on plain token sequences: it has no --{name.replace('_', '-')}")
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        check_data_paths(getattr(args, name, None) or [])


def needs_data(vp_stage: int | None) -> bool:
    """Whether this rank's stage looks at tokens or labels: the first and the last do, and one that predicts ahead."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return bool(is_first_or_last_pipeline_stage(vp_stage)) or _predicts_ahead(get_args(), mtp_on_this_rank, vp_stage)


def _predicts_ahead(args: Any, mtp_on_this_rank: Any, vp_stage: int | None) -> bool:
    if args.mtp_num_layers is None:
        return False
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    layout = layout if hasattr(layout, "layout") else None
    return bool(mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage))


def take_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """The next batch of this rank: read by the first rank of a tensor-parallel group, told to the others, then cut for
    context parallelism. Shapes: (micro batch, sequence); a stage between first and last gets None for everything."""
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    if not needs_data(vp_stage):
        return dict.fromkeys(BATCH)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        read = next(data_iterator)
        device = chip_of_this_job().device
        batch = {key: read[key].to(device, non_blocking=True) if key in read else None for key in BATCH}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_ahead(args, mtp_on_this_rank, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
    )
    cut: dict[str, Any] = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return cut


def _check_loss(loss: Any, args: Any) -> None:
    """Let Megatron's rerun machine look at the loss of this rank, before it is mixed with that of others."""
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_bad, what in ((torch.isnan, "not a number"), (torch.isinf, "infinite")):
            machine.validate_result(
                result=loss, rejection_func=is_bad, message=f"the loss is {what}", tolerance=0.0, fatal=True
            )
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss")
        machine.validate_result(
            result=loss, rejection_func=is_spike, message="the loss jumped", tolerance=0.0, fatal=False
        )


def sum_loss(loss_mask: Any, token_losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(sum of the losses of the tokens that count, how many count, both for the log); shapes: (batch, sequence)."""
    import torch
    from megatron.training import get_args

    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(token_losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _check_loss(loss, get_args())
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """One micro batch forward: (what the stage puts out, the function that makes the loss of it)."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = take_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(sum_loss, batch["loss_mask"])


def make_dataset_config(args: Any) -> Any:
    """Megatron's description of the data sets that the arguments ask for."""
    import json
    from pathlib import Path

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        **{name: getattr(args, name) for name in DATASET_ARGUMENTS},
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(counts).read_text()) if counts else None,
    )


def provide_datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> Any:
    """The training, validation and test sets, built on the ranks that read them; num_samples: wanted of each."""
    from megatron.core import parallel_state as mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    args = get_args()

    def reads_data() -> bool:
        return needs_data(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads_data, make_dataset_config(args)).build()


def announce_built(model: list[Any]) -> list[Any]:
    """Called by Megatron's builder with the finished model: the process group is up and the arguments were right."""
    announce_rank_up()
    return model


def train(argv: list[str]) -> None:
    """Read the arguments, then hand over to Megatron's loop.

    Raises:
        FlagScaleError: what cannot be started, in one sentence.
    """
    start_megatron()
    args = parse_arguments(argv)
    check_scope(args)
    if args.use_checkpoint_args:
        _take_arguments_of_checkpoint(args)
    check_kernels(args)
    validate_arguments(args)
    check_transformer_config(args)

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    set_global_variables(args)
    model = gpt_config_from_args(args)
    model.post_wrap_hooks.append(announce_built)
    provide: Any = provide_datasets
    provide.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        provide,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    _leave_process_group()


def _take_arguments_of_checkpoint(args: Any) -> None:
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.load is None and args.pretrained_checkpoint is None:
        raise UserError(
            "--use-checkpoint-args needs --load or --pretrained-checkpoint: the checkpoint to take them from"
        )
    load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
    load_args_from_checkpoint(args)


def _leave_process_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> int:
    """The script: 0, or the exit code of what was wrong, said in one line on standard error."""
    try:
        train(sys.argv[1:])
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
