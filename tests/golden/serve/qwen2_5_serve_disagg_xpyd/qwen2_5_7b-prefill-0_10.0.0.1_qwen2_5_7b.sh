#!/usr/bin/env bash
# qwen2_5_7b on host_0_10.0.0.1 of qwen2_5_7b-prefill-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_disagg_xpyd/serve/qwen2_5_7b-prefill-0/serve_logs/details || exit 1
export VLLM_NIXL_SIDE_CHANNEL_HOST=10.0.0.1
export VLLM_NIXL_SIDE_CHANNEL_PORT='<next_port: chosen at launch>'
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_VISIBLE_DEVICES=0
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve Qwen/Qwen2.5-7B-Instruct \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --served-model-name qwen2.5-7b \
  --max-model-len 16384 \
  --max-num-seqs 256 \
  --gpu-memory-utilization 0.9 \
  --kv-transfer-config '{"kv_role": "kv_both", "kv_connector": "NixlConnector"}'
