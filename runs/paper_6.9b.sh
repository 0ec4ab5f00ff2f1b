#!/usr/bin/env bash
# The grid of paper_1b.sh at Pythia 6.9B. Float32 weights, gradients and Adam take 110 GB, reference and reward model 55 GB more: this needs a card of 180 GB.
SIZE=6.9b exec bash "$(dirname "$0")/paper_1b.sh"
