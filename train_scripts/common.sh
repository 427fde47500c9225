#!/usr/bin/env bash
# What the scripts beside share: train with configs/<set>/train.yaml on the machine that ACCELERATE_CONFIG describes
# (configs/accelerate/8_gpus.yaml if it is not set).
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit
set_name=$1
shift
exec accelerate launch --config_file "${ACCELERATE_CONFIG:-configs/accelerate/8_gpus.yaml}" \
  train.py --config "configs/$set_name/train.yaml" "$@"
