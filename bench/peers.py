"""The sides of bench.py, each in a process of its own: our scripts, and the same work done by TRL's trainers and by transformers.

    ours          the script's own main, held before every update; for generation rlhf/generate.py as the scripts call it
    trl           RLOOTrainer, DPOTrainer, CPOTrainer (SimPO), RewardTrainer, SFTTrainer as they come; for generation what they call, transformers
    trl-patched   the same with the language-model head on the positions that predict a completion token only. On CUDA that is how TRL comes; on the
                  CPU it computes every position of every row
    transformers  for SFT a bare loop around the model (compiled under --compile), for generation model.generate

transformers and trl are imported where they are used: a side's memory holds only what the side needs. `task` is bench.Task, `cfg` its bench.Config.
"""

import multiprocessing
import os
import time
import traceback
from contextlib import nullcontext, suppress

import torch
import torch.nn.functional as F

import rlhf.common
import rlhf.run
from rlhf.config import RunError

STEPS = 1_000_000  # a run ends when nobody says go any more
SAMPLING = dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
GREEDY_TOKENS = 8


def does(side: str, work: str) -> bool:
    """Whether a peer has this work. A reward model has no head to patch, and TRL's SimPO makes its logits elsewhere."""
    works = {"ours": ("rloo", "dpo", "simpo", "rm", "sft", "generate"), "trl": ("rloo", "dpo", "simpo", "rm", "sft", "generate"),
             "trl-patched": ("rloo", "dpo", "sft"), "transformers": ("sft", "generate")}
    return work in works[side]


# --- processes


class Stopped(Exception):
    pass


def now(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Gate:
    """A side's end of the pipe: hands over what a step measured, waits for the word to go on, and keeps the time between."""

    def __init__(self, pipe, device: str):
        self.pipe, self.device, self.began = pipe, torch.device(device), 0.0

    def now(self) -> float:
        return now(self.device)

    def ready(self) -> None:
        self.wait({})

    def done(self, facts: dict) -> None:
        self.wait({"seconds": self.now() - self.began, "memory": self.peak_memory(), **facts})

    def wait(self, message: dict) -> None:
        self.pipe.send(message)
        if self.pipe.recv() == "stop":
            raise Stopped
        self.began = self.now()

    def peak_memory(self) -> int:
        """Bytes: of the card, or of this process since it began (VmHWM; ru_maxrss would include what the parent held when it forked)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024


def worker(pipe, side: str, task) -> None:
    log = open(task.out_dir(side) + ".log", "w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    if task.cfg.threads:
        torch.set_num_threads(task.cfg.threads)
    if task.cfg.untuned:
        rlhf.common.keep_freed_memory = lambda: None
    rlhf.common.setup(1, task.cfg.device)  # for the peers too: the allocator on the CPU, TF32 on CUDA
    try:
        gate, work = Gate(pipe, task.cfg.device), "generate" if task.work == "generate" else "train"
        {"ours": {"train": our_training, "generate": our_generation}, "transformers": {"train": bare_sft, "generate": their_generation},
         "trl": {"train": trl_training, "generate": their_generation}, "trl-patched": {"train": trl_patched}}[side][work](task, gate)
    except Stopped:
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


class Side:
    """The bench's end: a process that makes one step whenever it is told to."""

    def __init__(self, name: str, task):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, name, task), daemon=True)
        self.process.start()
        theirs.close()
        self.receive()

    def receive(self) -> dict:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RunError(f"{self.name} died with exit code {self.process.exitcode}: out of memory? --sequential holds one side at a time") from None
        if "error" in message:
            raise RunError(f"{self.name} failed:\n{message['error']}")
        return message

    def step(self) -> dict:
        with suppress(BrokenPipeError):  # it has died: receive() says so
            self.pipe.send("go")
        return self.receive()

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send("stop")
        self.process.join(60)


# --- ours

