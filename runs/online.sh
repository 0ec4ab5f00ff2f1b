#!/usr/bin/env bash
# Every way to learn from one's own samples, on the toy world, from one SFT model and one reward model: RLOO
# and its neighbours, PPO, online preference learning, selection of samples. One table at the end, in
# out/online, of about 20 models; not timed as a whole yet. Run again, it goes on where it stopped.
# OUT=dir writes there instead.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/online}

[ -e $out/data/meta.json ] || python data/toy.py --out_dir=$out/data --overwrite
data="--data_dir=$out/data --resume"
sft="--lr=2e-3 --warmup=0.05 --batch_size=16 --loss_on=response --max_grad_norm=1"
python train_sft.py $data --model=$out/data/base --init=scratch --out_dir=$out/sft --train_rows=4800 $sft
python train_rm.py $data --model=$out/sft --out_dir=$out/rm --lr=1.5e-3 --warmup=0.05 --batch_size=32 \
    --train_rows=20000 --center_rows=500
models="--model=$out/sft --reward_model=$out/rm"
samples="--batch_size=64 --episodes=6400"

# a reward climbed
rl="python train_rloo.py $data $models $samples --k=4 --ppo_epochs=1 --lr=1e-4 --schedule=constant"
$rl --reward=kl:0.1 --out_dir=$out/rloo
$rl --reward=chi2:0.05 --out_dir=$out/chi2_rlhf
$rl --reward=score:0+ref_logprob:0.5+kl:0.5 --out_dir=$out/sharpening_rl
$rl --reward=score:0+maxent:-0.5 --out_dir=$out/entropy_minimisation
$rl --reward=kl:0.1 --advantage=grpo --policy_loss=token --clip_high=0.28 --out_dir=$out/grpo
$rl --reward=kl:0.1 --advantage=grpo --policy_loss=gspo --clip=3e-4 --clip_high=4e-4 --out_dir=$out/gspo
python train_ppo.py $data $models $samples --k=1 --ppo_epochs=1 --lr=1e-4 --schedule=constant --out_dir=$out/ppo

# a comparison learnt from
online="python train_online.py $data $models $samples --lr=1e-4"
$online --loss=dpo --beta=0.1 --out_dir=$out/online_dpo
$online --loss=ipo --beta=0.1 --label=soft --out_dir=$out/online_ipo
$online --loss=ipo --beta=0.1 --label=soft --mixture=0.125 --out_dir=$out/ipo_md
$online --loss=nash_md --beta=0.1 --label=soft --opponent=0.5 --out_dir=$out/nash_md
$online --loss=dpo --beta=0.1 --opponent=1 --explore=1e-5 --out_dir=$out/xpo
$online --loss=dpo --beta=0.1 --opponent=1 --explore=0.01 --out_dir=$out/vpo_online
$online --loss=dpo --beta=0.01 --k=1 --data_pair --explore=1e-5 --round_updates=34 --move_reference \
    --out_dir=$out/selm
$online --loss=dpo --beta=0.1 --k=8 --epochs=2 --round_updates=34 --move_reference --out_dir=$out/iterative_dpo

# samples selected
select="python sample.py $data $models --rows=4000"
offline="--model=$out/sft --resume --batch_size=32 --lr=1e-4"
$select --select=best --k=8 --out_dir=$out/raft_data
python train_sft.py --data_dir=$out/raft_data --model=$out/sft --resume --out_dir=$out/raft $sft --lr=3e-4
$select --select=own --k=8 --out_dir=$out/sharpening_data
python train_sft.py --data_dir=$out/sharpening_data --model=$out/sft --resume --out_dir=$out/sharpening $sft \
    --lr=3e-4
$select --select=rso --k=64 --accept=8 --rows=1000 --out_dir=$out/rso_data
python train_simpo.py --data_dir=$out/rso_data $offline --loss=hinge --out_dir=$out/rso
$select --select=gap --k=4 --gap=0.5 --out_dir=$out/mpo_data
python train_simpo.py --data_dir=$out/mpo_data $offline --loss=dpo --beta=0.1 --out_dir=$out/mpo_dpo
python train_rloo.py --data_dir=$out/mpo_data --model=$out/mpo_dpo --reward_model=$out/rm --resume $samples \
    --k=4 --ppo_epochs=1 --lr=1e-4 --schedule=constant --reward=kl:0.1 --out_dir=$out/mpo

names="sft rloo chi2_rlhf sharpening_rl entropy_minimisation grpo gspo ppo online_dpo online_ipo ipo_md nash_md
    xpo vpo_online selm iterative_dpo raft sharpening rso mpo_dpo mpo"
list=$(printf "$out/%s," $names)
python evaluate.py --data_dir=$out/data --model=${list%,} --ref_model=$out/sft --reward_model=$out/rm \
    --judge=gold,rm --temperature=0.7 --sample_temperature=0.7 --n=500 --out_dir=$out/eval
echo "table: $out/eval/sweep.csv"
