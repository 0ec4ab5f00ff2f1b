#!/usr/bin/env bash
# The whole pipeline on a small sample of real posts and real human preferences, with the real Pythia
# tokenizer and a small model from scratch.
#   bash runs/real_sample.sh [source directory] [tokenizer.json]
# It shows that the real data path works on a machine without a network or a GPU. A model this small, from
# scratch, on 644 posts, does not learn to summarise: look at toy or at a pretrained Pythia for that.
source "$(dirname "$0")/env.sh"
source_dir=${1:-../shared/tldr}
tokenizer=${2:-../shared/tokenizer.json}
out=out/real_sample

[ -e $out/data/meta.json ] ||
    python data/tldr.py --source="$source_dir" --tokenizer="$tokenizer" --out_dir=$out/data --overwrite
mkdir -p $out/base
cp $out/data/tokenizer.json $out/base/
cat > $out/base/config.json <<'JSON'
{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 50304, "hidden_size": 64,
 "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256, "rotary_pct": 0.25,
 "max_position_embeddings": 2048}
JSON
common="--data_dir=$out/data --resume --save_every=5 --batch_size=32"
python train_sft.py $common --model=$out/base --init=scratch --out_dir=$out/sft --lr=2e-3 --epochs=2 \
    --eval_rows=32
python train_rm.py $common --model=$out/sft --out_dir=$out/rm --lr=3e-4 --epochs=1
python train_rloo.py $common --model=$out/sft --reward_model=$out/rm --reward=kl:0.05 --out_dir=$out/rloo \
    --lr=1e-4 --k=4 --episodes=160 --ppo_epochs=1 --eval_rows=32
for loss in simpo dpo; do
    python train_simpo.py $common --model=$out/sft --loss=$loss --out_dir=$out/$loss --lr=1e-4 --eval_rows=32
done
for run in sft rloo simpo dpo; do
    python evaluate.py --data_dir=$out/data --model=$out/$run --ref_model=$out/sft --judge=rm \
        --reward_model=$out/rm --n=32 --out_dir=$out/eval/$run --overwrite
done
