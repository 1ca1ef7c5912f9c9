#!/usr/bin/env bash
# torchrun on host_0_localhost of deepseek_v3_16b_a3b
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/logs || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/logs/pids || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/logs/details || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/checkpoints || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/tensorboard || exit 1
mkdir -p -- /home/user/outputs/deepseek_v3_16b_a3b/wandb || exit 1
export PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONPATH=/flagscale/third_party/Megatron-LM/src:/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec torchrun \
  --local-addr localhost \
  --rdzv-id '<run_id: chosen at launch>' \
  --nnodes 1 \
  --node-rank 0 \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-endpoint 'localhost:<master_port: chosen at launch>' \
  --log-dir '/home/user/outputs/deepseek_v3_16b_a3b/logs/details/host_0_localhost/<run_id: chosen at launch>' \
  --redirects 3 \
  --tee 3 ./flagscale/train/train_gpt.py \
  --save /home/user/outputs/deepseek_v3_16b_a3b/checkpoints \
  --load /home/user/outputs/deepseek_v3_16b_a3b/checkpoints \
  --tensorboard-dir /home/user/outputs/deepseek_v3_16b_a3b/tensorboard \
  --wandb-save-dir /home/user/outputs/deepseek_v3_16b_a3b/wandb \
  --tensor-model-parallel-size 1 \
  --pipeline-model-parallel-size 1 \
  --expert-model-parallel-size 8 \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --overlap-param-gather \
  --bf16 \
  --accumulate-allreduce-grads-in-fp32 \
  --recompute-granularity selective \
  --recompute-modules mla_up_proj moe_act layernorm \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-log-interval 10 \
  --save-interval 1000 \
  --num-layers 27 \
  --hidden-size 2048 \
  --ffn-hidden-size 11264 \
  --num-attention-heads 16 \
  --multi-latent-attention \
  --kv-lora-rank 512 \
  --qk-head-dim 128 \
  --qk-pos-emb-head-dim 64 \
  --v-head-dim 128 \
  --qk-layernorm \
  --max-position-embeddings 8192 \
  --position-embedding-type rope \
  --rope-type rope \
  --rotary-base 50000 \
  --no-rope-fusion \
  --normalization RMSNorm \
  --norm-epsilon 1e-05 \
  --swiglu \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --init-method-std 0.02 \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
  --num-experts 64 \
  --moe-layer-freq '([0]+[1]*26)' \
  --moe-ffn-hidden-size 1408 \
  --moe-shared-expert-intermediate-size 2816 \
  --moe-router-topk 6 \
  --moe-router-score-function sigmoid \
  --moe-router-topk-scaling-factor 2.446 \
  --moe-router-enable-expert-bias \
  --moe-router-bias-update-rate 0.001 \
  --moe-router-load-balancing-type seq_aux_loss \
  --moe-aux-loss-coeff 0.001 \
  --moe-router-dtype fp32 \
  --moe-token-dispatcher-type alltoall \
  --moe-grouped-gemm \
  --moe-permute-fusion \
  --seq-length 4096 \
  --micro-batch-size 1 \
  --global-batch-size 512 \
  --train-samples 24414062 \
  --eval-interval 1000 \
  --eval-iters 10 \
  --cross-entropy-loss-fusion \
  --seed 1234 \
  --weight-decay 0.1 \
  --adam-beta1 0.9 \
  --adam-beta2 0.95 \
  --clip-grad 1.0 \
  --lr 0.00042 \
  --min-lr 4.2e-05 \
  --lr-warmup-samples 1024000 \
  --lr-decay-style cosine \
  --data-path ./data/deepseek_v3/text_document \
  --split 99,1,0 \
  --num-workers 4 \
  --tokenizer-type HuggingFaceTokenizer \
  --tokenizer-model ./data/deepseek_v3/tokenizer \
  --padded-vocab-size 163840
