#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 6.9B. By the arithmetic of --dry_run RLOO takes 147 GiB, more than a GPU of
# 141 GB; SFT, the reward model and the offline losses fit there (121, 114 and 134). Not yet tried.
export SIZE=6.9b TOKENS=${TOKENS:-4096} ROLLOUT=${ROLLOUT:-32} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
