"""Our side: the scripts' own `main`, held before every update, and generation as the scripts call it."""

import torch

import rlhf.common
import rlhf.run
import train_rloo
import train_rm
import train_sft
import train_simpo
from bench.sides import GREEDY_TOKENS, STEPS, Gate, time_generation
from bench.work import Work
from rlhf.generate import generate_all
from rlhf.model import compile_layers
from rlhf.pretrained import from_pretrained

SCRIPTS = {"rloo": train_rloo, "dpo": train_simpo, "simpo": train_simpo, "rm": train_rm, "sft": train_sft}
LOGGED = {  # what is compared: {name: key in metrics.jsonl}
    "rloo": {name: name for name in ("loss", "grad_norm", "surprisal", "entropy")} | {"score": "scores"},
    "dpo": {name: name for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected")},
    "simpo": {name: name for name in ("loss", "grad_norm", "mean_logps/chosen", "mean_logps/rejected")},
    "rm": {name: name for name in ("loss", "grad_norm", "margins")},
    "sft": {name: name for name in ("loss", "grad_norm")},
}


def options(work: Work) -> dict:
    """What a kind of work asks of its script beyond what all have."""
    if work.kind == "rloo":
        return {
            "reward_model": work.rm_dir,
            "k": work.K,
            "batch_size": work.N * work.K,
            "episodes": STEPS * work.N * work.K,
            "ppo_epochs": work.cfg.ppo_epochs,
            "missing_eos": "none",
            "rollout_prompts": work.N,
            "samples_every": 0,
        }
    given = {"epochs": STEPS, "batch_size": work.N}
    if work.kind in ("dpo", "simpo"):
        given["loss"] = work.kind
    if work.kind == "sft":
        given["loss_on"] = work.cfg.loss_on
    return given


def share_responses(work: Work) -> None:
    """train_rloo samples as ever, and then goes on with the responses that all sides share."""
    given = work.given()

    def sample_and_replace(policy, prompts, *args, **kwargs):
        _, ended = generate_all(policy, prompts, *args, **kwargs)
        return [given[tuple(prompt)] for prompt in prompts], torch.zeros_like(ended)

    train_rloo.generate_all = sample_and_replace


def training(work: Work, gate: Gate) -> None:
    class GatedRun(rlhf.run.Run):
        """The run's log, which after every update waits for the next go."""

        def begin(self, *args) -> int:
            gate.ready()
            return super().begin(*args)

        def log(self, step, metrics, show=()):
            super().log(step, metrics, show)
            compared = {name: metrics[key] for name, key in LOGGED[work.kind].items()}
            phases = [key for key in metrics if key.startswith("seconds/")]
            parts = {key.removeprefix("seconds/"): metrics[key] for key in phases}
            gate.done({"check": compared, "parts": parts})

    cfg = work.cfg
    script = SCRIPTS[work.kind]
    script.Run = GatedRun
    if work.kind == "rloo":
        share_responses(work)
    script.main(script.Config(
        data_dir=work.data_dir, model=work.model_dir, out_dir=work.out_dir("ours"), device=cfg.device,
        dtype=cfg.dtype, lr=work.lr, schedule="constant", weight_decay=0.0, save_every=0, compile=cfg.compile,
        micro_batch_tokens=cfg.micro_batch_tokens, gradient_checkpointing=cfg.gradient_checkpointing,
        **options(work),
    ))


def generation(work: Work, gate: Gate) -> None:
    device = torch.device(work.cfg.device)
    model = rlhf.common.frozen(from_pretrained(work.model_dir, device=device, dtype=work.cfg.dtype))
    if work.cfg.compile:
        compile_layers(model)
    prompts, _ = work.rows()
    generator = torch.Generator(device).manual_seed(1)

    def sample(tokens: int, temperature: float = 0.7) -> tuple[float, list]:
        began = gate.now()
        out, _ = generate_all(
            model, prompts, work.K, tokens, batch=work.N, temperature=temperature, generator=generator,
        )
        return gate.now() - began, [row for group in out for row in group]

    def greedy() -> list:
        return sample(GREEDY_TOKENS, temperature=0.0)[1]

    time_generation(work, gate, greedy, lambda tokens: sample(tokens)[0])
