#!/usr/bin/env bash
# qwen2_5_7b on host_0_localhost of qwen2_5_7b-1
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_x4_serve/serve/qwen2_5_7b-1/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_x4_serve/serve/qwen2_5_7b-1/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b_x4_serve/serve/qwen2_5_7b-1/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_VISIBLE_DEVICES=2,3
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve Qwen/Qwen2.5-7B-Instruct \
  --host 127.0.0.1 \
  --port '<master_port: chosen at launch>' \
  --served-model-name qwen2.5-7b \
  --tensor-parallel-size 2 \
  --max-model-len 16384 \
  --max-num-seqs 256 \
  --gpu-memory-utilization 0.9
