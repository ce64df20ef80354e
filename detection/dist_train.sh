#!/usr/bin/env bash
# bash detection/dist_train.sh CONFIG GPUS --data-path ~/coco --output_dir DIR; CONFIG is a recipe, or the name of a published configuration.
set -eu
exec bash "$(dirname "$0")/../features/dist_train.sh" detection "$@"
