"""The same work done by TRL's trainers and by transformers; see sides.py."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from bench.sides import GREEDY_TOKENS, STEPS, Gate, time_generation
from bench.work import Work, as_text

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}


def causal_lm(work: Work, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(work.model_dir, dtype=dtype)


def reward_model(work: Work):
    return AutoModelForSequenceClassification.from_pretrained(work.rm_dir, dtype=torch.float32)


# --- TRL


class Steps(TrainerCallback):
    """Stops the trainer before every step of the work, which is `passes` optimizer steps."""

    def __init__(self, gate: Gate, numbers: dict[str, str], passes: int, extra):
        self.gate = gate
        self.numbers = numbers  # {name: key in the trainer's log line}
        self.passes = passes
        self.extra = extra  # () -> what the trainer does not log
        self.logs: list[dict] = []

    def on_train_begin(self, *_, **__):
        self.gate.ready()

    def on_log(self, args, state, control, logs, **_):
        if "loss" not in logs:  # the summary at the end
            return
        self.logs.append(logs)
        if len(self.logs) < self.passes:
            return
        compared = {name: self.mean(key) for name, key in self.numbers.items()}
        self.logs = []
        more = self.extra()
        self.gate.done({**more, "check": compared | more.get("check", {})})

    def mean(self, key: str) -> float:
        """Over the passes that log it: what belongs to the rollout is logged by the first only."""
        values = [logs[key] for logs in self.logs if key in logs]
        return sum(values) / len(values)


def build(
    trainer_class, config_class, work: Work, gate: Gate, model, rows: list[dict], numbers: dict, *,
    objects: dict | None = None, extra=dict, **options,
):
    """A trainer with the scripts' optimizer that stops before every step; `numbers` and `extra`: see
    `Steps`."""
    cfg = work.cfg
    tokenizer = AutoTokenizer.from_pretrained(work.model_dir)
    tokenizer.bos_token = None  # CPOTrainer alone would put it before every prompt (tests/test_trl.py)
    rloo = work.kind == "rloo"
    together = work.N * (work.K if rloo else 1)
    size = cfg.peer_rows or together
    settings = {
        "output_dir": work.out_dir("trl"),
        "use_cpu": cfg.device == "cpu",
        "bf16": cfg.dtype == "bfloat16",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": together // size,
        "gradient_checkpointing": cfg.gradient_checkpointing,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-5,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,  # measures the norm, as ours; never clips
    }
    return trainer_class(
        model=model, args=config_class(**settings, **options), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Steps(gate, numbers, cfg.ppo_epochs if rloo else 1, extra)],
        **(objects or {}),
    )


def trl_patched(work: Work, gate: Gate) -> None:
    import trl.trainer.utils
    # there it decides one thing: whether only labelled positions go through the head
    trl.trainer.utils._use_triton = lambda device: True
    trl_training(work, gate)


def trl_training(work: Work, gate: Gate) -> None:
    trainer = {
        "rloo": rloo_trainer,
        "dpo": dpo_trainer,
        "simpo": simpo_trainer,
        "rm": rm_trainer,
        "sft": sft_trainer,
    }[work.kind]
    trainer(work, gate).train()


def pairs(work: Work) -> list[dict]:
    """Text, whose tokens are the work's; the trainers append the EOS themselves."""
    return [
        {"prompt": as_text(p), "chosen": as_text(group[0][:-1]), "rejected": as_text(group[-1][:-1])}
        for p, group in zip(*work.rows())
    ]


