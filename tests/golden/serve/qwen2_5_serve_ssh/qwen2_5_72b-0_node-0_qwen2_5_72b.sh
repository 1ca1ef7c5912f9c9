#!/usr/bin/env bash
# qwen2_5_72b on host_0_node-0 of qwen2_5_72b-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_72b_serve/serve/qwen2_5_72b-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_72b_serve/serve/qwen2_5_72b-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_72b_serve/serve/qwen2_5_72b-0/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export GLOO_SOCKET_IFNAME=bond0
export NCCL_SOCKET_IFNAME=bond0
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export RAY_ADDRESS=node-0:6379
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec vllm serve Qwen/Qwen2.5-72B-Instruct \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --served-model-name qwen2.5-72b \
  --tensor-parallel-size 8 \
  --pipeline-parallel-size 2 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --gpu-memory-utilization 0.9 \
  --distributed-executor-backend ray
