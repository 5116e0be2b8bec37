#!/usr/bin/env bash
# The devices of one node, or of several, by torchrun; its words go to tokenflow predict:
#   GPUS=8 configs/cluster/torchrun.sh --data.video in.mp4 --model.prompt "a robot running"
# On several nodes start it on each, with NODES=4 and MEET=name:29500 of the first one.
set -eu
# seconds that processes have to finish their step when torchrun is asked to stop
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${MEET:-localhost:0}" --rdzv-id tokenflow \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m tokenflow.cli predict --config configs/cluster/predict.yaml \
  --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-8}" "$@"
