#!/usr/bin/env bash
# qwen3_8b on host_0_localhost of qwen3_8b-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen3_8b_serve/serve/qwen3_8b-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen3_8b_serve/serve/qwen3_8b-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen3_8b_serve/serve/qwen3_8b-0/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUDA_VISIBLE_DEVICES=0,1
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve Qwen/Qwen3-8B \
  --host 127.0.0.1 \
  --port '<master_port: chosen at launch>' \
  --served-model-name qwen3-8b \
  --tensor-parallel-size 2 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --gpu-memory-utilization 0.9 \
  --reasoning-parser qwen3 \
  --enable-auto-tool-choice \
  --tool-call-parser hermes
