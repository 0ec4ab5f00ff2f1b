#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 6.9B. By arithmetic, not yet tried: float32 weights, gradients and Adam
# take 110 GB, the two frozen models in bfloat16 28 GB, autocast's copy of the policy during a forward 14
# GB: a GPU of 180 GB; 141 GB would need the frozen models elsewhere during the update.
export SIZE=6.9b TOKENS=${TOKENS:-4096} ROLLOUT=${ROLLOUT:-32} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
