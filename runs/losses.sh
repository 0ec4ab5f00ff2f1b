#!/usr/bin/env bash
# Every loss of train_simpo.py on the toy world with three seeds, at its default options and at the demo's learning
# rate of DPO; at the end a markdown table (study/losses.py). Run again, it goes on where it was stopped; a finished
# run is not run again. OUT=dir writes there instead, SEEDS="1 2" for fewer, JOBS=1 for one run at a time.
source "$(dirname "$0")/env.sh"
seeds=${SEEDS:-1 2 3}
python -m study.losses --out_dir=${OUT:-out/losses} --seeds=${seeds// /,}
