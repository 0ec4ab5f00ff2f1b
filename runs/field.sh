#!/usr/bin/env bash
# Every pair loss and every online method of the toy world at three learning rates, four seeds each: gold reward
# against sqrt(KL) as one picture and one table, and claims from the literature (study/field.py), in out/field. Run
# again, it goes on where it was stopped; a finished run is never run again.
# OUT=dir writes there instead, SEEDS=1,2 for fewer, ONLY=dpo,rloo for some methods, EPISODES=640 for shorter runs,
# JOBS=1 for one run at a time.
source "$(dirname "$0")/env.sh"
python -m study.field --out_dir=${OUT:-out/field} --seeds=${SEEDS:-1,2,3,4} --episodes=${EPISODES:-2560} \
    --only="${ONLY:-}"
