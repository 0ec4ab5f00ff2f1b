"""What a rank of a test does (ranks.py): scripts' `main` or command lines, one after the other in one group
of ranks, and measurements. A job may break something first, for the twin of a test, each rank may stand in a
folder of its own, and one may be killed or stopped on the way."""

import ctypes
import gc
import json
import os
import re
import runpy
import sys
import threading
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

import rlhf.checkpoint
import rlhf.common
import rlhf.generate
import rlhf.pretrained
from rlhf import dist
from rlhf.common import setup
from rlhf.config import RunError, UserError
from rlhf.forward import summed_nll
from rlhf.groups import pack
from rlhf.memory import HEAP_GAPS
from rlhf.model import NeoX, compile_layers
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained
from rlhf.run import Run

TRAINING = ("train_sft", "train_rm", "train_simpo", "train_rloo", "train_ppo", "train_online")
SCRIPTS = (*TRAINING, "evaluate", "sample", "study.best_of_n")
torch.set_num_threads(1)

generate, gather, shard = rlhf.generate.generate, dist.gather, dist.shard
load_state = rlhf.checkpoint.load_state


# --- what a twin breaks


def noise_per_rank(*args, noise=None, **options):
    return generate(*args, noise=noise if noise is None else (noise + dist.RANK / 3) % 1, **options)


def mean_of_gradients(model) -> None:
    shard(model)
    for unit in dist.units(model):
        unit.set_gradient_divide_factor(float(dist.RANKS))


def moments_lost(checkpoint, model, optimizer, critic) -> dict:
    rest = load_state(checkpoint, model, optimizer, critic)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    return rest


def whole_first(directory: str, **options) -> NeoX:
    """Every rank reads the whole model, and keeps its rows."""
    options.pop("sharded")
    plain = from_pretrained(directory, **options)
    model = NeoX(plain.config, plain.head)
    model.matmul_dtype = plain.matmul_dtype
    shard(model)
    for name, parameter in dist.parameters(model).items():
        dist.fill(parameter, plain.get_parameter(name).detach())
    return model


BROKEN = {
    "": {},
    "noise_per_rank": {"generate": noise_per_rank},
    "mean_of_gradients": {"shard": mean_of_gradients},
    "norms_not_summed": {"sum_gradients": lambda parameters: None},
    "wrong_order": {"gather": lambda parts, slices: gather(parts, slices)[::-1]},
    "moments_lost": {"load_state": moments_lost},
    "other_code": {"identity": lambda path: f"as rank {dist.RANK} has it"},
    "uneven_deal": {"deal": lambda slices: list(slices)[dist.RANK :: dist.RANKS]},
    "no_reshard": {"parameters": lambda model: dict(model.named_parameters())},
    "whole_first": {"from_pretrained": whole_first},
    "short_rows_too": {"compile_layers": partial(compile_layers, least=128)},  # no twin: rows here are short
}


def put(functions: dict) -> dict:
    """These functions under these names in every module that has the name; those that were there."""
    before = {}
    for key, module in list(sys.modules.items()):
        if key.split(".")[0] in ("rlhf", *TRAINING):
            for name, function in functions.items():
                if hasattr(module, name):
                    before[name] = getattr(module, name)
                    setattr(module, name, function)
    return before


# --- what is measured


def share(directory: str, out_dir: str) -> float:
    """Of all weights, those that this rank holds after a forward, a copy for inference and a save."""
    setup(1, "cpu")
    model = from_pretrained(directory, sharded=True)
    with torch.no_grad():
        summed_nll(model, pack([[5] * 9], [[[7] * 4]], max_positions=99))
    dist.whole(model)
    save_pretrained(model, load_tokenizer(directory), Path(out_dir))
    held = sum(dist.own_rows(p)[0].numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most since `forget_peak`."""
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def give_back() -> None:
    """Freed memory, from now on: the peak is what is alive, without gaps in the heap."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 2**16)  # M_MMAP_MAX
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    rlhf.common.keep_freed_memory = lambda: None


def forget_peak() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def alive() -> int:
    """Bytes of all tensors."""
    gc.collect()
    seen = {}
    for tensor in [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]:
        storage = (tensor._local_tensor if dist.is_sharded(tensor) else tensor).untyped_storage()
        if storage.device.type != "meta":
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def loaded(directory: str) -> int:
    """Peak, in bytes, of reading a model."""
    give_back()
    setup(1, "cpu")
    before = forget_peak()
    rlhf.pretrained.from_pretrained(directory, sharded=True)
    return memory("VmHWM") - before


def peaks(script: str, config: dict) -> dict[str, float]:
    """Of a run in bytes: `predicted` by --dry_run, its `peak`, and of tensors what is alive at `rest`, after
    an update."""
    give_back()
    script = import_module(script)
    planned = script.main(script.Config(**config, dry_run=True))["peak_gib"]
    found = {"predicted": planned / (1 + HEAP_GAPS) * 2**30, "rest": 0}
    log = Run.log

    def logged(*args, **named):
        found["rest"] = max(found["rest"], alive() - tensors)
        log(*args, **named)

    Run.log = logged
    tensors = alive()
    before = forget_peak()
    script.main(script.Config(**config))
    Run.log = log
    return found | {"peak": memory("VmHWM") - before}


def compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


MEASURES = {"share": share, "loaded": loaded, "peaks": peaks, "compiled": compiled}


# --- a job


def end_after(step: int, seconds: float, how: int) -> None:
    """Sends this rank a signal so long after it has logged this step, or, for step 0, from now."""
    log = Run.log

    def begin_to_end() -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), how)).start()

    def log_and_end(run, at: int, *rest, **named) -> None:
        log(run, at, *rest, **named)
        if at == step:
            begin_to_end()

    Run.log = log_and_end
    if step == 0:
        begin_to_end()


def run(script: str, config: dict) -> str:
    """The error of a run, "" for none."""
    script = import_module(script)
    try:
        returned = script.main(script.Config(**config))
    except (UserError, RunError) as error:
        return str(error)
    if dist.FIRST:
        Path(config["out_dir"], "returned.json").write_text(json.dumps(returned))
    return ""


def work(job: dict):
    if "folders" in job:
        os.chdir(job["folders"][dist.RANK])
    if job.get("rank") == dist.RANK:
        end_after(**job["end"])
    if "line" in job:
        sys.argv = job["line"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return ""
    before = put(BROKEN[job.get("broken", "")])
    result = MEASURES[job["measure"]](**job["of"]) if "measure" in job else run(job["script"], job["config"])
    put(before)
    return result


def main(file: Path) -> None:
    jobs = json.loads(file.read_text())
    if any("script" in job for job in jobs):  # what `put` changes, it has to find
        for name in SCRIPTS:
            import_module(name)
    results = []
    for job in jobs:
        results.append(work(job))
    Path(f"{file}.{dist.RANK}.results").write_text(json.dumps(results))
    dist.leave()
