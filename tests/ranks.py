"""One rank of a test: `torchrun tests/ranks.py JOBS.json` runs scripts' `main`, one after the other, in one
group of ranks, so that torch starts once. A job may break something first, for the twin of a test, and each
rank may stand in a folder of its own. The errors go to JOBS.json.errors."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import rlhf.checkpoint
import rlhf.generate
from rlhf import dist
from rlhf.config import RunError, UserError
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained

TRAINING = ("train_sft", "train_rm", "train_simpo", "train_rloo", "train_ppo", "train_online")
SCRIPTS = (*TRAINING, "evaluate", "sample", "study.best_of_n")
torch.set_num_threads(1)

generate, gather, shard = rlhf.generate.generate, dist.gather, dist.shard
load_state = rlhf.checkpoint.load_state


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


BROKEN = {
    "": {},
    "noise_per_rank": {"generate": noise_per_rank},
    "mean_of_gradients": {"shard": mean_of_gradients},
    "norms_not_summed": {"sum_gradients": lambda parameters: None},
    "wrong_order": {"gather": lambda parts, slices: gather(parts, slices)[::-1]},
    "moments_lost": {"load_state": moments_lost},
    "other_code": {"identity": lambda path: f"as rank {dist.RANK} has it"},
    "uneven_deal": {"deal": lambda slices: list(slices)[dist.RANK :: dist.RANKS]},
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


def share(directory: str) -> float:
    """Of all weights, those that this rank has, after a copy for inference and after a save."""
    model = from_pretrained(directory, sharded=True)
    dist.whole(model)
    save_pretrained(model, load_tokenizer(directory), Path(sys.argv[1] + ".saved"))
    held = sum(dist.own_rows(p)[0].numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


def main() -> None:
    dist.hush()
    for name in SCRIPTS:
        import_module(name)
    errors = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["script"] == "share":
            errors.append(str(share(job["model"])))
            continue
        before = put(BROKEN[job["broken"]])
        script = import_module(job["script"])
        os.chdir(job["folders"][dist.RANK])
        try:
            returned = script.main(script.Config(**job["config"]))
            errors.append("")
        except (UserError, RunError) as error:
            errors.append(str(error))
        else:
            if dist.FIRST:
                Path(job["config"]["out_dir"], "returned.json").write_text(json.dumps(returned))
        put(before)
    every = dist.exchange(errors)
    assert all([*map(bool, own)] == [*map(bool, errors)] for own in every), every
    if dist.FIRST:
        Path(sys.argv[1] + ".errors").write_text(json.dumps(errors))
    dist.leave()


if __name__ == "__main__":
    main()