LOGGED = {  # what is compared: {name: key in metrics.jsonl}
    "rloo": {"loss": "loss", "grad_norm": "grad_norm", "surprisal": "surprisal", "entropy": "entropy", "score": "scores"},
    "dpo": {name: name for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected")},
    "simpo": {name: name for name in ("loss", "grad_norm", "mean_logps/chosen", "mean_logps/rejected")},
    "rm": {"loss": "loss", "grad_norm": "grad_norm", "margins": "margins"},
    "sft": {"loss": "loss", "grad_norm": "grad_norm"},
}


def our_training(task, gate: Gate) -> None:
    import train_rloo
    import train_rm
    import train_sft
    import train_simpo
    cfg, script = task.cfg, {"rloo": train_rloo, "dpo": train_simpo, "simpo": train_simpo, "rm": train_rm, "sft": train_sft}[task.work]
    options = {"epochs": STEPS, "batch_size": task.N}
    if task.work == "rloo":
        options = dict(reward_model=task.rm_dir, k=task.K, batch_size=task.N * task.K, episodes=STEPS * task.N * task.K, ppo_epochs=1,
                       missing_eos="none", rollout_prompts=task.N)
        given, sample = {tuple(p): r for p, r in zip(*task.rows())}, train_rloo.generate_all

        def generate_all(policy, prompts, *args, **kwargs):
            _, ended = sample(policy, prompts, *args, **kwargs)
            return [given[tuple(p)] for p in prompts], torch.zeros_like(ended)

        train_rloo.generate_all = generate_all
    elif task.work in ("dpo", "simpo"):
        options["loss"] = task.work
    elif task.work == "sft":
        options["loss_on"] = cfg.loss_on

    class Gated(rlhf.run.Run):
        """The run's log, which after every update waits for the next go."""

        def begin(self, *args) -> int:
            gate.ready()
            return super().begin(*args)

        def log(self, step, metrics, show=()):
            super().log(step, metrics, show)
            parts = {key.split("/")[1]: value for key, value in metrics.items() if key.startswith("seconds/")}
            gate.done({"check": {name: metrics[key] for name, key in LOGGED[task.work].items()}, "parts": parts})

    script.Run = Gated
    script.main(script.Config(data_dir=task.data_dir, model=task.model_dir, out_dir=task.out_dir("ours"), device=cfg.device, dtype=cfg.dtype,
                              lr=task.lr, schedule="constant", weight_decay=0.0, save_every=0, compile=cfg.compile,
                              micro_batch_tokens=cfg.micro_batch_tokens, gradient_checkpointing=cfg.gradient_checkpointing, **options))


def our_generation(task, gate: Gate) -> None:
    from rlhf.generate import generate_all
    from rlhf.model import compile_layers
    from rlhf.pretrained import from_pretrained
    device = torch.device(task.cfg.device)
    model = rlhf.common.frozen(from_pretrained(task.model_dir, device=device), device, task.cfg.dtype)
    if task.cfg.compile:
        compile_layers(model)
    prompts, generator = task.rows()[0], torch.Generator(device).manual_seed(1)

    def sample(tokens: int, temperature: float = 0.7) -> tuple[float, list]:
        began = gate.now()
        with rlhf.common.autocast(device, task.cfg.dtype):
            out, _ = generate_all(model, prompts, task.K, tokens, batch=task.N, temperature=temperature, generator=generator)
        return gate.now() - began, [row for group in out for row in group]

    time_generation(task, gate, lambda: sample(GREEDY_TOKENS, temperature=0.0)[1], lambda tokens: sample(tokens)[0])


def time_generation(task, gate: Gate, greedy, seconds_of) -> None:
    """Steps of a side that only generates: the first tells its greedy tokens, the others time the prefill alone and the whole."""
    gate.ready()
    gate.done({"check": {"greedy": greedy()}})
    while True:
        prefill, whole = seconds_of(1), seconds_of(task.R)
        gate.done({"parts": {"prefill": prefill, "decode": whole - prefill}, "seconds": whole})


# --- TRL


def causal_lm(task, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(task.model_dir, dtype=dtype)


def reward_model(task):
    from transformers import AutoModelForSequenceClassification
    return AutoModelForSequenceClassification.from_pretrained(task.rm_dir, dtype=torch.float32)


def build(trainer_class, config_class, task, gate: Gate, model, rows: list[dict], numbers: dict, objects: dict | None = None, extra=dict, **options):
    """A trainer with the scripts' optimizer that stops before every step. `numbers`: {name: key in its log line}; `extra()`: what it does not log."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            gate.ready()

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:  # not the summary at the end
                more = extra()
                gate.done({**more, "check": {name: logs[key] for name, key in numbers.items()} | more.get("check", {})})

    cfg, tokenizer = task.cfg, AutoTokenizer.from_pretrained(task.model_dir)
    tokenizer.bos_token = None  # CPOTrainer would put it before every prompt (tests/test_trl.py); the others do not
    together = task.N * (task.K if task.work == "rloo" else 1)
    size = cfg.peer_rows or together
    settings = dict(output_dir=task.out_dir("trl"), use_cpu=cfg.device == "cpu", bf16=cfg.dtype == "bfloat16", report_to="none", save_strategy="no",
                    disable_tqdm=True, logging_steps=1, max_steps=STEPS, per_device_train_batch_size=size,
                    gradient_accumulation_steps=together // size, gradient_checkpointing=cfg.gradient_checkpointing, learning_rate=task.lr,
                    lr_scheduler_type="constant", adam_epsilon=1e-5,
                    weight_decay=0.0, max_grad_norm=1e9)  # measures the norm, as ours; never clips
    return trainer_class(model=model, args=config_class(**settings, **options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         callbacks=[Steps()], **(objects or {}))


def trl_patched(task, gate: Gate) -> None:
    import trl.trainer.utils
    trl.trainer.utils._use_triton = lambda device: True  # there it decides one thing: whether only labelled positions go through the head
    trl_training(task, gate)


def trl_training(task, gate: Gate) -> None:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    prompts, responses = task.rows()
    keys = {name: name for name in LOGGED[task.work]}
    # text, whose tokens are the task's; the trainers append the EOS themselves
    pairs = [{"prompt": task.text(p), "chosen": task.text(r[0][:-1]), "rejected": task.text(r[-1][:-1])} for p, r in zip(prompts, responses)]
    if task.work == "rloo":
        trainer = rloo_trainer(task, gate, prompts, responses)
    elif task.work == "dpo":
        trainer = build(DPOTrainer, DPOConfig, task, gate, causal_lm(task), pairs, keys, {"ref_model": causal_lm(task)}, beta=0.05, max_length=None)
    elif task.work == "simpo":  # its "logps" are means
        keys |= {f"mean_logps/{side}": f"logps/{side}" for side in ("chosen", "rejected")}
        trainer = build(CPOTrainer, CPOConfig, task, gate, causal_lm(task), pairs, keys, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5,
                        max_length=task.P + task.R)
    elif task.work == "rm":
        trainer = build(RewardTrainer, RewardConfig, task, gate, reward_model(task), pairs, keys | {"margins": "margin"}, max_length=None)
    else:
        posts = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
        trainer = build(SFTTrainer, SFTConfig, task, gate, causal_lm(task), posts, keys, max_length=None,
                        completion_only_loss=task.cfg.loss_on == "response")
    trainer.train()


def rloo_trainer(task, gate: Gate, prompts: list, responses: list):
    from trl import RLOOConfig, RLOOTrainer
    given, seen = {tuple(p): r for p, r in zip(prompts, responses)}, {}

    class Timed(RLOOTrainer):
        """RLOOTrainer with a stop-watch: it samples as ever, and then goes on with the completions that both sides share."""

        def _generate_single_turn(self, prompt_ids, *args):
            began = gate.now()
            super()._generate_single_turn(prompt_ids, *args)
            seen["rollout"] = gate.now() - began
            return [given[tuple(p)][i % task.K] for i, p in enumerate(prompt_ids)]  # the K copies of a prompt lie side by side

        def _generate_and_score_completions(self, inputs):
            began = gate.now()
            batch = super()._generate_and_score_completions(inputs)
            seen["scoring"] = gate.now() - began - seen["rollout"]
            seen["surprisal"] = -(batch["old_logps"].sum() / batch["completion_mask"].sum()).item()
            return batch

    def extra() -> dict:
        before = {name: seen[name] for name in ("rollout", "scoring")}
        return {"parts": before | {"update": gate.now() - gate.began - sum(before.values())}, "check": {"surprisal": seen["surprisal"]}}

    return build(Timed, RLOOConfig, task, gate, causal_lm(task), [{"prompt": task.text(p)} for p in prompts],
                 {"loss": "loss", "grad_norm": "grad_norm", "entropy": "entropy", "score": "reward"}, {"reward_funcs": reward_model(task)}, extra,
                 num_generations=task.K, max_completion_length=task.R, temperature=0.7, beta=0.05, shuffle_dataset=False)


# --- transformers


def bare_sft(task, gate: Gate) -> None:
    cfg, model = task.cfg, causal_lm(task).to(task.cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, eps=1e-5, weight_decay=0.0, fused=True)
    ids = torch.tensor([p + r[0] for p, r in zip(*task.rows())], device=cfg.device)  # (N, P + R)
    learnt = task.R if cfg.loss_on == "response" else task.P + task.R - 1

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, logits_to_keep=learnt + 1, use_cache=False).logits[:, :-1].float()  # (N, learnt, V)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -learnt:].flatten())

    loss_fn = torch.compile(loss_of) if cfg.compile else loss_of
    gate.ready()
    while True:
        with torch.autocast(torch.device(cfg.device).type, dtype=torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext():
            loss = loss_fn(ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done({"check": {"loss": loss.item(), "grad_norm": norm}})


def their_generation(task, gate: Gate) -> None:
    """As the trainers do it: K copies of each prompt in one batch. Weights in the dtype of the products; --compile: a static cache, compiled."""
    model = causal_lm(task, getattr(torch, task.cfg.dtype)).to(task.cfg.device).eval()
    ids = torch.tensor(task.rows()[0], device=task.cfg.device).repeat_interleave(task.K, 0)  # (N K, P)
    static = {"cache_implementation": "static"} if task.cfg.compile else {}

    def sample(tokens: int, **how) -> tuple[float, torch.Tensor]:
        began = gate.now()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=1, **static, **how)
        return gate.now() - began, out[:, task.P :]

    time_generation(task, gate, lambda: sample(GREEDY_TOKENS, do_sample=False)[1].tolist(), lambda tokens: sample(tokens, **SAMPLING)[0])
