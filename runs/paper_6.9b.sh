#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 6.9B. By arithmetic, not yet tried: float32 weights, gradients and Adam take 110 GB, reference and reward model in
# bfloat16 28 GB, so one GPU with 141 GB has little left for activations.
export SIZE=6.9b TOKENS=${TOKENS:-4096} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
