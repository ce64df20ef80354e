#!/usr/bin/env bash
# One node: bash dist_train.sh --model recnext_m1 --data-path ~/imagenet
# Several:  NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash dist_train.sh ..., once per node with its NODE_RANK.
set -eu
PYTHON=${PYTHON:-python}
exec "$PYTHON" tools/launch.py \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC_PER_NODE:-8}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-12346}" \
    main.py "$@"
