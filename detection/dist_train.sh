#!/usr/bin/env bash
# bash detection/dist_train.sh CONFIG GPUS --data-path ~/coco --output_dir DIR; CONFIG is a recipe, or the name of a published configuration.
# Several nodes: NNODES, NODE_RANK and MASTER_ADDR as for dist_train.sh.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python}
CONFIG=$1 GPUS=$2
shift 2
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/tools/launch.py" \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$GPUS" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    -m detection --config "$CONFIG" "$@"
