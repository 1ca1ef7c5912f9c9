#!/usr/bin/env bash
# qwen2_5_7b on host_0_10.0.0.1 of qwen2_5_7b-prefill-1
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-1/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-1/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-1/serve_logs/details || exit 1
export VLLM_HOST_IP=10.0.0.1
export VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_VISIBLE_DEVICES=1
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve Qwen/Qwen2.5-7B-Instruct \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --kv-transfer-config '{"kv_connector": "P2pNcclConnector", "kv_role": "kv_producer", "kv_port": "<next_port: chosen at launch>", "kv_buffer_size": "1e1"}' \
  --served-model-name qwen2.5-7b \
  --max-model-len 16384 \
  --max-num-seqs 256 \
  --gpu-memory-utilization 0.9
