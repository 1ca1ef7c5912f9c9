#!/usr/bin/env bash
# torchrun on host_0_localhost of qwen2_5_7b
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/logs || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/logs/pids || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/logs/details || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/checkpoints || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/tensorboard || exit 1
mkdir -p -- /home/user/outputs/qwen2_5_7b/wandb || exit 1
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
  --log-dir '/home/user/outputs/qwen2_5_7b/logs/details/host_0_localhost/<run_id: chosen at launch>' \
  --redirects 3 \
  --tee 3 ./flagscale/train/train_gpt.py \
  --save /home/user/outputs/qwen2_5_7b/checkpoints \
  --load /home/user/outputs/qwen2_5_7b/checkpoints \
  --tensorboard-dir /home/user/outputs/qwen2_5_7b/tensorboard \
  --wandb-save-dir /home/user/outputs/qwen2_5_7b/wandb \
  --tensor-model-parallel-size 2 \
  --sequence-parallel \
  --pipeline-model-parallel-size 1 \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --overlap-param-gather \
  --bf16 \
  --accumulate-allreduce-grads-in-fp32 \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-log-interval 10 \
  --save-interval 1000 \
  --num-layers 28 \
  --hidden-size 3584 \
  --ffn-hidden-size 18944 \
  --num-attention-heads 28 \
  --group-query-attention \
  --num-query-groups 4 \
  --max-position-embeddings 131072 \
  --position-embedding-type rope \
  --rotary-base 1000000 \
  --normalization RMSNorm \
  --norm-epsilon 1e-06 \
  --swiglu \
  --disable-bias-linear \
  --add-qkv-bias \
  --untie-embeddings-and-output-weights \
  --init-method-std 0.02 \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
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
  --lr 0.0003 \
  --min-lr 3e-05 \
  --lr-warmup-samples 1024000 \
  --lr-decay-style cosine \
  --data-path ./data/qwen2_5/text_document \
  --split 99,1,0 \
  --num-workers 4 \
  --tokenizer-type HuggingFaceTokenizer \
  --tokenizer-model ./data/qwen2_5/tokenizer \
  --padded-vocab-size 152064
