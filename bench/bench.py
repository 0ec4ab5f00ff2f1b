"""Speed and memory beside TRL and transformers, and beside what the machine could do.

    python bench.py --work=rloo --model=pythia-14m --peer=trl,trl-patched      one row of the table in the README
    python bench.py --work=generate --model=pythia-70m --peer=transformers --sweep=k

All sides get the same random weights (Pythia's shapes), prompts and completions. Each runs in a process of its own: ours is the script's `main`,
held before every update, theirs the trainer's `train` (peers.py). The first update is compared (loss, gradient norm, log-probs), then there is
warm-up, then the sides take turns, and only one works at a time. The floor is the arithmetic of the work at the rate of matrix products or its bytes
at the rate of a copy, whichever takes longer, both rates measured here; it counts a shared prompt once, the head only where a token is predicted,
and no number twice. Responses have a fixed length; RLOO samples and is timed on each side, and goes on with the shared completions.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from bench import peers
from rlhf.common import setup
from rlhf.config import RunError, UserError, command_line
from rlhf.out_dir import describe
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, save_pretrained
from rlhf.matmul import linear

SHAPES = {  # width, layers, heads of the Pythia suite
    "pythia-14m": (128, 6, 4), "pythia-31m": (256, 6, 8), "pythia-70m": (512, 6, 8), "pythia-160m": (768, 12, 12), "pythia-410m": (1024, 24, 16),
    "pythia-1b": (2048, 16, 8), "pythia-1.4b": (2048, 24, 16), "pythia-2.8b": (2560, 32, 32), "pythia-6.9b": (4096, 32, 32),
}
VOCABULARY = 50304
# prompts, responses per prompt, response tokens
WORKS = {"rloo": (8, 4, 53), "dpo": (4, 2, 53), "simpo": (4, 2, 53), "rm": (4, 2, 126), "sft": (4, 1, 53), "generate": (8, 4, 53)}
SWEEPS = {"k": (1, 2, 4, 8, 16), "prompt": (128, 256, 512, 1024, 2048), "batch": (1, 2, 4, 8, 16), "model": tuple(SHAPES)[:5]}


@dataclass(frozen=True, kw_only=True)
class Config:
    # what
    work: str = "rloo,dpo,simpo,rm,sft,generate"  # which of these, joined by commas
    model: str = "pythia-70m"  # a shape of the Pythia suite, 14m to 6.9b, with random weights
    peer: str = "trl"  # trl, trl-patched, transformers, joined by commas; none = only ours beside the floor
    sweep: Literal["", "k", "prompt", "batch", "model"] = ""  # how the cost grows with this, everything else fixed
    # size
    prompts: int = 0  # prompts, pairs or posts (0 = 8 for rloo and generate, 4 elsewhere)
    k: int = 0  # responses per prompt of rloo and generate (0 = 4)
    prompt_tokens: int = 512  # tokens of each prompt
    response_tokens: int = 0  # tokens of each response (0 = 53, for rm 126)
    loss_on: Literal["all", "response"] = "all"  # sft: the tokens that are learnt
    # how
    device: str = "cpu"  # cpu or cuda
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    threads: int = 0  # CPU threads (0 = torch's choice)
    compile: bool = False  # torch.compile ours and the bare transformers loop
    untuned: bool = False  # leave the memory allocator as it is, on all sides
    micro_batch_tokens: int = 8192  # ours: tokens in one forward and backward
    peer_rows: int = 0  # TRL: rows in one forward and backward, the rest by gradient accumulation (0 = all)
    gradient_checkpointing: bool = False  # ours and TRL
    # measuring
    repeats: int = 5  # timed steps of each side
    warmup: int = 2  # steps of each side that are not timed, after the one that is compared
    sequential: bool = False  # one side after the other instead of in turns: for models that fit the memory only once


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work of one size, as every process gets it: N prompts of P tokens, K responses of R tokens to each."""

    work: str
    model: str
    N: int
    K: int
    P: int
    R: int
    folder: str
    cfg: Config
    lr: float = 1e-6

    @property
    def positions(self) -> int:
        return max(2048, self.P + self.R)

    @property
    def model_dir(self) -> str:
        return f"{Path(self.folder).parent}/{self.model}-{self.positions}"

    @property
    def rm_dir(self) -> str:
        return f"{self.model_dir}-rm"

    @property
    def data_dir(self) -> str:
        return f"{self.folder}/data"

    def out_dir(self, side: str) -> str:
        return f"{self.folder}/{side}"

    def rows(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Prompts and their responses, random tokens; the last token of a response is EOS where the work learns from given responses."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, VOCABULARY, (self.N, self.P + self.K * self.R), generator=generator)
        responses = ids[:, self.P :].reshape(self.N, self.K, self.R).clone()
        if self.work not in ("rloo", "generate"):
            responses[:, :, -1] = 0
        return ids[:, : self.P].tolist(), responses.tolist()

    @staticmethod
    def text(ids: list[int]) -> str:
        """One private-use character per token: text that has exactly these tokens, alone and joined to other text."""
        return "".join(chr(0xF0000 + i) for i in ids)


def make_task(cfg: Config, work: str, value, folder: str) -> Task:
    """The work at its default size, at the size of the command line, or with `value` of what is swept."""
    N, K, R = WORKS[work]
    size = dict(model=cfg.model, N=cfg.prompts or N, K=K, P=cfg.prompt_tokens)
    if work in ("rloo", "generate"):
        size["K"] = cfg.k or K
    if cfg.sweep:
        size[{"k": "K", "prompt": "P", "batch": "N", "model": "model"}[cfg.sweep]] = value
    if cfg.peer_rows and size["N"] * (size["K"] if work == "rloo" else 1) % cfg.peer_rows:
        raise UserError(f"--peer_rows={cfg.peer_rows} does not divide the rows of {work}")
    return Task(work=work, R=cfg.response_tokens or R, folder=folder, cfg=cfg, **size)


# --- what all sides read


def tokenizer() -> Tokenizer:
    vocabulary = {"<|endoftext|>": 0, "<|padding|>": 1} | {chr(0xF0000 + i): i for i in range(2, VOCABULARY)}
    out = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    out.pre_tokenizer, out.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    out.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    return out


def write_models(task: Task) -> None:
    """A language model and a reward model on its backbone, weights N(0, 1/C): logits of size 1 whatever the width. Read as float32."""
    width, layers, heads = SHAPES[task.model]
    config = NeoXConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                        max_position_embeddings=task.positions, initializer_range=width**-0.5)
    save_pretrained(NeoX(config).init_weights(1), tokenizer(), Path(task.model_dir), dtype=torch.bfloat16)  # half the disk, all sides round alike
    reward_model = from_pretrained(task.model_dir, head="score", new_head=True, seed=1)  # what train_rm.py starts from
    save_pretrained(reward_model, tokenizer(), Path(task.rm_dir))


