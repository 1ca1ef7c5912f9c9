#!/usr/bin/env bash
# deepseek_r1 on host_0_node-0 of deepseek_r1-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/deepseek_r1/serve/deepseek_r1-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/deepseek_r1/serve/deepseek_r1-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/deepseek_r1/serve/deepseek_r1-0/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export RAY_ADDRESS=node-0:6379
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve deepseek-ai/DeepSeek-R1 \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --served-model-name deepseek-r1 \
  --tensor-parallel-size 8 \
  --pipeline-parallel-size 4 \
  --gpu-memory-utilization 0.9 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --trust-remote-code \
  --enable-chunked-prefill \
  --reasoning-parser deepseek_r1 \
  --distributed-executor-backend ray
