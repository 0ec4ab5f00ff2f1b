#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 2.8B. By arithmetic, not yet tried, one GPU with 80 GB: float32 weights,
# gradients and Adam take 44 GB, the two frozen models in bfloat16 11 GB, the cache of 64 prompts 13 GB.
export SIZE=2.8b TOKENS=${TOKENS:-8192} ROLLOUT=${ROLLOUT:-64} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
