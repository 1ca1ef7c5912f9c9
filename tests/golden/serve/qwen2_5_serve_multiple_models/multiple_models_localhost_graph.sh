#!/usr/bin/env bash
# graph on host_0_localhost of multiple_models
cd -- /flagscale || exit 1
mkdir -p -- /home/user/outputs/multiple_models/serve_logs || exit 1
mkdir -p -- /home/user/outputs/multiple_models/serve_logs/pids || exit 1
mkdir -p -- /home/user/outputs/multiple_models/serve_logs/details || exit 1
rm -rf -- /tmp/fs-7247a8f376a1-0 && mkdir -m 700 -- /tmp/fs-7247a8f376a1-0 || exit 1

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
export RAY_AUTH_MODE=token
export RAY_COLOR_PREFIX=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export PYTHONPATH=/flagscale${PYTHONPATH:+:$PYTHONPATH}
exec python -m flagscale.serve.graph '/home/user/outputs/multiple_models/runs/<run_id: chosen at launch>/job.json' '127.0.0.1:<master_port: chosen at launch>' ray start \
  --block \
  --disable-usage-stats \
  --head \
  --port '<master_port: chosen at launch>' \
  --include-dashboard false \
  --ray-client-server-port '<next_port: chosen at launch>' \
  --temp-dir /tmp/fs-7247a8f376a1-0 \
  --object-store-memory 500000000 \
  --min-worker-port 0 \
  --max-worker-port 0 \
  --dashboard-agent-listen-port 0 \
  --dashboard-agent-grpc-port 0 \
  --metrics-export-port 0 \
  --num-gpus 0
