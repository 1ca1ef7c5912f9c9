#!/usr/bin/env bash
# torchrun on host_0_localhost of tiny
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/tiny/logs || exit 1
mkdir -p -- /home/user/outputs/tiny/logs/pids || exit 1
mkdir -p -- /home/user/outputs/tiny/logs/details || exit 1
mkdir -p -- /home/user/outputs/tiny/checkpoints || exit 1
mkdir -p -- /home/user/outputs/tiny/tensorboard || exit 1
mkdir -p -- /home/user/outputs/tiny/wandb || exit 1
python tools/datasets/prepare_text.py --output ./outputs/tiny/data/text ./examples/tiny/data/text.txt

status=$?; [ "$status" -eq 0 ] || {
  echo "before_start failed with exit code $status" >&2; exit "$status"
}
cd -- /flagscale || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=Generic_CPU
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=1
export TORCHDYNAMO_DISABLE=1
export PYTHONPATH=/flagscale/third_party/Megatron-LM/src:/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec torchrun \
  --local-addr localhost \
  --rdzv-id '<run_id: chosen at launch>' \
  --nnodes 1 \
  --node-rank 0 \
  --nproc-per-node 2 \
  --rdzv-backend c10d \
  --rdzv-endpoint 'localhost:<master_port: chosen at launch>' \
  --log-dir '/home/user/outputs/tiny/logs/details/host_0_localhost/<run_id: chosen at launch>' \
  --redirects 3 \
  --tee 3 ./flagscale/train/train_gpt.py \
  --distributed-backend gloo \
  --transformer-impl local \
  --use-cpu-initialization \
  --no-persist-layer-norm \
  --no-gradient-accumulation-fusion \
  --no-masked-softmax-fusion \
  --no-bias-gelu-fusion \
  --no-bias-swiglu-fusion \
  --no-bias-dropout-fusion \
  --no-rope-fusion \
  --num-workers 0 \
  --save /home/user/outputs/tiny/checkpoints \
  --load /home/user/outputs/tiny/checkpoints \
  --tensorboard-dir /home/user/outputs/tiny/tensorboard \
  --wandb-save-dir /home/user/outputs/tiny/wandb \
  --tensor-model-parallel-size 2 \
  --pipeline-model-parallel-size 1 \
  --use-distributed-optimizer \
  --log-interval 1 \
  --save-interval 20 \
  --ckpt-format torch_dist \
  --dist-ckpt-optim-fully-reshardable \
  --num-layers 4 \
  --hidden-size 256 \
  --ffn-hidden-size 768 \
  --num-attention-heads 8 \
  --seq-length 128 \
  --max-position-embeddings 128 \
  --position-embedding-type rope \
  --swiglu \
  --normalization RMSNorm \
  --norm-epsilon 1e-05 \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
  --init-method-std 0.02 \
  --clip-grad 1.0 \
  --seed 1234 \
  --train-iters 100 \
  --eval-iters 2 \
  --eval-interval 50 \
  --micro-batch-size 4 \
  --global-batch-size 8 \
  --weight-decay 0.1 \
  --adam-beta1 0.9 \
  --adam-beta2 0.95 \
  --lr 0.003 \
  --min-lr 0.0003 \
  --lr-warmup-iters 10 \
  --lr-decay-style cosine \
  --override-opt-param-scheduler \
  --data-path ./outputs/tiny/data/text \
  --split 97,3,0 \
  --tokenizer-type NullTokenizer \
  --vocab-size 257 \
  --make-vocab-size-divisible-by 64
