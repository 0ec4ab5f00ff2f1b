#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 2.8B; by arithmetic one GPU with 80 GB: float32 weights, gradients and Adam take 44 GB, the two frozen models 11 GB.
export SIZE=2.8b TOKENS=${TOKENS:-8192} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
