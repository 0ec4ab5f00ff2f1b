#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 2.8B, on one GPU with 80 GB: 64 GiB by the arithmetic of --dry_run (RLOO;
# 84 without --gradient_checkpointing). Not yet tried.
export SIZE=2.8b TOKENS=${TOKENS:-8192} ROLLOUT=${ROLLOUT:-64} TRAIN=--gradient_checkpointing
exec bash "$(dirname "$0")/paper_1b.sh"
