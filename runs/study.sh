#!/usr/bin/env bash
# The paper's study in the toy world, where the true reward is known: every run behind RESULTS.md and
# docs/figures, 267 of them, in about 75 minutes on 2 cores. Small, medium and large stand for the paper's
# 1B, 2.8B and 6.9B; the learning rates 3e-4, 3e-5 and 1.5e-5 for its 1e-6, 1e-7 and 5e-8 (online) and 3e-4,
# 6e-5 for its 1e-6, 2e-7 (offline): 3e-4 is a rate at which KL-constrained RLOO and DPO work here. Seed s
# has its own reward model, prompts and samples. Run again, it goes on where it was stopped. One run per
# core, JOBS=1 for fewer. OUT=dir writes there instead, report and figures included.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/study}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
seeds="1 2 3"
export OMP_NUM_THREADS=1 out
mkdir -p $out/logs
began=$SECONDS

# plan: one line "directory <tab> command" for run_all
plan() { printf '%s\t%s\n' "$1" "$(printf %s "$2" | tr -s '\n ' ' ')"; }
# run_all: reads these lines, runs those that are not done, $jobs at a time; the first failure stops
# everything
run_all() {
    local planned
    planned=$(while IFS=$'\t' read -r dir command; do
        finished $dir "$command" || printf '%s\t%s\n' "$dir" "$command"
    done)
    [ -z "$planned" ] && return
    echo "$(date +%H:%M:%S) $1: $(echo "$planned" | wc -l) runs to do, $jobs at a time"
    echo "$planned" | tr '\n' '\0' | xargs -0 -n 1 -P $jobs bash -c 'worker "$1"' _
}
finished() {  # directory, command: there is a result, by these very options
    [ -e $1/result.json ] && grep -qF -- " --${2#* --} --out_dir=$1\"" $1/run.json
}
worker() {
    local dir=${1%%$'\t'*} command=${1#*$'\t'} start=$SECONDS
    local log=$out/logs/$(echo "${dir#$out/}" | tr / -).log
    if $command --out_dir=$dir > $log 2>&1; then
        echo "$(date +%H:%M:%S) $dir ($((SECONDS - start)) s)"
    else
        echo "FAILED: $command --out_dir=$dir"; tail -n 5 $log; exit 255
    fi
}
export -f worker

# 1. world and SFT models: the same posts; a larger model needs a lower learning rate
for size in large medium small; do
    [ -e $out/$size/data/meta.json ] ||
        python data/toy.py --out_dir=$out/$size/data --size=$size --overwrite > $out/logs/$size-data.log
done
for size in large medium small; do
    case $size in small) lr=1.5e-3 ;; medium) lr=8e-4 ;; large) lr=7e-4 ;; esac
    plan $out/$size/sft "python train_sft.py --resume --data_dir=$out/$size/data --model=$out/$size/data/base
        --init=scratch --lr=$lr --warmup=0.05 --batch_size=16 --epochs=2 --loss_on=response --max_grad_norm=1"
done | run_all SFT

# 2. a reward model per seed of each size, and what needs none: the offline methods, on the small model as
# in the paper
{
    for size in large medium small; do
        for seed in $seeds; do
            plan $out/$size/rm_s$seed "python train_rm.py --resume --data_dir=$out/$size/data
                --model=$out/$size/sft --seed=$seed --lr=7e-4 --warmup=0.05 --batch_size=32
                --center_rows=1000"
        done
    done
    for seed in $seeds; do
        offline() {  # name, options
            plan $out/small/$1_s$seed "python train_simpo.py --resume --data_dir=$out/small/data
                --model=$out/small/sft --seed=$seed --train_rows=5000 --batch_size=32 --keep=0
                --save_every=39 $2"
        }
        for lr in 3e-4 6e-5; do
            for gamma in 0 0.25 0.5 1 2; do  # Figures 6, 7, 8, appendix B
                for beta in 2 0.1; do
                    offline simpo_beta${beta}_gamma${gamma}_lr$lr \
                        "--loss=simpo --beta=$beta --gamma=$gamma --lr=$lr"
                done
            done
            offline dpo_lr$lr "--loss=dpo --beta=0.05 --lr=$lr"  # Figures 4, 9
            # 4.3: the reference's adaptive margin
            offline dpo_length_lr$lr "--loss=dpo_length --beta=2 --gamma=0 --lr=$lr"
        done
    done
} | run_all "reward models and offline methods"

