#!/usr/bin/env bash
# What detection's and segmentation's dist_train.sh share: bash features/dist_train.sh TASK CONFIG GPUS <the task's flags>.
# Several nodes: NNODES, NODE_RANK and MASTER_ADDR as for the dist_train.sh of the root.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
TASK=$1 CONFIG=$2 GPUS=$3
shift 3
exec "$PYTHON" tools/launch.py \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$GPUS" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    -m "$TASK" --config "$CONFIG" "$@"
