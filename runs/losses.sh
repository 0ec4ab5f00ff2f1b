#!/usr/bin/env bash
# Every loss of train_simpo.py on the toy world with three seeds, at its default options and at the demo's learning rate of
# DPO; at the end a markdown table (study/losses.py). Run again, it goes on where it was stopped.
# OUT=dir writes there instead, SEEDS="1" for fewer, JOBS=1 for one run at a time. A finished run is not run again.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/losses}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS=1

[ -e $out/data/meta.json ] || python data/toy.py --out_dir=$out/data --overwrite
python train_sft.py --resume --data_dir=$out/data --model=$out/data/base --init=scratch --out_dir=$out/sft \
    --lr=2e-3 --warmup=0.05 --batch_size=16 --train_rows=4800 --loss_on=response --max_grad_norm=1

losses=$(python -c "from rlhf.losses import PREFERENCE_LOSSES; print(*PREFERENCE_LOSSES)")
for loss in $losses; do
    for seed in ${SEEDS:-1 2 3}; do
        [ -e $out/${loss}_s$seed/result.json ] || echo "python train_simpo.py --resume --data_dir=$out/data --model=$out/sft --loss=$loss --seed=$seed" \
            "--train_rows=5000 --batch_size=32 --lr=1e-4 --out_dir=$out/${loss}_s$seed"
    done
done | xargs -r -I{} -P $jobs bash -c '{} > /dev/null 2>&1 && echo "done: {}" || { echo "FAILED: {}"; exit 255; }'

python evaluate.py --data_dir=$out/data --model="$out/sft,$out/*_s[0-9]" --ref_model=$out/sft --judge=gold --n=500 \
    --temperature=0.7 --sample_temperature=0.7 --out_dir=$out/eval
python -m study.losses --runs=$out
