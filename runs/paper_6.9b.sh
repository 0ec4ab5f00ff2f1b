#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 6.9B on 8 GPUs with 80 GB: 31 GiB on each by the arithmetic of --dry_run
# (RLOO; 46 on 4 GPUs, 77 on 2). Not yet tried.
export SIZE=6.9b TOKENS=${TOKENS:-8192} ROLLOUT=${ROLLOUT:-256} TRAIN=--gradient_checkpointing GPUS=${GPUS:-8}
exec bash "$(dirname "$0")/paper_1b.sh"
