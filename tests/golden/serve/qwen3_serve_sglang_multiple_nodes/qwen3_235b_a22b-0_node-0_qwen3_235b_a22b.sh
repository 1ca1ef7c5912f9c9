#!/usr/bin/env bash
# qwen3_235b_a22b on host_0_node-0 of qwen3_235b_a22b-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen3_235b_a22b_serve/serve/qwen3_235b_a22b-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/qwen3_235b_a22b_serve/serve/qwen3_235b_a22b-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen3_235b_a22b_serve/serve/qwen3_235b_a22b-0/serve_logs/details || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=NVIDIA
export CUDA_DEVICE_MAX_CONNECTIONS=1
export GLOO_SOCKET_IFNAME=eth0
export NCCL_SOCKET_IFNAME=eth0
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec python -m flagscale.serve.keyed sglang.launch_server \
  --host 0.0.0.0 \
  --port '<master_port: chosen at launch>' \
  --node-rank 0 \
  --nnodes 2 \
  --dist-init-addr 'node-0:<next_port: chosen at launch>' \
  --model-path Qwen/Qwen3-235B-A22B \
  --served-model-name qwen3-235b-a22b \
  --tp-size 16 \
  --context-length 32768 \
  --max-running-requests 128 \
  --reasoning-parser qwen3 \
  --mem-fraction-static 0.85
