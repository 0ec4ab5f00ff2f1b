#!/usr/bin/env bash
# The whole pipeline on the toy world, on a CPU: SFT -> reward model -> RLOO (KL-constrained, without a
# constraint, MaxEnt) -> SimPO and DPO -> evaluation of each. One table and the curves at the end, in out/demo.
# Run again, it goes on where it stopped.
source "$(dirname "$0")/env.sh"
out=out/demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small gain nothing from more, and wait for each other
began=$SECONDS

# Two things at a time: what runs beside the first one writes to a log, and ends with it.
beside() {
    log=$out/$1.log
    shift
    "$@" > "$log" 2>&1 &
}
join() {
    wait $! || { tail -n 3 "$log" >&2; exit 1; }
}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

[ -e $out/data/meta.json ] || python data/toy.py --out_dir=$out/data --overwrite
common="--data_dir=$out/data --resume"
beside sft python train_sft.py $common --model=$out/data/base --init=scratch --out_dir=$out/sft --lr=2e-3 \
    --warmup=0.05 --batch_size=16 --train_rows=4800 --loss_on=response --max_grad_norm=1
python train_rm.py $common --model=$out/data/base --init=scratch --out_dir=$out/rm --lr=1.5e-3 \
    --warmup=0.1 --max_grad_norm=0.5 --adam_eps=1e-8 --batch_size=32 --train_rows=20000 --center_rows=500
join

rloo="python train_rloo.py $common --model=$out/sft --reward_model=$out/rm --k=4 --batch_size=64
    --episodes=23040 --ppo_epochs=1 --lr=1.1e-4 --schedule=constant"
beside rloo_free $rloo --reward=kl:0 --out_dir=$out/rloo_free
$rloo --reward=kl:0.1 --out_dir=$out/rloo_kl
join
beside rloo_maxent $rloo --reward=maxent_length:0.1 --out_dir=$out/rloo_maxent
offline="python train_simpo.py $common --model=$out/sft --train_rows=1500 --batch_size=32 --lr=1e-4"
$offline --loss=simpo --out_dir=$out/simpo
$offline --loss=dpo --out_dir=$out/dpo
echo "the MaxEnt run goes on, about a minute: tail $out/rloo_maxent.log"
join

models=$out/sft,$out/rloo_kl,$out/rloo_free,$out/rloo_maxent,$out/simpo,$out/dpo
python evaluate.py $common --model=$models --ref_model=$out/sft --reward_model=$out/rm \
    --judge=gold,rm --temperature=0.7 --sample_temperature=0.7 --n=500 --out_dir=$out/eval
python -m study.plot --runs="KL=$out/rloo_kl,no constraint=$out/rloo_free,MaxEnt=$out/rloo_maxent" \
    --metrics=scores,gold,kl_full,entropy --smooth=8 --out=$out/rloo.png
python -m study.plot --runs="SimPO=$out/simpo,DPO=$out/dpo" \
    --metrics=margins,accuracies,logps/chosen,logps/rejected --smooth=5 --out=$out/simpo.png
echo "table: $out/eval/sweep.csv, curves: $out/rloo.png and $out/simpo.png"
echo "after $((SECONDS - began)) seconds"