def same_names(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def dpo_trainer(work: Work, gate: Gate):
    from trl import DPOConfig, DPOTrainer
    return build(
        DPOTrainer, DPOConfig, work, gate, causal_lm(work), pairs(work),
        same_names("loss", "grad_norm", "logps/chosen", "logps/rejected"),
        objects={"ref_model": causal_lm(work)}, beta=0.05, max_length=None,
    )


def simpo_trainer(work: Work, gate: Gate):
    """Its "logps" are means."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    means = {f"mean_logps/{side}": f"logps/{side}" for side in ("chosen", "rejected")}
    return build(
        CPOTrainer, CPOConfig, work, gate, causal_lm(work), pairs(work),
        same_names("loss", "grad_norm") | means, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5,
        max_length=work.P + work.R,
    )


def rm_trainer(work: Work, gate: Gate):
    from trl import RewardConfig, RewardTrainer
    return build(
        RewardTrainer, RewardConfig, work, gate, reward_model(work), pairs(work),
        same_names("loss", "grad_norm") | {"margins": "margin"}, max_length=None,
    )


def sft_trainer(work: Work, gate: Gate):
    from trl import SFTConfig, SFTTrainer
    posts = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs(work)]
    return build(
        SFTTrainer, SFTConfig, work, gate, causal_lm(work), posts, same_names("loss", "grad_norm"),
        max_length=None, completion_only_loss=work.cfg.loss_on == "response",
    )


def rloo_trainer(work: Work, gate: Gate):
    from trl import RLOOConfig, RLOOTrainer
    given = work.given()
    seen = {}

    class Timed(RLOOTrainer):
        """RLOOTrainer with a stop-watch: it samples as ever, and then goes on with the completions that
        both sides share."""

        def _generate_single_turn(self, prompt_ids, *args):
            began = gate.now()
            super()._generate_single_turn(prompt_ids, *args)
            seen["rollout"] = gate.now() - began
            # the K copies of a prompt lie side by side
            return [given[tuple(prompt)][i % work.K] for i, prompt in enumerate(prompt_ids)]

        def _generate_and_score_completions(self, inputs):
            began = gate.now()
            batch = super()._generate_and_score_completions(inputs)
            seen["scoring"] = gate.now() - began - seen["rollout"]
            seen["surprisal"] = -(batch["old_logps"].sum() / batch["completion_mask"].sum()).item()
            return batch

    def extra() -> dict:
        parts = {name: seen[name] for name in ("rollout", "scoring")}
        parts["update"] = gate.now() - gate.began - sum(parts.values())
        return {"parts": parts, "check": {"surprisal": seen["surprisal"]}}

    prompts = [{"prompt": as_text(prompt)} for prompt, _ in zip(*work.rows())]
    return build(
        Timed, RLOOConfig, work, gate, causal_lm(work), prompts,
        same_names("loss", "grad_norm", "entropy") | {"score": "reward"},
        objects={"reward_funcs": reward_model(work)}, extra=extra, num_generations=work.K,
        num_iterations=work.cfg.ppo_epochs, max_completion_length=work.R, temperature=0.7, beta=0.05,
        shuffle_dataset=False,
    )


# --- transformers


def bare_sft(work: Work, gate: Gate) -> None:
    cfg = work.cfg
    model = causal_lm(work).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr, eps=1e-5, weight_decay=0.0, fused=True)
    prompts, responses = work.rows()
    rows = [prompt + group[0] for prompt, group in zip(prompts, responses)]
    ids = torch.tensor(rows, device=cfg.device)  # (N, P + R)
    learnt = work.R if cfg.loss_on == "response" else work.P + work.R - 1
    autocast = nullcontext()
    if cfg.dtype == "bfloat16":
        autocast = torch.autocast(torch.device(cfg.device).type, dtype=torch.bfloat16)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, logits_to_keep=learnt + 1, use_cache=False).logits[:, :-1]  # (N, learnt, V)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, -learnt:].flatten())

    loss_fn = torch.compile(loss_of) if cfg.compile else loss_of
    gate.ready()
    while True:
        with autocast:
            loss = loss_fn(ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done({"check": {"loss": loss.item(), "grad_norm": norm}})


def generation(work: Work, gate: Gate) -> None:
    """As the trainers do it: K copies of each prompt in one batch. Weights in the dtype of the products;
    --compile: a static cache, compiled."""
    cfg = work.cfg
    model = causal_lm(work, getattr(torch, cfg.dtype)).to(cfg.device).eval()
    prompts, _ = work.rows()
    ids = torch.tensor(prompts, device=cfg.device).repeat_interleave(work.K, 0)  # (N K, P)
    fixed = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1}
    if cfg.compile:
        fixed["cache_implementation"] = "static"

    def sample(tokens: int, **how) -> tuple[float, torch.Tensor]:
        began = gate.now()
        out = model.generate(ids, max_new_tokens=tokens, **fixed, **how)
        return gate.now() - began, out[:, work.P :]

    def greedy() -> list:
        return sample(GREEDY_TOKENS, do_sample=False)[1].tolist()

    time_generation(work, gate, greedy, lambda tokens: sample(tokens, **SAMPLING)[0])


TRAINING = {"trl": trl_training, "trl-patched": trl_patched, "transformers": bare_sft}
