#!/usr/bin/env bash
# tiny on host_0_localhost of tiny-0
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/tiny_serve/serve/tiny-0/serve_logs || exit 1
mkdir -p -- /home/user/outputs/tiny_serve/serve/tiny-0/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/tiny_serve/serve/tiny-0/serve_logs/details || exit 1
python tools/tiny_model.py --checkpoints '/home/user/outputs/tiny/checkpoints' '/home/user/outputs/tiny_serve/model'

status=$?; [ "$status" -eq 0 ] || {
  echo "before_start failed with exit code $status" >&2; exit "$status"
}
cd -- /flagscale || exit 1
export PYTHONUNBUFFERED=1
export FLAGSCALE_CHIP=Generic_CPU
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS='<num_threads: chosen at launch>'
export TORCHDYNAMO_DISABLE=1
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec python -m flagscale.inference.server \
  --host 127.0.0.1 \
  --port '<master_port: chosen at launch>' \
  --api-key-env FLAGSCALE_ENGINE_KEY \
  --model /home/user/outputs/tiny_serve/model \
  --served-model-name tiny
