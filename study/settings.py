"""The toy world's settings: one place for the demo's options, used by every study. runs/demo.sh and README.md
print the same ones (tests/test_instrument.py compares them)."""

SIZES = ("small", "medium", "large")
TEMPERATURE = 0.7  # of training and of the judged samples (the paper's)
SAMPLED = f"--temperature={TEMPERATURE} --sample_temperature={TEMPERATURE}"  # of evaluate.py

SFT = "--init=scratch --lr=2e-3 --warmup=0.05 --batch_size=16 --train_rows=4800 --loss_on=response"
SFT += " --max_grad_norm=1"
# From scratch: started from an SFT model that has learnt to copy from the post, a reward model of this size
# may read the surface for a thousand updates and more before it compares a summary with its post.
RM = "--init=scratch --lr=1.5e-3 --warmup=0.1 --max_grad_norm=0.5 --adam_eps=1e-8 --batch_size=32"
RM += " --train_rows=20000 --center_rows=500"
RLOO = "--k=4 --batch_size=64 --episodes=23040 --ppo_epochs=1 --lr=1.1e-4 --schedule=constant"
RLOO += f" --temperature={TEMPERATURE}"
OFFLINE = "--train_rows=1500 --batch_size=32 --lr=1e-4"
