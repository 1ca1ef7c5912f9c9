#!/usr/bin/env bash
# ray on host_1_node-1 of kimi_k2-0
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
exec ray start \
  --block \
  --disable-usage-stats \
  --address node-0:6379 \
  --num-gpus 8
