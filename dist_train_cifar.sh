#!/usr/bin/env bash
# RecNeXt-M0 on CIFAR-100: bash dist_train_cifar.sh --data-path FOLDER-OF-cifar-100-python
# Several nodes and other numbers of processes as in dist_train.sh.
set -eu
export NPROC_PER_NODE="${NPROC_PER_NODE:-4}"
exec sh dist_train.sh --config recipes/cifar100.yaml "$@"
