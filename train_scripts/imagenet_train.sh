#!/usr/bin/env bash
# Trains DiT-XL/2 with long skips on ImageNet with the recipe of DiT: batches of 256, learning rate 1e-4, EMA 0.9999.
# Hardware: 8 GPUs of 80 GB (32 pictures each). Time and FID: the paper's table (arXiv 2411.17616); not measured here.
# Settings may follow: bash train_scripts/imagenet_train.sh mixed_precision=bf16 data.arguments.root=/data/imagenet
# Other machines: ACCELERATE_CONFIG=configs/accelerate/single_gpu.yaml bash train_scripts/imagenet_train.sh
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" imagenet "$@"
