#!/usr/bin/env bash
# Is this card ready? About ten minutes on one card, a verdict per line; nothing needs the network once .venv is there.
# Run it first on a new machine. Logs lie in out/gpu_check. OUT=dir writes there instead, MODEL=pythia-410m benches a smaller one.
source "$(dirname "$0")/env.sh"
out=${OUT:-out/gpu_check}
mkdir -p "$out"
failed=0

check() {  # name, command ...: runs it, its output in a log, and says how it went
    local name=$1 began=$SECONDS
    shift
    local log="$out/${name// /_}.log"
    if "$@" > "$log" 2>&1; then
        echo "ok      $name, $((SECONDS - began)) s"
    else
        failed=$((failed + 1))
        echo "FAILED  $name, $((SECONDS - began)) s: $(grep -E '^(E  |error|FAILED|[A-Za-z.]*Error)' "$log" | tail -1) ($log)"
    fi
}

parity() {  # name, tests: of tests/test_cuda.py
    check "$1" python -m pytest -q -rs tests/test_cuda.py -k "$2"
}

nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader || echo "no nvidia-smi"
if ! python -c "import torch
assert torch.cuda.is_available(), f'torch {torch.__version__} sees no CUDA device'
card = torch.cuda.get_device_properties(0)
print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, {card.name}, {card.total_memory / 2**30:.0f} GiB')"; then
    echo "FAILED  no card: nothing was checked"
    exit 1
fi

parity "numbers and gradients of the CPU, flex and SDPA" "numbers_and_gradients or scores_of"
parity "bfloat16 against float32" "bfloat16_is_near or scoring_finds"
parity "packed row against single responses" "packed"
parity "all head shapes stay compiled" "limit or compiled_layers"
parity "greedy text of the CPU" "greedy"
parity "recorded steps against plain ones" "replayed"
parity "updates of the CPU" "updates or both_paths"
parity "resume on the card" "resumes"
parity "memory as --dry_run says" "peak"

# the toy world on the card: SFT, reward model, RLOO by the fast paths and by the plain ones
data="--data_dir=$out/data --device=cuda --overwrite"
steps="--save_every=0 --eval_rows=64"
check "toy data" python data/toy.py --out_dir="$out/data" --overwrite --posts=2000 --pairs=2000 --validation=200
check "toy SFT" python train_sft.py $data $steps --model="$out/data/base" --init=scratch --out_dir="$out/sft" \
    --lr=2e-3 --batch_size=16 --train_rows=1600 --loss_on=response
check "toy reward model" python train_rm.py $data --save_every=0 --model="$out/sft" --out_dir="$out/rm" --lr=1e-3 \
    --batch_size=32
for path in "" --plain; do
    check "toy RLOO $path" python train_rloo.py $data $steps --model="$out/sft" --reward_model="$out/rm" $path \
        --out_dir="$out/rloo$path" --k=4 --batch_size=64 --episodes=640 --ppo_epochs=1 --lr=1e-4
done

# the GPU column of README's table: ours alone; --peer=trl,transformers beside the peers
model=${MODEL:-pythia-1b}
for work in generate sft rloo; do
    check "bench $work" python -m bench.bench --device=cuda --dtype=bfloat16 --model=$model --work=$work --peer=none \
        --prompts=64 --compile --repeats=3 --warmup=2
    grep -E "floor|^  ours|ceilings|BUSY" "$out/bench_$work.log" || true
done

[ $failed = 0 ] && echo "all checks passed" || echo "$failed check(s) FAILED; --plain leaves out flex_attention, graphs and compiling"
exit $((failed > 0))
