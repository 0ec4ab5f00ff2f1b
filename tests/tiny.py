"""A toy world of two dozen posts and random models so small that a run of a script takes a tenth of a second.

`Tiny` runs a script's `main` on it, once per set of options. `measured` and `weights` are what such a run
left behind, `gap` and `distance` how far two runs are apart. `their_logprobs` and its neighbours compute the
same with transformers.
"""

import json
import math
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import evaluate
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from data import toy
from rlhf.model import EOS, PAD, NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study import best_of_n

TRAINING = [train_sft, train_rm, train_rloo, train_ppo, train_simpo, train_online]
SCRIPTS = [*TRAINING, sample, evaluate, best_of_n]
VOCABULARY = 512  # rows of the embeddings: a few more than the toy world has tokens, as Pythia's are padded
R = 12  # longest sampled response: some end before it, some do not
SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, rotary_pct=0.5,
             max_position_embeddings=256, tie_word_embeddings=False, layer_norm_eps=1e-4)

# Logged, but known without the run: if nothing else differs between two runs, the option was ignored.
ECHOES = {"lr", "episode", "name", "model", "out_dir", "split", "temperature", "settings"}


def base(script: ModuleType) -> dict:
    """Options with which nearly every other option matters.

    AdamW's epsilon is 1, so a step is about lr x gradient. With 1e-8 it is lr x sign, and rounding decides.
    """
    io = dict(data_dir="{world}/data", model="{world}/policy", device="cpu")
    train = dict(adam_eps=1.0, lr=0.1, save_every=0, eval_rows=4, max_grad_norm=0.0)
    reference = dict(ref_model="{world}/reference")
    reward_model = dict(reward_model="{world}/rm")
    judged = dict(judge="gold", temperature=0.7, agreement="pairs_validation")
    rloo = dict(reward="kl:0.05+maxent_length:0.1", lr=0.03, k=2, batch_size=8, episodes=16, ppo_epochs=2,
                clip=0.1, samples_every=0)
    pairs = dict(loss="dpo", beta=0.1, missing_eos="subtract")
    ppo = dict(kl_coef=0.05, k=2, batch_size=8, episodes=24, ppo_epochs=2, clip=0.1, vf_coef=3.0,
               missing_eos="subtract")
    online = pairs | dict(k=4, batch_size=12, episodes=36, temperature=1.0, samples_every=0)
    return {
        train_sft: io | train | dict(batch_size=6),
        train_rm: io | train | dict(batch_size=3),
        train_simpo: io | train | reference | dict(loss="dpo_length", beta=2.0, batch_size=3),
        train_rloo: io | train | reference | reward_model | rloo,
        train_ppo: io | train | reference | reward_model | ppo,
        sample: io | reward_model | dict(k=4, temperature=1.0, select="rso", accept=2),
        train_online: io | train | reference | reward_model | online,
        evaluate: io | reference | reward_model | judged,
        best_of_n: io | reward_model | dict(samples=4),
    }[script]


def random_model(vocab_size: int, head: str, seed: int) -> NeoX:
    """Weights of std 0.5, an EOS about every seventh token, never padding."""
    model = NeoX(NeoXConfig(vocab_size=vocab_size, **SHAPE), head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.5, generator=generator)
        if head == "embed_out":
            bias = model.gpt_neox.final_layer_norm.bias  # part of every hidden state
            for token, logit in ((EOS, 6.2), (PAD, -20.0)):
                model.embed_out.weight[token] = bias * (logit / bias.square().sum())
    return model


def make_world(root: Path) -> None:
    """Data, and `shuffled`, the same rows in another order; policy, reference, other; rm, other_rm."""
    sizes = dict(posts=24, pairs=12, rankings=12, validation=6, test=6, seed=4)
    toy.main(toy.Config(out_dir=str(root / "data"), size="small", **sizes))
    meta = root / "data/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"response_tokens": R}))
    tokenizer = load_tokenizer(str(root / "data/base"))
    heads = {"policy": "embed_out", "other": "embed_out", "rm": "score", "other_rm": "score"}
    for seed, (name, head) in enumerate(heads.items()):
        model = random_model(VOCABULARY, head, seed)
        save_pretrained(model, tokenizer, root / name)
        if name == "policy":  # a reference near the policy: the KL is a few nats
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
            save_pretrained(model, tokenizer, root / "reference")
    (root / "shuffled").mkdir()
    for file in (root / "data").iterdir():
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            pq.write_table(table.take(list(reversed(range(len(table))))), root / "shuffled" / file.name)
        else:
            (root / "shuffled" / file.name).symlink_to(file)


class Tiny:
    """The world in `root`, and the runs on it: `tiny.run(script, **changes)` is the directory of that run."""

    def __init__(self, root: Path):
        self.root = root
        self.known = {}
        make_world(root)

    def run(self, script: ModuleType, **changes) -> Path:
        """Run once for each set of changes."""
        key = script.__name__, repr(sorted(changes.items()))
        if key not in self.known:
            self.known[key] = self.fresh(script, **changes)
        return self.known[key]

    def fresh(self, script: ModuleType, **changes) -> Path:
        """Run again, for a test that watches the run."""
        out = self.root / f"run{len(list(self.root.iterdir()))}"
        options = base(script) | changes
        options = {k: v.format(world=self.root) if isinstance(v, str) else v for k, v in options.items()}
        returned = script.main(script.Config(**options, out_dir=str(out)))
        (out / "returned.json").write_text(json.dumps(returned))
        return out

    def rows(self, name: str) -> list[dict]:
        return pq.read_table(self.root / "data" / f"{name}.parquet").to_pylist()


# --- what a run left behind


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict:
    """What `main` returned."""
    return json.loads((run / "returned.json").read_text())


def flat(value, name: str = "") -> dict[str, float]:
    """Every number of nested dicts and lists, under its path; no times, nothing from ECHOES."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        kept = [(k, v) for k, v in pairs if k not in ECHOES and "second" not in str(k)]
        return {key: number for k, v in kept for key, number in flat(v, f"{name}/{k}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def measured(run: Path) -> dict[str, float]:
    """All numbers of the log, of the result and of a table of summaries."""
    parts = {"result": result(run)}
    if (run / "metrics.jsonl").exists():
        parts["log"] = log(run)
    if (run / "summaries.parquet").exists():
        parts["rows"] = pq.read_table(run / "summaries.parquet").to_pylist()
    if (run / "meta.json").exists():  # data that sample.py selected
        for name in json.loads((run / "meta.json").read_text())["sampled"]["rows"]:
            parts[name] = pq.read_table(run / f"{name}.parquet").to_pylist()
    return flat(parts)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def gap(a: Path, b: Path) -> float:
    """Largest difference between the numbers of two runs, relative above 1; inf if one has a number more."""
    x = measured(a)
    y = measured(b)
    if x.keys() != y.keys():
        return math.inf
    return max(abs(x[k] - y[k]) / max(1, abs(y[k])) for k in x)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def distance(a: Path, b: Path) -> float:
    """Largest difference between the weights of two runs."""
    return apart(weights(a), weights(b))


# --- the same from transformers, one sequence at a time, without padding


def causal_lm(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def classifier(folder: Path):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def their_distributions(model, prompt: list[int], response: list[int], temperature=1.0) -> torch.Tensor:
    """log softmax(logits / temperature) at every response token, (R, V)."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def their_logprobs(model, prompt: list[int], response: list[int], temperature=1.0) -> torch.Tensor:
    """Log-prob of every response token, (R,)."""
    return their_distributions(model, prompt, response, temperature)[range(len(response)), response]


def their_score(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt + response])).logits[0, 0]
