#!/usr/bin/env bash
# kimi_k2 on host_0_node-0 of kimi_k2-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/kimi_k2/serve/kimi_k2-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/kimi_k2/serve/kimi_k2-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/kimi_k2/serve/kimi_k2-0/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export RAY_ADDRESS=node-0:6379
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve moonshotai/Kimi-K2-Instruct \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --served-model-name kimi-k2 \
  --tensor-parallel-size 8 \
  --pipeline-parallel-size 4 \
  --gpu-memory-utilization 0.9 \
  --max-model-len 32768 \
  --max-num-seqs 128 \
  --trust-remote-code \
  --enable-auto-tool-choice \
  --tool-call-parser kimi_k2 \
  --distributed-executor-backend ray
