"""What every script needs around its algorithm: device and seed, precision, optimizer and schedule, timer."""

import ctypes
import math
import time
from functools import partial

import torch
from torch import nn

from rlhf.config import RunError, UserError
from rlhf.data import check_tokenizer
from rlhf.dist import by_kind, gradient_norm, join, parameters, sum_gradients
from rlhf.fast import paths, set_up_cuda
from rlhf.logprobs import compile_kernels
from rlhf.model import NeoX, compile_layers
from rlhf.pretrained import from_pretrained, load_tokenizer


def setup(seed: int, device: str, plain: bool = False, rank_timeout: float = 600.0) -> torch.device:
    """Seeds torch, picks the device ("auto": cuda if there is one; under torchrun each rank its own) and sets
    up what makes it fast (`plain`: leaves out what needs a compiler, see fast.py).

    Raises UserError for a device that torch does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = join(device, rank_timeout)
    try:
        chosen = torch.empty(1, device=device).device  # with its number: cuda is cuda:0
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={device}: {reason}; --device=cpu is always there") from error
    torch.manual_seed(seed)
    paths.plain = plain
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # a CUDA graph is recorded on the current device
        set_up_cuda()
    else:
        keep_freed_memory()
    return chosen


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed buffers instead of unmapping them.

    To map fresh pages costs more time than the arithmetic on them.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's top is not given back
    except (OSError, AttributeError):  # not glibc: only slower
        pass


def load_model(
    path_or_id: str, *, data_dir: str, revision: str, device: torch.device, dtype: str,
    compiled: bool = False, **options,
) -> NeoX:
    """`from_pretrained` and its options, for a script: a model that knows the tokens of the prepared data,
    `compiled` by torch.compile."""
    model = from_pretrained(path_or_id, revision=revision, device=device, dtype=dtype, **options)
    tokenizer = load_tokenizer(path_or_id, revision)
    check_tokenizer(data_dir, tokenizer, model.config.vocab_size, path_or_id)
    if compiled and not paths.plain:
        compile_kernels()
        compile_layers(model)
    return model


def load_models(cfg, device: torch.device, reward_models: str) -> list[NeoX]:
    """Policy, reference and reward models (joined by ',', or none) of a script that samples, sharded over the
    ranks; the policy learns."""
    load = partial(
        load_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype,
        compiled=cfg.compile, sharded=True,
    )
    models = [load(cfg.model), frozen(load(cfg.ref_model or cfg.model))]
    names = filter(None, reward_models.split(","))
    return models + [frozen(load(name, head="score")) for name in names]


def frozen(model: NeoX) -> NeoX:
    """The model, in place, for inference only: its matrices are kept in `matmul_dtype`.

    In bfloat16 that halves the memory and saves the cast of all weights at every forward; the numbers are the
    same. Embedding, norms and a reward head stay float32, as under autocast.
    """
    model.eval().requires_grad_(False)
    embedding = model.gpt_neox.embed_in.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "score" and module.weight is not embedding:
            module.to(model.matmul_dtype)
    return model


def adamw(model: nn.Module, lr: float, *, eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on all parameters alike, with torch's betas (github vwxyzjn/summarize_from_feedback_details)."""
    groups = [{"params": kind} for kind in by_kind(list(model.parameters()))]
    return torch.optim.AdamW(groups, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of update `step` of `total`.

    Linear warm-up over the share `warmup` of all updates, then "cosine" or "linear" to 0, or "constant".
    """
    warm = round(warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    decay = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * decay[schedule]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, max_grad_norm: float, step: int,
) -> float:
    """Clips the gradient (0: does not), updates the weights, clears the gradient; returns its unclipped norm.

    Raises RunError, before the update, if the loss or the norm is not finite.
    """
    learnt = [p for p in parameters(model).values() if p.grad is not None]
    sum_gradients(learnt)
    norms = [gradient_norm([p.grad for p in kind]) for kind in by_kind(learnt)]
    norm = math.hypot(*norms)
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise RunError(f"step {step}: loss {loss}, gradient norm {norm}: not finite. The weights were not "
                       "updated, and --resume would come here again: start anew with a lower --lr or with "
                       "--max_grad_norm=1, or go on from a checkpoint of it with --model=.../ckpt/step_N")
    for kind in by_kind(learnt) if max_grad_norm else []:
        nn.utils.clip_grads_with_norm_(kind, max_grad_norm, torch.tensor(norm, device=kind[0].device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Timer:
    """Seconds spent in each named phase.

    On CUDA they are measured by events in the queue: `lap` does not wait for the device, `seconds` does.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.laps = [("", self.now())]

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        self.laps.append((phase, self.now()))

    @property
    def seconds(self) -> dict[str, float]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        out: dict[str, float] = {}
        for (_, began), (phase, ended) in zip(self.laps, self.laps[1:]):
            spent = began.elapsed_time(ended) / 1e3 if cuda else ended - began
            out[phase] = out.get(phase, 0.0) + spent
        return out

    def metrics(self, tokens: int, **passes: int) -> dict[str, float]:
        """seconds/<phase>, their sum as seconds, and tokens_per_second/<phase> for the phases in `passes`.

        passes: phase=how often it went over these `tokens` response tokens.
        """
        seconds = self.seconds
        return {
            **{f"seconds/{phase}": spent for phase, spent in seconds.items()},
            "seconds": sum(seconds.values()),
            **{f"tokens_per_second/{phase}": n * tokens / seconds[phase] for phase, n in passes.items()},
        }
