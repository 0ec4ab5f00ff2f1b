#!/usr/bin/env bash
# The paper's study at Pythia 1B, a grid like that of runs/study.sh, command by command, on one GPU with 80
# GB (GPUS=8: on eight): SFT and reward model as in vwxyzjn/summarize_from_feedback_details ("The N
# Implementation Details of RLHF with PPO"), RLOO with TRL's defaults and the paper's learning rates. runs/paper_2.8b.sh and
# runs/paper_6.9b.sh are the other two sizes. Every stage resumes where it was stopped, a finished run is
# not run again. SEEDS="1 2 3" repeats everything that is not SFT, each seed with its own reward model. Not
# yet run on a GPU by us.
source "$(dirname "$0")/env.sh"
python=python
[ "${GPUS:-1}" = 1 ] || python="torchrun --nproc_per_node=$GPUS"  # data/tldr.py runs on one
size=${SIZE:-1b}
out=out/$size
seeds=${SEEDS:-1}
tokens=--micro_batch_tokens=${TOKENS:-16384}

# disk: float32 models, of each seed 56 runs, and 4 checkpoints of the ten SimPO runs of Figure 6; and while a
# run lasts two checkpoints with AdamW's state. Whoever wants the other runs' checkpoints, with --keep=0 and
# without `finished`, needs five times as much.
python - $size $seeds <<'PYTHON'
import shutil, sys
size, *seeds = sys.argv[1:]
model = 4e-12 * {"1b": 1.01e9, "2.8b": 2.78e9, "6.9b": 6.86e9}[size]  # TB
needed = model * (1 + len(seeds) * (56 + 10 * 4) + 2 * 3)
free = shutil.disk_usage(".").free / 1e12
print(f"disk: {needed:.2f} TB for {len(seeds)} seed(s), {free:.2f} TB free here")
PYTHON
finished() {  # run, "figure" if its checkpoints are drawn: a finished run is not resumed
    if [ "${2:-}" = figure ]; then
        rm -f "$1"/ckpt/*/trainer.pt "$1"/ckpt/*/optimizer.safetensors*
    else
        rm -rf "$1/ckpt"
    fi
}

[ -e out/tldr/meta.json ] || python data/tldr.py --out_dir=out/tldr --overwrite
common="--data_dir=out/tldr --resume $tokens ${TRAIN:-}"

# SFT: 116,722 posts, 911 updates of 128, lr 3e-6 cosine; published ROUGE-L 0.247 (1B)
$python train_sft.py $common --model=EleutherAI/pythia-$size-deduped --out_dir=$out/sft
finished $out/sft
for seed in $seeds; do
    rm=$out/rm_s$seed
    # reward model: 92,858 pairs, 1,450 updates of 64, lr 3e-6 cosine; published accuracy 0.629 (1B)
    $python train_rm.py $common --model=$out/sft --seed=$seed --out_dir=$rm
    finished $rm

    # RLOO: 1M episodes in batches of 512, k = 2, 4 epochs, temperature 0.7, 53 tokens
    rloo() {  # name, options
        $python train_rloo.py $common --model=$out/sft --reward_model=$rm --rollout_prompts=${ROLLOUT:-256} \
            --save_every=195 --seed=$seed "${@:2}" --out_dir=$out/rloo_$1_s$seed
        finished $out/rloo_$1_s$seed
    }
    for beta in 0.5 0.2 0.05 0.02; do  # section 4.1, Figures 3, 5, 12
        rloo kl_${beta}_lr1e-6 --reward=kl:$beta --lr=1e-6
    done
    for lr in 1e-6 1e-7 5e-8; do  # eq. 7, Figures 1, 2, 3, 5, 10, 11
        for alpha in 0 0.01 0.05 0.1 0.5 1.0; do
            rloo maxent_length_${alpha}_lr$lr --reward=maxent_length:$alpha --lr=$lr
        done
    done
    for alpha in 0.01 0.1 1.0; do  # section 4.2.1
        rloo minent_length_${alpha}_lr1e-6 --reward=minent_length:$alpha --lr=1e-6
    done
    for lr in 1e-6 1e-7; do  # eq. 6; clipping (4.2); padding filled with 1.0
        rloo maxent_0.01_lr$lr --reward=maxent:0.01 --lr=$lr
        rloo clip1e-4_lr$lr --reward=maxent_length:0.1 --clip=1e-4 --lr=$lr
        rloo fill_0.1_lr$lr --reward=maxent_length:0.1 --invalid_logprob_fill=1.0 --lr=$lr
    done
    [ -e $out/best_of_n_s$seed/result.json ] || $python -m study.best_of_n --overwrite --data_dir=out/tldr \
        --model=$out/sft --reward_model=$rm --seed=$seed $tokens --out_dir=$out/best_of_n_s$seed

    # offline: SimPO at two learning rates and two β, with the reference's adaptive margin (dpo_length); DPO
    offline() {  # name, options
        $python train_simpo.py $common --model=$out/sft --keep=0 --save_every=310 --seed=$seed "${@:2}" \
            --out_dir=$out/$1_s$seed
        case $1 in
            simpo_beta2_*) finished $out/$1_s$seed figure ;;
            *) finished $out/$1_s$seed ;;
        esac
    }
    for lr in 1e-6 2e-7; do
        for gamma in 0 0.25 0.5 1 2; do  # Figures 6, 7, 8
            for beta in 2 0.1; do
                offline simpo_beta${beta}_gamma${gamma}_lr$lr --loss=simpo --beta=$beta --gamma=$gamma \
                    --lr=$lr
            done
        done
        offline dpo_lr$lr --loss=dpo --beta=0.05 --lr=$lr  # Figures 4, 9
        offline dpo_length_lr$lr --loss=dpo_length --beta=2 --gamma=0 --lr=$lr
    done
done

# win rates against the reference summaries, greedy, 1,000 posts; needs OPENAI_API_KEY (or
# JUDGE="rm --reward_model=..." without one)
evaluate="$python evaluate.py --data_dir=out/tldr --ref_model=$out/sft --n=1000 --resume $tokens
    --judge=${JUDGE:-llm --judge_model=gpt-4o-mini}"
$evaluate --model="$out/sft,$out/rloo_*,$out/simpo_*,$out/dpo*" --out_dir=$out/eval
$evaluate --model="$out/simpo_beta2_*/ckpt/*" --out_dir=$out/eval_checkpoints  # Figure 6

# when all three sizes are there:
#   for f in 1 2 3 4 5 6 7 8 9 10 11 12 best_of_n; do
#       python -m study.plot --figure=$f --runs=1B=out/1b,2.8B=out/2.8b,6.9B=out/6.9b --out=out/figure_$f.png
#   done
