#!/usr/bin/env bash
# torchrun on host_0_localhost of mixtral_8x7b
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/logs || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/logs/pids || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/logs/details || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/checkpoints || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/tensorboard || exit 1
mkdir -p -- /home/user/outputs/mixtral_8x7b/wandb || exit 1
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
  --log-dir '/home/user/outputs/mixtral_8x7b/logs/details/host_0_localhost/<run_id: chosen at launch>' \
  --redirects 3 \
  --tee 3 ./flagscale/train/train_gpt.py \
  --save /home/user/outputs/mixtral_8x7b/checkpoints \
  --load /home/user/outputs/mixtral_8x7b/checkpoints \
  --tensorboard-dir /home/user/outputs/mixtral_8x7b/tensorboard \
  --wandb-save-dir /home/user/outputs/mixtral_8x7b/wandb \
  --tensor-model-parallel-size 1 \
  --pipeline-model-parallel-size 1 \
  --expert-model-parallel-size 8 \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --overlap-param-gather \
  --optimizer-cpu-offload \
  --use-precision-aware-optimizer \
  --bf16 \
  --accumulate-allreduce-grads-in-fp32 \
  --recompute-granularity full \
  --recompute-method uniform \
  --recompute-num-layers 1 \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-log-interval 10 \
  --save-interval 1000 \
  --num-layers 32 \
  --hidden-size 4096 \
  --ffn-hidden-size 14336 \
  --num-attention-heads 32 \
  --group-query-attention \
  --num-query-groups 8 \
  --max-position-embeddings 32768 \
  --position-embedding-type rope \
  --rotary-base 1000000 \
  --normalization RMSNorm \
  --norm-epsilon 1e-05 \
  --swiglu \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --init-method-std 0.02 \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
  --num-experts 8 \
  --moe-ffn-hidden-size 14336 \
  --moe-router-topk 2 \
  --moe-router-score-function softmax \
  --moe-router-load-balancing-type aux_loss \
  --moe-aux-loss-coeff 0.02 \
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
  --lr 0.0002 \
  --min-lr 2e-05 \
  --lr-warmup-samples 1024000 \
  --lr-decay-style cosine \
  --data-path ./data/mixtral/text_document \
  --split 99,1,0 \
  --num-workers 4 \
  --tokenizer-type HuggingFaceTokenizer \
  --tokenizer-model ./data/mixtral/tokenizer \
  --padded-vocab-size 32000
