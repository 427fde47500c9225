#!/usr/bin/env bash
# Trains the carried pipeline of moving digits as it was made: single frames first, then clips of 16 frames from them.
# Hardware: 2 CPU cores are enough; see configs/digits/train.yaml for the time. Settings may follow; they are those of
# the second stage.
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit
accelerate launch train.py --config configs/digits-frames/train.yaml &&
  exec accelerate launch train.py --config configs/digits/train.yaml init.from=outputs/digits-frames/pipeline "$@"