def write_data(task: Task) -> None:
    """A prepared data directory of exactly one batch, which every update sees again."""
    folder = Path(task.data_dir)
    folder.mkdir(parents=True)
    prompts, responses = task.rows()
    sft = {"query_token": prompts, "reference_response_token": [r[0] for r in responses]}
    pairs = {"query_token": prompts, "chosen_token": [r[0] for r in responses], "rejected_token": [r[-1] for r in responses]}
    for name, table in (("sft_train", sft), ("sft_validation", sft), ("pairs_train", pairs), ("pairs_validation", pairs)):
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    (folder / "meta.json").write_text(json.dumps({"world": "bench", "response_tokens": task.R}))
    tokenizer().save(str(folder / "tokenizer.json"))


# --- the floor


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Best rates seen here: matrix products in FLOP/s (the better of torch.mm, which is what the peers call, and rlhf.products), torch.mm alone, and a copy
    in bytes read and written per second."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, out = (torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(2))

    def best(work) -> float:
        times = []
        for _ in range(10):
            began = peers.now(device)
            work()
            times.append(peers.now(device) - began)
        return min(times)

    product = torch.empty_like(a)
    mm = 2 * size**3 / best(lambda: torch.mm(a, b, out=product))
    return {"flops": max(mm, 2 * size**3 / best(lambda: linear(a, b))), "mm": mm, "bytes": 2 * length / best(lambda: out.copy_(source))}


def costs(task: Task) -> dict[str, tuple[float, float]]:
    """{part: (FLOPs, bytes)} that the work cannot do without. Bytes: weights once per pass, the cache of decoding, AdamW's state; no activations."""
    C, L, _ = SHAPES[task.model]
    N, K, P, R, size = task.N, task.K, task.P, task.R, 2 if task.cfg.dtype == "bfloat16" else 4
    body, head = 12 * C * C * L, VOCABULARY * C
    one = size * (body + head)  # the weights of a language model, read once

    def forward(predicted: int, K: int = K) -> float:
        pairs = P * (P + 1) / 2 + K * (R * P + R * (R + 1) / 2)  # who looks at whom, per prompt
        return 2 * body * N * (P + K * R) + 4 * C * L * N * pairs + 2 * head * predicted

    past = sum(P + t for t in range(1, R))  # tokens that a sequence looks at while it is decoded
    prefill = forward(N, K=0), one
    decode = (N * K * (2 * (body + head) * (R - 1) + 4 * C * L * past),
              (R - 1) * (one + size * 2 * C * L * N * (P + K * R / 2)))
    adamw = 0, 28 * (body + 2 * head)  # reads weight, gradient and two moments, writes all but the gradient, in float32
    response = N * K * R
    learnt = N * (P + R - 1) if task.work == "sft" and task.cfg.loss_on == "all" else 0 if task.work == "rm" else response
    update = 3 * forward(learnt), 3 * one
    return {
        "generate": {"prefill": prefill, "decode": decode},
        # the forward of the policy that scores is the one that learns
        "rloo": {"rollout": prefill, "rollout/decode": decode, "scoring": (2 * forward(response) + forward(0), 3 * one),
                 "update": (2 * forward(response), 2 * one), "update/adamw": adamw},
        "dpo": {"reference": (forward(response), one), "update": update, "update/adamw": adamw},
    }.get(task.work, {"update": update, "update/adamw": adamw})


