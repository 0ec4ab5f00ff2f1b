#!/usr/bin/env bash
# Every way to learn from one's own samples, on the toy world, three seeds each, from one SFT model and one
# reward model (some: three): RLOO and its neighbours, PPO, online preference learning, selected samples. The
# methods are a table in study/online.py; at the end the README's table is printed. Run again, it goes on where
# it stopped, and what is finished is not run again.
# OUT=dir writes there instead, SEEDS=1 for fewer, ONLY=rloo,xpo for some methods, EPISODES=640 for shorter runs,
# JOBS=1 for one run at a time.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/online}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS=1

[ -e $out/data/meta.json ] || python data/toy.py --out_dir=$out/data --overwrite
[ -e $out/sft/result.json ] || python train_sft.py --resume --data_dir=$out/data --model=$out/data/base \
    --init=scratch --out_dir=$out/sft --lr=2e-3 --warmup=0.05 --batch_size=16 --train_rows=4800 \
    --loss_on=response --max_grad_norm=1
reward_model() {
    [ -e $out/$1/result.json ] || echo "python train_rm.py --resume --data_dir=$out/data --model=$out/sft" \
        "--out_dir=$out/$1 --seed=$2 --lr=1.5e-3 --warmup=0.05 --batch_size=32 --train_rows=20000 --center_rows=500"
}
(reward_model rm 1; reward_model rm_2 2; reward_model rm_3 3) | xargs -I{} -P $jobs bash -c '{} > /dev/null'
[ -e $out/rm_average/config.json ] || python average.py --models=$out/rm,$out/rm_2,$out/rm_3 \
    --out_dir=$out/rm_average --overwrite

run() {
    began=$SECONDS
    if bash -c "$2" > "$out/$1.log" 2>&1; then
        echo "$1 $((SECONDS - began))" | tee -a "$out/seconds.txt"
    else
        echo "FAILED: $1, see $out/$1.log"
        return 255
    fi
}
export -f run
export out
python -m study.online --commands --out=$out --seeds=${SEEDS:-1,2,3} --episodes=${EPISODES:-2560} --only="${ONLY:-}" |
    sed 's/ /\t/' | xargs -P $jobs -I{} bash -c 'IFS=$'"'\t'"' read -r name command <<< "$1"; run "$name" "$command"' _ {}

python evaluate.py --data_dir=$out/data --model="$out/sft,$out/*_s[0-9]" --ref_model=$out/sft --judge=gold --n=300 \
    --temperature=0.7 --sample_temperature=0.7 --out_dir=$out/eval
python -m study.online --table --out=$out
