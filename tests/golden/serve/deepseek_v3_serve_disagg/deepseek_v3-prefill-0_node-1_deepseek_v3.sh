#!/usr/bin/env bash
# deepseek_v3 on host_1_node-1 of deepseek_v3-prefill-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_disagg/serve/deepseek_v3-prefill-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_disagg/serve/deepseek_v3-prefill-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_disagg/serve/deepseek_v3-prefill-0/serve_logs/details || exit 1
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
  --node-rank 1 \
  --nnodes 2 \
  --dist-init-addr 'node-0:<next_port: chosen at launch>' \
  --model-path deepseek-ai/DeepSeek-V3 \
  --served-model-name deepseek-v3 \
  --tp-size 16 \
  --context-length 65536 \
  --max-running-requests 256 \
  --trust-remote-code \
  --mem-fraction-static 0.85 \
  --disaggregation-mode prefill