def floor(task: Task, rates: dict) -> dict[str, float]:
    """{part: seconds}, of each entry of `costs` the longer of arithmetic and bytes, added up under the name before the slash."""
    out: dict[str, float] = {}
    for name, (flops, bytes_) in costs(task).items():
        part = name.split("/")[0]
        out[part] = out.get(part, 0.0) + max(flops / rates["flops"], bytes_ / rates["bytes"])
    return out


# --- measuring


def compare(task: Task, name: str, ours: dict, theirs: dict) -> dict[str, float]:
    """Largest difference of the first update's numbers, relative to the larger of 1 and the number. RunError if it was not the same work."""
    exact = task.cfg.dtype == "float32" and task.cfg.device == "cpu"
    if task.work == "generate":  # a token may differ where two are as likely, and then everything after it
        first = [a[0] == b[0] for a, b in zip(ours["greedy"], theirs["greedy"], strict=True)]
        share = sum(first) / len(first)
        if share < (0.95 if exact else 0.5):
            raise RunError(f"{name} and ours begin {share:.0%} of the greedy answers alike: not the same model")
        return {"equal first tokens": share}
    differences = {key: abs(ours[key] - theirs[key]) / max(1.0, abs(ours[key]), abs(theirs[key])) for key in ours}
    if not all(difference <= (1e-3 if exact else 5e-2) for difference in differences.values()):  # nan is not all right
        raise RunError(f"{name} and ours did not compute the same: " + ", ".join(f"{key} {ours[key]:.6g} and {theirs[key]:.6g}" for key in ours))
    return differences


def measure(task: Task, names: list[str]) -> tuple[dict[str, list[dict]], dict]:
    """{side: its timed steps}, {peer: largest differences to ours}. Sides in turns, or one after the other."""
    first, steps, same = {}, {name: [] for name in names}, {}
    for group in [[name] for name in names] if task.cfg.sequential else [names]:
        sides = []
        try:
            for name in group:
                sides.append(peers.Side(name, task))
            for side in sides:
                first[side.name] = side.step()
                if side.name != "ours":
                    same[side.name] = compare(task, side.name, first["ours"]["check"], first[side.name]["check"])
            for turn in range(task.cfg.warmup + task.cfg.repeats):
                for side in sides:
                    result = side.step()
                    if turn >= task.cfg.warmup:
                        steps[side.name].append(result)
        finally:
            for side in sides:
                side.close()
    return steps, same


def summary(task: Task, steps: dict[str, list[dict]], same: dict, rates: dict) -> dict:
    """What is printed and what the JSON line holds, for one task."""
    parts = floor(task, rates)
    tokens = task.N * task.K * (task.R if task.work in ("rloo", "generate") else task.P + task.R)
    flops = sum(cost[0] for cost in costs(task).values())
    out = {"work": task.work, "model": task.model, "prompts": task.N, "k": task.K, "prompt_tokens": task.P, "response_tokens": task.R,
           "gflop": flops / 1e9, "floor": {"seconds": sum(parts.values()), **parts}, "differences": same, "sides": {}}
    for name, results in steps.items():
        seconds = [r["seconds"] for r in results]
        median = statistics.median(seconds)
        out["sides"][name] = {
            "seconds": median, "min": min(seconds), "max": max(seconds), "tokens_per_second": tokens / median,
            "peak_gib": max(r["memory"] for r in results) / 2**30, "over_floor": median / sum(parts.values()),
            "share_of_peak_flops": flops / median / rates["flops"],
            "parts": {part: statistics.median(r["parts"][part] for r in results) for part in results[0].get("parts", {})}}
    mine = out["sides"]["ours"]
    for side in out["sides"].values():
        side["ratio"] = side["seconds"] / mine["seconds"]
        side["memory_ratio"] = side["peak_gib"] / mine["peak_gib"]
    return out


