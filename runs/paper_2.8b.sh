#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 2.8B; one GPU with 141 GB, or less with TOKENS=4096.
SIZE=2.8b exec bash "$(dirname "$0")/paper_1b.sh"
