"""Every key of the predecessor's own YAML examples is an argument of the backend, or is known by name to be gone.

The keys were gathered from FlagScale's release of 2025-11, over all examples whose backend is the one named; keys that
its launcher translates or reads itself are not among them.
"""

import pytest

from flagscale.runner.config.catalogue import load_catalogue

KEYS = {
    "megatron": """
        accumulate_allreduce_grads_in_fp32 adam_beta1 adam_beta2 adam_eps add_qkv_bias
        allow_missing_vision_projection_checkpoint apply_layernorm_1p
        apply_sft_dataset_separated_loss_mask_if_existed async_save attention_backend attention_dropout
        attention_softmax_in_fp32 bf16 calculate_per_token_loss ckpt-format ckpt_convert_format
        ckpt_convert_save ckpt_format clip_grad context_parallel_size data_path dataloader_save
        dataloader_type decoder_first_pipeline_num_layers disable_bias_linear disable_vision_class_token
        distributed-timeout-minutes distributed_backend enable_hetero enable_variable_seq_lengths
        end_weight_decay eod_mask_loss eval_interval eval_iters expert_model_parallel_size
        expert_tensor_parallel_size expert_tensor_parallel_size_per_process_mesh extra_vocab_size
        ffn_hidden_size finetune fp16 freeze_LM freeze_ViT global_batch_size group_query_attention
        hetero_current_device_type hetero_device_types hetero_pipeline_layer_split hetero_process_meshes
        hetero_use_cpu_communication hidden_dim_multiplier hidden_dropout hidden_size image_aspect_ratio
        image_grid_pinpoints img_h img_w init_method_std initial_loss_scale interleaved_dataset kv_channels
        kv_lora_rank language_model_type load log_interval log_memory_to_tensorboard log_num_zeros_in_grad
        log_params_norm log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard
        lora_alpha lora_dim lora_dropout lora_dropout_position lora_in_init_method lora_out_init_method
        lora_target_modules lr lr_decay_iters lr_decay_style lr_warmup_fraction lr_warmup_iters
        lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style
        make_vocab_size_divisible_by max_padding_length max_position_embeddings merge_file micro_batch_size
        min_loss_scale min_lr mm_patch_merge_type moe_aux_loss_coeff moe_fb_overlap moe_ffn_hidden_size
        moe_grouped_gemm moe_layer_freq moe_router_bias_update_rate moe_router_enable_expert_bias
        moe_router_group_topk moe_router_load_balancing_type moe_router_num_groups moe_router_score_function
        moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_intermediate_size
        moe_shared_expert_overlap moe_token_dispatcher_type mrope_section mtp_loss_scaling_factor
        mtp_num_layers multi_latent_attention multiple_of no_create_attention_mask_in_dataloader
        no_load_optim no_load_rng no_masked_softmax_fusion no_mmap_bin_files no_position_embedding
        no_rope_fusion no_shared_fs norm_epsilon norm_init_weight normalization num_attention_heads
        num_experts num_layers num_query_groups num_workers optimizer overlap_grad_reduce
        overlap_param_gather patch_dim peft_type pipeline_model_parallel_size position_embedding_type
        pretrained_checkpoint profile profile-step-end profile-step-start profile_ranks prompt-path
        q_lora_rank qk_head_dim qk_layernorm qk_pos_emb_head_dim rampup_batch_size rampup_save_interval
        recompute_granularity recompute_granularity_per_stage_micro_batch recompute_method
        recompute_method_per_stage_micro_batch recompute_num_layers
        recompute_num_layers_per_stage_micro_batch reset_attention_mask reset_position_ids rotary_base
        rotary_percent rotary_seq_len_interpolation_factor save save_interval seed seq_length
        sequence_parallel shuffle-buffer-size special_tokens_file split standalone_embedding_stage
        start_weight_decay swiglu tensor_model_parallel_size tensorboard_dir tensorboard_log_interval
        timing_log_level tokenizer_model tokenizer_path tokenizer_type tp_comm_overlap train_iters
        train_samples training_dataset_only transformer_impl untie-embeddings-and-output-weights
        untie_embeddings_and_output_weights use_dist_ckpt use_distributed_optimizer use_dualpipev
        use_flash_attn use_mcore_models use_partial_reduce_for_shared_embedding use_pytorch_profiler
        use_rotary_position_embeddings use_te v_head_dim valid_path vision_model_type vision_ration
        vision_recompute_layer_steps vision_root vocab_file vocab_size wandb-log-model
        wandb-log-model-interval wandb_exp_name wandb_project weight_decay weight_decay_incr_style
    """,
    "vllm": """
        compilation_config disable_log_stats dtype enable_chunked_prefill enable_prefix_caching
        enforce_eager gpu_memory_utilization host limit-mm-per-prompt limit_mm_per_prompt
        limit_mm_per_prompt.image max-model-len max_model_len max_num_seqs model no_enable_prefix_caching
        pipeline_parallel_size port save seed served_model_name skip_tokenizer_init tensor_parallel_size
        tokenizer trust_remote_code uvicorn_log_level vq_model
    """,
    "sglang": """
        attention-backend page_size quantization tp host port served-model-name tokenizer-path model
    """,
    "llama_cpp": """
        n_gpu_layers threads
    """,
}
GIVEN = [(backend, key) for backend, keys in KEYS.items() for key in keys.split()]


@pytest.mark.parametrize(("backend", "key"), GIVEN)
def test_key_is_known_or_known_to_be_gone(backend: str, key: str) -> None:
    catalogue = load_catalogue(backend)
    assert catalogue.find(key) is not None or catalogue.find_dropped(key) is not None


def test_most_keys_still_work() -> None:
    gone = [key for backend, key in GIVEN if load_catalogue(backend).find(key) is None]
    assert len(gone) < len(GIVEN) / 4


@pytest.mark.parametrize("key", ["multiple_of", "hetero_process_meshes", "lora_dim", "freeze_LM"])
def test_fault_of_a_key_of_the_fork_says_whose_it_was(key: str) -> None:
    fault = load_catalogue("megatron").check(key, 1, f"train.model.{key}")
    assert fault is not None
    assert "FlagScale's" in fault.message
    assert fault.suggestion is None


@pytest.mark.parametrize("name", ["QwenTokenizerFS", "AquilaTokenizerFS", "Llama3TokenizerFS", "HFTokenizerFS"])
def test_tokenizers_of_the_fork_are_named(name: str) -> None:
    fault = load_catalogue("megatron").check("tokenizer_type", name, "train.data.tokenizer.tokenizer_type")
    assert fault is not None
    assert name in fault.message
    assert fault.expected == "`HuggingFaceTokenizer` in its place"
