#!/usr/bin/env bash
# bash segmentation/tools/dist_test.sh CONFIG CHECKPOINT GPUS --eval mIoU --data-path DIR; CONFIG as for dist_train.sh.
set -eu
CONFIG=$1 CHECKPOINT=$2 GPUS=$3
shift 3
exec bash "$(dirname "$0")/dist_train.sh" "$CONFIG" "$GPUS" --resume "$CHECKPOINT" "$@"
