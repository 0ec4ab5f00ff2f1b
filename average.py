r"""Weight averaging: several models of one architecture become the model of their mean weights.

Of reward models that were trained from one SFT model with other seeds, data orders or learning rates this is
WARM (arXiv 2401.12187): much of an ensemble's robustness for the cost of one model. Beside it, the ensemble
itself: train_rloo.py --reward_model=a,b,c --reward_mix=mean.

    python average.py --models=out/toy/rm_1,out/toy/rm_2,out/toy/rm_3 --out_dir=out/toy/rm_average
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.config import UserError, command_line
from rlhf.files import WRITING, check_apart, data_aside, move_in
from rlhf.model import NeoX
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json, resolve, save_pretrained


@dataclass(frozen=True, kw_only=True)
class Config:
    models: str  # Hugging Face directories, run directories or hub ids, joined by ','
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the averaged model: a new directory, or with --overwrite an earlier average
    overwrite: bool = False  # replace the model in out_dir


@torch.no_grad()
def add(total: NeoX, model: NeoX, name: str) -> None:
    shapes = {key: value.shape for key, value in model.named_parameters()}
    if shapes != {key: value.shape for key, value in total.named_parameters()}:
        raise UserError(f"--models: {name} has another architecture than the first: leave it out")
    for own, other in zip(total.parameters(), model.parameters()):
        own += other


@torch.no_grad()
def main(cfg: Config) -> dict:
    names = [name for name in cfg.models.split(",") if name]
    if len(names) < 2:
        raise UserError("--models: a mean takes at least two models, joined by ','")
    check_apart(cfg.out_dir, *names)
    out = Path(cfg.out_dir)
    average = (out / "averaged.json").exists() or (out / WRITING).exists()  # or what a kill left of one
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file: choose another one")
    used = out.exists() and any(path.name != WRITING for path in out.iterdir())
    if used and not (average and cfg.overwrite):
        raise UserError(f"--out_dir {out} is not empty: choose another one"
                        + ", or replace that average with --overwrite" * average)
    kinds = [str(read_json(resolve(n, cfg.revision) / "config.json").get("architectures")) for n in names]
    head = "embed_out" if "ForCausalLM" in kinds[0] else "score"
    tokenizer = load_tokenizer(names[0], cfg.revision)
    total = from_pretrained(names[0], revision=cfg.revision, head=head)
    for name in names[1:]:
        if load_tokenizer(name, cfg.revision).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"--models: {name} has another tokenizer than {names[0]}: leave it out")
        add(total, from_pretrained(name, revision=cfg.revision, head=head), name)
    for weight in total.parameters():
        weight /= len(names)
    result = {"models": names, "out_dir": cfg.out_dir}
    aside = data_aside(out)
    save_pretrained(total, tokenizer, aside)
    (aside / "averaged.json").write_text(json.dumps(result) + "\n")
    move_in(aside, out, last="config.json")  # without it this is no model
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    command_line(main, Config)
