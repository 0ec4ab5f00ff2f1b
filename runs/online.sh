#!/usr/bin/env bash
# Every way to learn from one's own samples, on the toy world, three seeds each, from one SFT model and one
# reward model (some: three): RLOO and its neighbours, PPO, online preference learning, selected samples; at
# the end the README's table with what each came to (study/online.py). Run again, it goes on where it stopped,
# and what is finished is not run again.
# OUT=dir writes there instead, SEEDS=1 for fewer, ONLY=rloo,xpo for some methods, EPISODES=640 for shorter runs,
# JOBS=1 for one run at a time.
source "$(dirname "$0")/env.sh"
python -m study.online --out_dir=${OUT:-out/online} --seeds=${SEEDS:-1,2,3} --episodes=${EPISODES:-2560} \
    --only="${ONLY:-}"