def show(task: Task, result: dict) -> None:
    if task.cfg.sweep:
        times = (f"{name} {s['seconds']:.3f} s ({s['over_floor']:.2f} x floor, {s['ratio']:.2f} x ours, {s['peak_gib']:.2f} GiB)"
                 for name, s in result["sides"].items())
        size = f"{task.work}, {task.model}, {task.N} prompts x {task.K}, {task.P} + {task.R}"
        return print(f"{size}: floor {result['floor']['seconds']:.3f} s; " + "; ".join(times))
    unit = "sampled tokens/s" if task.work in ("rloo", "generate") else "tokens/s"
    print(f"\n{task.work}, {task.model}, {task.N} prompts x {task.K}, {task.P} + {task.R} tokens; floor {result['floor']['seconds']:.3f} s "
          f"({result['gflop']:.0f} GFLOP)")
    for peer, numbers in result["differences"].items():
        print(f"  {peer} computes the same: " + ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()))
    print(f"  {'':14}{'median':>10}{'min':>10}{'max':>10}  {unit:>16}{'peak GiB':>10}{'x floor':>9}{'of peak':>9}{'ours is':>10}{'memory':>8}")
    for name, s in result["sides"].items():
        print(f"  {name:14}{s['seconds']:9.3f}s{s['min']:9.3f}s{s['max']:9.3f}s  {s['tokens_per_second']:16.0f}{s['peak_gib']:10.2f}"
              f"{s['over_floor']:9.2f}{s['share_of_peak_flops']:9.1%}{s['ratio']:9.2f}x{s['memory_ratio']:7.2f}x")
    shown = {name: s["parts"] for name, s in result["sides"].items()} | {"floor": {k: v for k, v in result["floor"].items() if k != "seconds"}}
    for name, parts in shown.items():
        step = f"; {parts['decode'] / (task.R - 1) * 1e3:.2f} ms per decode step" if "decode" in parts and task.R > 1 else ""
        if parts:
            print(f"  {name:14}" + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()) + step)


def checked(cfg: Config) -> tuple[list[str], list[str]]:
    works, sides = cfg.work.split(","), [] if cfg.peer == "none" else cfg.peer.split(",")
    for option, values, known in (("work", works, WORKS), ("peer", sides, ("trl", "trl-patched", "transformers")), ("model", [cfg.model], SHAPES)):
        if unknown := [v for v in values if v not in known]:
            raise UserError(f"--{option}={','.join(unknown)}: known are {', '.join(known)}")
    if cfg.sweep == "k" and not set(works) <= {"rloo", "generate"}:
        raise UserError("--sweep=k: only rloo and generate have a number of responses to choose")
    if cfg.k == 1 and "rloo" in works:
        raise UserError("--k=1: RLOO's leave-one-out baseline needs at least 2 responses per prompt")
    return works, ["ours", *sides]


def main(cfg: Config) -> dict:
    works, sides = checked(cfg)
    device = setup(1, cfg.device)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    about, results = describe(cfg), []
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
    allocator = "as it is" if cfg.untuned else "tuned on all sides (rlhf.common.setup: freed memory is kept)"
    seen: list[dict] = []  # ceilings before the first task and after each: the best counts, a busy moment shows

    def best_rates() -> dict[str, float]:
        seen.append(ceilings(device, getattr(torch, cfg.dtype)))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the card is the sides'
        return {key: max(rates[key] for rates in seen) for key in seen[0]}

    best_rates()
    print(f"{cpu}, {about['device']}, torch {about['torch']}, {cfg.dtype}, commit {about['commit']}; memory allocator {allocator}")
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            able = [side for side in sides if peers.does(side, work)]
            if able != sides:
                print(f"\n{work}: not with {', '.join(sorted(set(sides) - set(able)))}")
            for value in SWEEPS[cfg.sweep] if cfg.sweep else (None,):
                task = make_task(cfg, work, value, f"{folder}/{work}-{value}")
                if work == "rloo" and task.K < 2:
                    continue  # no leave-one-out baseline
                if not Path(task.rm_dir).exists():
                    write_models(task)
                write_data(task)
                measured = measure(task, able)
                results.append(summary(task, *measured, best_rates()))
                show(task, results[-1])
    ceiling = {name: [rates[key] / 1e9 for rates in seen] for key, name in (("flops", "gflops"), ("mm", "gflops_mm"), ("bytes", "gbytes"))}
    print(f"\nceilings measured here, before and after: {' '.join(f'{x:.0f}' for x in ceiling['gflops'])} GFLOP/s in matrix products "
          f"({max(ceiling['gflops_mm']):.0f} by torch.mm), {' '.join(f'{x:.1f}' for x in ceiling['gbytes'])} GB/s in a copy; floors take the best so far")
    if any(min(values) < 0.85 * max(values) for values in ceiling.values()):
        print("THE MACHINE WAS BUSY OR THROTTLED AT TIMES: these differ by more than 15 %, so measure again when nothing else runs")
    out = {**about, "cpu": cpu, **{name: max(values) for name, values in ceiling.items()}, "results": results}
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    command_line(main, Config)
