#!/usr/bin/env bash
# The paper's study in the toy world, where the true reward is known: every run behind RESULTS.md and
# docs/figures. The arms: study/plan.py. How many seeds each gets: study/sequential.py. Four seeds of all arms
# are about 330 runs, by estimate three hours on 2 cores; more seeds of the arms of open claims come on top.
# Run again, it goes on where it was stopped; a finished run is never run again.
# OUT=dir writes there instead, report and figures included. SEEDS=4 stops at the first look. JOBS=1 for one
# run at a time. OTHER=1 then runs the first look again with other matrix kernels (oneDNN and ATen at AVX2), in
# $OUT_other, and RESULTS.md says which verdicts rounding flips. PARTS=figures draws what is there.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/study}
export OMP_NUM_THREADS=1
began=$SECONDS

if [ "${PARTS:-runs}" = runs ]; then
    python -m study.sequential --out_dir=$out --most_seeds=${SEEDS:-24}
    if [ -n "${OTHER:-}" ]; then
        ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
            python -m study.sequential --out_dir=${out}_other --most_seeds=4
    fi
fi
other=""
if [ -e ${out}_other/small/crossed/eval/sweep.csv ]; then other=${out}_other; fi

folders=small=$out/small,medium=$out/medium,large=$out/large
figures=docs/figures report=RESULTS.md
[ $out = out/study ] || figures=$out/figures report=$out/RESULTS.md
for figure in 1 2 3 4 5 6 7 8 9 10 11 12 gold_kl proxy_gold best_of_n reward_gold; do
    case $figure in 4 | 6 | 7 | 8 | 9) each="" ;; *) each=" with a reward model each" ;; esac
    python -m study.plot --figure=$figure --runs=$folders --out=$figures/figure_$figure.png \
        --caption="toy world, 4 seeds or more$each: mean and range"
done
if [ -e out/field/figure_field.png ]; then cp out/field/figure_field.png $figures; fi
python -m study.results --study=$out --other="$other" --out=$report
echo "$report and $figures after $((SECONDS - began)) seconds"