# 3. RLOO, the long runs first
rloo() {  # size, name, options
    for seed in $seeds; do
        plan $out/$1/rloo_$2_s$seed "python train_rloo.py --resume --data_dir=$out/$1/data --model=$out/$1/sft
            --reward_model=$out/$1/rm_s$seed --k=4 --batch_size=64 --episodes=4096 --temperature=0.7
            --eval_rows=500 --seed=$seed $3"
    done
}
{
    for size in large medium small; do
        if [ $size = large ]; then
            betas="0.2 0.05" alphas="0 0.1 1" lrs="3e-4 3e-5"
        else
            betas="0.5 0.2 0.05 0.02" alphas="0 0.1 0.3 1" lrs="3e-4 3e-5 1.5e-5"
        fi
        for beta in $betas; do  # 4.1; coefficient 0 is the MaxEnt run with coefficient 0
            rloo $size kl_${beta}_lr3e-4 "--reward=kl:$beta --lr=3e-4"
        done
        for lr in $lrs; do  # eq. 7: Figures 1, 2, 3, 5, 10, 11
            for alpha in $alphas; do
                rloo $size maxent_length_${alpha}_lr$lr "--reward=maxent_length:$alpha --lr=$lr"
            done
        done
        [ $size = large ] && continue
        for alpha in 0.1 0.3 1; do  # 4.2.1
            rloo $size minent_length_${alpha}_lr3e-4 "--reward=minent_length:$alpha --lr=3e-4"
        done
    done
    for lr in 3e-4 3e-5; do
        for clip in 1e-2 1e-4; do  # 4.2: tightening the clip range, 2.8B
            rloo medium clip${clip}_lr$lr "--reward=maxent_length:0.1 --clip=$clip --lr=$lr"
        done
        for alpha in 0.02 0.1; do  # eq. 6
            rloo small maxent_${alpha}_lr$lr "--reward=maxent:$alpha --lr=$lr"
        done
        for alpha in 0.1 1; do  # padding filled with 1.0 instead of masked
            rloo small fill_${alpha}_lr$lr "--reward=maxent_length:$alpha --invalid_logprob_fill=1.0 --lr=$lr"
        done
    done
} | run_all RLOO

# 4. best-of-n, and the win rate of everything against the reference summaries by the gold reward. Sampled as
#    in training: greedy summaries of the SFT model come close to the references in this world, which leaves
#    little to gain; greedy gold is in every result.json.
for size in large medium small; do
    for seed in $seeds; do
        plan $out/$size/best_of_n_s$seed "python -m study.best_of_n --overwrite --data_dir=$out/$size/data
            --model=$out/$size/sft --reward_model=$out/$size/rm_s$seed --seed=$seed"
    done
done | run_all "best of n"
evaluate() {  # size, folder, models
    echo "python evaluate.py --resume --data_dir=$out/$1/data --model=$3 --ref_model=$out/$1/sft" \
        "--judge=gold --n=500 --temperature=0.7 --sample_temperature=0.7 --out_dir=$out/$1/$2"
}
{
    evaluate small eval "$out/small/sft,$out/small/rloo_*,$out/small/simpo_*,$out/small/dpo_*"
    evaluate medium eval "$out/medium/sft,$out/medium/rloo_*"
    evaluate large eval "$out/large/sft,$out/large/rloo_*"
    evaluate small eval_checkpoints "$out/small/simpo_beta2_*/ckpt/*"  # Figure 6
} | tr '\n' '\0' | xargs -0 -n 1 -P $jobs bash -c '
    set -f; to=${1##*--out_dir=}; log=$out/logs/$(echo "${to#$out/}" | tr / -).log
    if $1 > $log 2>&1; then
        echo "$(date +%H:%M:%S) $to"
    else
        echo "FAILED: $1"; tail -n 5 $log; exit 255
    fi' _

# 5. figures and verdicts
folders=small=$out/small,medium=$out/medium,large=$out/large
figures=docs/figures report=RESULTS.md
[ $out = out/study ] || figures=$out/figures report=$out/RESULTS.md
world="toy world, $(echo $seeds | wc -w) seeds"
for figure in 1 2 3 4 5 6 7 8 9 10 11 12 gold_kl proxy_gold best_of_n reward_gold; do
    case $figure in 4 | 6 | 7 | 8 | 9) each="" ;; *) each=" with a reward model each" ;; esac
    python -m study.plot --figure=$figure --runs=$folders --out=$figures/figure_$figure.png \
        --caption="$world$each: mean and range"
done
python -m study.results --study=$out --out=$report
echo "$report and $figures after $((SECONDS - began)) seconds"
