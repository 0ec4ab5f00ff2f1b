"""One update of every training script beside the same update of TRL 1.16's trainer: the scripts' own `main`,
the trainers' own `train`.

Both start from the same random GPT-NeoX (matrices with std 0.2, biases and layer norms too), see the same
rows and, for RLOO, the same sampled completions: uneven lengths, the longest cut off without EOS. AdamW's
epsilon is 1, so a weight moves by about lr x its gradient (with the usual 1e-8 the first step is lr x sign,
and rounding decides it). Where TRL computes another number, the test derives both and says which is the
formula's.
"""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="trl is not installed: whole updates are not compared with TRL")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer

import train_rloo
import train_rm
import train_sft
import train_simpo
from data import toy
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, read_json, save_pretrained
from rlhf.rewards import parse_reward
from tests.util import our_name

N, K = 4, 4  # prompts (or pairs) in the one batch, responses per prompt
EXACT = 1e-5  # of float32 numbers of size 1, and of weights
CLEAR = 1e-2  # where the two sides differ on purpose, they differ by more than this share


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Toy data of one batch, and three random models: the policy, a reference near it, a reward model."""
    out = tmp_path_factory.mktemp("trl")
    toy.main(
        toy.Config(
            out_dir=str(out / "data"), posts=N, pairs=N, rankings=1, validation=1, test=1, size="small"
        )
    )
    config = NeoXConfig.from_dict(read_json(out / "data/base/config.json"))
    tokenizer = load_tokenizer(str(out / "data/base"))
    config = replace(config, tie_word_embeddings=False, rotary_pct=0.25)  # Pythia's
    policy, reward_model = NeoX(config), NeoX(config, "score")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (policy, reward_model):
            for name, p in model.named_parameters():
                p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
        save_pretrained(policy, tokenizer, out / "policy")
        save_pretrained(reward_model, tokenizer, out / "rm")
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)
        save_pretrained(policy, tokenizer, out / "reference")
    return out


def table(world: Path, name: str) -> dict:
    return pq.read_table(world / "data" / f"{name}.parquet").to_pydict()


def ours(script, out: Path, data: Path, **options) -> tuple[dict, dict]:
    """The script's main for the one update that this data is good for: (the line of metrics.jsonl, the
    weights after it)."""
    io = dict(data_dir=str(data), out_dir=str(out), device="cpu", save_every=0, eval_rows=1)
    script.main(
        script.Config(**{**io, "schedule": "constant", "adam_eps": 1.0, "weight_decay": 0.0, **options})
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1
    return json.loads(lines[0]), load_file(out / "model.safetensors")


def theirs(
    trainer_class, config_class, out: Path, model, rows: list[dict], tokenizer, *, batch: int = N,
    objects: dict | None = None, **options,
):
    """TRL's trainer after max_steps updates (default one): (its logged lines, the weights, the trainer)."""
    plain = dict(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, logging_steps=1, max_steps=1,
        per_device_train_batch_size=batch, lr_scheduler_type="constant", adam_epsilon=1.0, weight_decay=0.0,
        max_grad_norm=1e9,
    )  # a clip that never clips: without one, HF's Trainer logs no norm
    trainer = trainer_class(
        model=model, args=config_class(**{**plain, **options}), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **(objects or {}),
    )
    trainer.train()
    weights = {our_name(k): v.clone() for k, v in trainer.model.state_dict().items()}
    return [line for line in trainer.state.log_history if "loss" in line], weights, trainer


def causal_lm(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer_of(world: Path, **special):
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def assert_same_step(a: dict, b: dict, start: dict) -> None:
    """Equal weights, to EXACT and to a thousandth of the largest step of each tensor; and the step is one
    that matters."""
    assert a.keys() == b.keys() == start.keys()
    for name in start:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=EXACT)
        moved = (b[name] - start[name]).abs().max()
        # + 1e-8: r_w - r_l has no gradient in the last bias, but for rounding
        assert (a[name] - b[name]).abs().max() <= 1e-3 * moved + 1e-8, name
    assert max((b[name] - start[name]).abs().max() for name in start) > 100 * EXACT


def close(value: float, tolerance: float = EXACT):
    return pytest.approx(value, rel=tolerance, abs=tolerance)


def differ(a: float, b: float) -> bool:
    return abs(a - b) > CLEAR * max(abs(a), abs(b))


# --- RLOO


@pytest.fixture(scope="module")
def completions(world) -> dict:
    """{prompt: K responses}, references of this and of other posts; those longer than R tokens are cut, so
    they have no EOS."""
    posts = table(world, "sft_train")
    answers = [list(r) for r in posts["reference_response_token"]]
    return {
        tuple(p): [answers[(n + i) % N][: limit(world)] for i in range(K)]
        for n, p in enumerate(posts["query_token"])
    }


def limit(world: Path) -> int:
    return max(map(len, table(world, "sft_train")["reference_response_token"])) - 1


def our_rloo(world: Path, out: Path, completions: dict, monkeypatch, **options):
    """(metrics, weights, {prompt: advantages}) of one rollout and its updates, on the given completions."""
    seen = {"advantages": []}

    def generate_all(policy, prompts, k, max_new_tokens, **_):
        seen.setdefault("prompts", prompts)
        # the others are validation prompts
        responses = [completions[tuple(p)][:k] if tuple(p) in completions else [[0]] * k for p in prompts]
        return responses, torch.tensor([[r[-1] == 0 for r in row] for row in responses])

    def advantages(rewards):
        seen["advantages"].append(train_rloo.ADVANTAGES["rloo"](rewards))  # of one micro-batch
        return seen["advantages"][-1]

    monkeypatch.setattr(train_rloo, "generate_all", generate_all)
    monkeypatch.setitem(train_rloo.ADVANTAGES, "seen", advantages)
    setting = dict(
        model=str(world / "policy"), ref_model=str(world / "reference"), reward_model=str(world / "rm"),
        advantage="seen", k=K, batch_size=N * K, episodes=N * K, ppo_epochs=1, response_tokens=limit(world),
        reward="kl:0.05", temperature=0.7, clip=0.8, micro_batch_tokens=300,
    )
    metrics, weights = ours(train_rloo, out, world / "data", **{**setting, **options})
    return metrics, weights, {tuple(p): a for p, a in zip(seen["prompts"], torch.cat(seen["advantages"]))}


def their_rloo(world: Path, out: Path, completions: dict, monkeypatch, *, reward=None, **options):
    """The same from TRL; `reward` (default: transformers' reward model on the sampled token ids, and N+'s
    rule for a missing EOS) scores them."""
    def generate(self, prompt_ids, images, fields):
        count = dict.fromkeys(map(tuple, prompt_ids), 0)
        out = []
        for prompt in map(tuple, prompt_ids):
            out.append(completions[prompt][count[prompt]])
            count[prompt] += 1
        return out

    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", generate)
    model = causal_lm(world / "policy")
    model.config._name_or_path = str(world / "reference")  # where RLOOTrainer loads its reference from
    tokenizer = tokenizer_of(world)
    if reward is None:
        reward_model = AutoModelForSequenceClassification.from_pretrained(world / "rm", dtype=torch.float32)

        def reward(prompts, completion_ids, **_):
            return [
                their_score(reward_model, tokenizer(p)["input_ids"] + c) if c[-1] == 0 else -1.0
                for p, c in zip(prompts, completion_ids)
            ]

    setting = dict(
        num_generations=K, max_completion_length=limit(world), beta=0.05, temperature=0.7, epsilon=0.8,
        shuffle_dataset=False,
    )
    rows = [{"prompt": query} for query in table(world, "sft_train")["query"]]
    lines, weights, trainer = theirs(
        RLOOTrainer, RLOOConfig, out, model, rows, tokenizer, batch=N * K, objects={"reward_funcs": reward},
        **{**setting, **options},
    )
    return lines, weights, trainer


@torch.no_grad()
def their_score(reward_model, ids: list[int]) -> float:
    return reward_model(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("epochs, lr", [(1, 0.02), (2, 1e-3)])
def test_rloo_update(world, completions, tmp_path, monkeypatch, epochs, lr):
    """One rollout; with two passes over it the second sees ratios other than 1, some clipped."""
    mine, weights, advantages = our_rloo(
        world, tmp_path / "ours", completions, monkeypatch, ppo_epochs=epochs, lr=lr
    )
    lines, their_weights, trainer = their_rloo(
        world, tmp_path / "theirs", completions, monkeypatch, num_iterations=epochs, max_steps=epochs,
        learning_rate=lr,
    )
    assert len(lines) == epochs
    first = lines[0]

    def mean(key):
        return sum(line[key] for line in lines) / epochs

    posts = table(world, "sft_train")
    torch.testing.assert_close(torch.stack([advantages[tuple(p)] for p in posts["query_token"]]).flatten(),
                               torch.tensor(list(trainer._logs["advantages"])), rtol=EXACT, atol=EXACT)
    assert mine["scores"] == close(first["reward"])
    assert mine["entropy"] == close(first["entropy"])
    assert mine["loss"] == close(mean("loss"))
    assert mine["grad_norm"] == close(mean("grad_norm"), 1e-4)
    assert mine["clipfrac"] == close(mean("clip_ratio/region_mean"))
    assert mine["response_length"] == close(first["completions/mean_length"])
    assert mine["eos_share"] == close(1 - first["completions/clipped_ratio"]) and 0 < mine["eos_share"] < 1
    assert_same_step(weights, their_weights, load_file(world / "policy/model.safetensors"))
    if epochs == 1:
        # at ratio 1 the loss is the mean advantage
        assert abs(mine["loss"]) < EXACT and mine["clipfrac"] == 0
    else:
        assert 0.1 < mine["clipfrac"] < 0.5 and abs(mine["loss"]) > CLEAR
    # KL. The reward has the sum over a sequence on both sides. What TRL logs is the mean over the tokens of
    # the batch; ours is the mean over sequences of the sum, the KL of the formula, E_y[log pi(y) - log
    # pi_ref(y)].
    assert mine["kl"] / mine["response_length"] == close(first["kl"])
    assert differ(mine["kl"], first["kl"])


def test_rloo_reward_model_reads_the_eos_here_and_text_without_it_in_trl(
    world, completions, tmp_path, monkeypatch
):
    """TRL gives a reward model the decoded text, and decoding drops the EOS: a model trained on answers that
    end in EOS (RewardTrainer appends it) is read one token early, and cannot tell a finished answer from one
    that was cut. Right by the recipe (3) is the score at the EOS."""
    mine, _, _ = our_rloo(world, tmp_path / "ours", completions, monkeypatch, lr=1e-30, missing_eos="none")
    lines, _, _ = their_rloo(
        world, tmp_path / "theirs", completions, monkeypatch, reward=str(world / "rm"), learning_rate=1e-30
    )
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    tokenizer = tokenizer_of(world)
    whole, cut = [], []
    for prompt, answers in completions.items():
        whole += [their_score(reward_model, [*prompt, *answer]) for answer in answers]
        texts = [
            tokenizer.decode(prompt) + tokenizer.decode(answer, skip_special_tokens=True)
            for answer in answers
        ]
        cut += [their_score(reward_model, tokenizer(text)["input_ids"]) for text in texts]
    assert mine["scores"] == close(sum(whole) / len(whole))
    assert lines[0]["reward"] == close(sum(cut) / len(cut))
    assert differ(mine["scores"], lines[0]["reward"])


# --- DPO and SimPO


def pair_rows(world: Path) -> list[dict]:
    pairs = table(world, "pairs_train")
    return [
        {"prompt": q, "chosen": c, "rejected": r}
        for q, c, r in zip(pairs["query"], pairs["chosen"], pairs["rejected"])
    ]


def response_logits(world: Path, side: str) -> tuple[list, torch.Tensor]:
    """Per pair the mean logit at each position that predicts a response token (transformers, one row at a
    time); and over all logits of the padded batch, prompt and padding included, with their pad token."""
    pairs, model = table(world, "pairs_train"), causal_lm(world / "policy")
    at_responses, rows = [], []
    longest = max(
        len(p) + len(r)
        for p, c, d in zip(pairs["query_token"], pairs["chosen_token"], pairs["rejected_token"])
        for r in (c, d)
    )
    with torch.no_grad():
        for prompt, response in zip(pairs["query_token"], pairs[f"{side}_token"]):
            ids = prompt + response
            at_responses.append(model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].mean(-1))
            mask = torch.arange(longest)[None] < len(ids)
            rows.append(
                model(
                    torch.tensor([ids + [1] * (longest - len(ids))]), attention_mask=mask.long()
                ).logits.mean()
            )
    return at_responses, torch.stack(rows).mean()


def test_dpo_update(world, tmp_path):
    """With the gradient clipped to a tenth of its norm on both sides: the rule is the same there too."""
    shared = dict(beta=0.3, max_grad_norm=0.5)
    mine, weights = ours(
        train_simpo, tmp_path / "ours", world / "data", model=str(world / "policy"),
        ref_model=str(world / "reference"), loss="dpo", batch_size=N, lr=0.1, **shared,
    )
    lines, their_weights, _ = theirs(
        DPOTrainer, DPOConfig, tmp_path / "theirs", causal_lm(world / "policy"), pair_rows(world),
        tokenizer_of(world), objects={"ref_model": causal_lm(world / "reference")}, learning_rate=0.1,
        **shared,
    )
    line = lines[0]
    for key in (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected",
    ):
        assert mine[
            key.removeprefix("rewards/") if key in ("rewards/margins", "rewards/accuracies") else key
        ] == close(line[key]), key
    assert mine["loss"] == close(line["loss"])
    assert mine["grad_norm"] == close(line["grad_norm"], 1e-4) and mine["grad_norm"] > 5
    assert_same_step(weights, their_weights, load_file(world / "policy/model.safetensors"))
    # The logged mean logit: ours weighs every response the same, as the other numbers of the line do, TRL
    # every token.
    values, _ = response_logits(world, "chosen")
    assert mine["logits/chosen"] == close(torch.stack([v.mean() for v in values]).mean().item())
    assert line["logits/chosen"] == close(torch.cat(values).mean().item()) and mine["logits/chosen"] != close(
        line["logits/chosen"]
    )


def test_simpo_update(world, tmp_path):
    """With cpo_alpha=0 (TRL's default 1 adds an NLL term) and a tokenizer without BOS, see below."""
    shared = dict(beta=2.0)
    mine, weights = ours(
        train_simpo, tmp_path / "ours", world / "data", model=str(world / "policy"), loss="simpo",
        batch_size=N, lr=0.05, gamma=0.7, **shared,
    )
    lines, their_weights, _ = their_simpo(
        world, tmp_path / "theirs", tokenizer_of(world, bos_token=None), **shared
    )
    line = lines[0]
    assert mine["loss"] == close(line["loss"]) and line["nll_loss"] == 0
    assert mine["grad_norm"] == close(line["grad_norm"], 1e-4)
    for key, name in (
        ("rewards/chosen",) * 2,
        ("rewards/rejected",) * 2,
        ("margins", "rewards/margins"),
        ("accuracies", "rewards/accuracies"),
    ):
        assert mine[key] == close(line[name]), key
    assert_same_step(weights, their_weights, load_file(world / "policy/model.safetensors"))
    # TRL's logps are token means here, though its DPO logs sums under the same name; ours have two names.
    assert mine["mean_logps/chosen"] == close(line["logps/chosen"]) and differ(
        mine["logps/chosen"], line["logps/chosen"]
    )
    # TRL's mean logit is over every position: the prompt, which says nothing of the response, and the
    # padding, which says nothing at all.
    values, everywhere = response_logits(world, "chosen")
    assert mine["logits/chosen"] == close(torch.stack([v.mean() for v in values]).mean().item())
    assert line["logits/chosen"] == close(everywhere.item()) and differ(
        mine["logits/chosen"], line["logits/chosen"]
    )


def their_simpo(world: Path, out: Path, tokenizer, **options):
    setting = dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7, learning_rate=0.05)
    return theirs(
        CPOTrainer, CPOConfig, out, causal_lm(world / "policy"), pair_rows(world), tokenizer,
        **{**setting, **options},
    )


def test_simpo_of_trl_puts_a_bos_before_the_prompt(world, tmp_path):
    """Pythia's tokenizer names <|endoftext|> its BOS, and CPOTrainer prepends it to every prompt, where
    DPOTrainer and RLOOTrainer do not. The recipe has none (1.2): the policy was fine-tuned and is sampled
    without it. Ours gives TRL's number on prompts that begin with that token."""
    lines, _, _ = their_simpo(world, tmp_path / "theirs", tokenizer_of(world), beta=10.0)
    options = dict(model=str(world / "policy"), loss="simpo", batch_size=N, lr=1e-30, gamma=0.7, beta=10.0)
    plain, _ = ours(train_simpo, tmp_path / "plain", world / "data", **options)
    assert differ(plain["loss"], lines[0]["loss"])
    changed = change_table(world, tmp_path / "data", "pairs_train", query_token=lambda ids: [0] + ids)
    with_bos, _ = ours(train_simpo, tmp_path / "bos", changed, **options)
    assert with_bos["loss"] == close(lines[0]["loss"])


def change_table(world: Path, out: Path, name: str, **changes) -> Path:
    """A data directory like the world's, one table of it with changed columns."""
    out.mkdir()
    for file in (world / "data").iterdir():
        if file.name not in ("base", f"{name}.parquet"):
            (out / file.name).symlink_to(file)
    original = pq.read_table(world / "data" / f"{name}.parquet")
    columns = original.to_pydict()
    for column, change in changes.items():
        columns[column] = [change(value) for value in columns[column]]
    pq.write_table(pa.table(columns, original.schema), out / f"{name}.parquet")
    return out


# --- reward model


def fresh_reward_model(world: Path, out: Path) -> Path:
    """What train_rm.py starts from with seed 1: the policy's backbone and a new head."""
    model = from_pretrained(str(world / "policy"), head="score", new_head=True, seed=1)
    save_pretrained(model, load_tokenizer(str(world / "policy")), out)
    return out


def our_reward_model(world: Path, out: Path, data: Path, **options):
    return ours(
        train_rm, out, data, model=str(world / "policy"), batch_size=N, seed=1, center=False, **options
    )


def their_reward_model(world: Path, out: Path, start: Path, tokenizer, **options):
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    return theirs(RewardTrainer, RewardConfig, out, model, pair_rows(world), tokenizer, **options)


def test_reward_model_update(world, tmp_path):
    start = fresh_reward_model(world, tmp_path / "start")
    mine, weights = our_reward_model(world, tmp_path / "ours", world / "data", lr=0.05)
    lines, their_weights, _ = their_reward_model(
        world, tmp_path / "theirs", start, tokenizer_of(world), learning_rate=0.05
    )
    line = lines[0]
    assert (
        mine["loss"] == close(line["loss"])
        and mine["accuracy"] == close(line["accuracy"])
        and mine["margins"] == close(line["margin"])
    )
    assert (mine["chosen_rewards"] + mine["rejected_rewards"]) / 2 == close(line["mean_reward"])
    assert mine["grad_norm"] == close(line["grad_norm"], 1e-4)
    assert_same_step(weights, their_weights, load_file(start / "model.safetensors"))


def test_reward_model_of_trl_is_read_before_the_eos_if_padding_is_eos(world, tmp_path):
    """A tokenizer without a padding token, Pythia's on the hub, gets EOS for one in TRL; transformers looks
    for the last token that is no padding, and finds the one before the EOS. By the recipe (3) the reward is
    read at the EOS. Ours gives TRL's number on answers without EOS."""
    start = fresh_reward_model(world, tmp_path / "start")
    lines, _, _ = their_reward_model(
        world, tmp_path / "theirs", start, tokenizer_of(world, pad_token="<|endoftext|>"), learning_rate=1e-30
    )
    plain, _ = our_reward_model(world, tmp_path / "plain", world / "data", lr=1e-30)
    assert differ(plain["margins"], lines[0]["margin"])
    changed = change_table(
        world, tmp_path / "data", "pairs_train", chosen_token=lambda ids: ids[:-1],
        rejected_token=lambda ids: ids[:-1],
    )
    without, _ = our_reward_model(world, tmp_path / "without", changed, lr=1e-30)
    assert without["margins"] == close(lines[0]["margin"]) and without["loss"] == close(lines[0]["loss"])


# --- SFT


@pytest.mark.parametrize("loss_on, completion_only", [("all", False), ("response", True)])
def test_sft_update(world, tmp_path, loss_on, completion_only):
    """The default of train_sft.py is the loss over query and response (N+), TRL's for prompts with
    completions is the second line."""
    decay, lr = 0.5, 0.05
    mine, weights = ours(
        train_sft, tmp_path / "ours", world / "data", model=str(world / "policy"), batch_size=N, lr=lr,
        loss_on=loss_on, weight_decay=decay,
    )
    posts = table(world, "sft_train")
    rows = [{"prompt": q, "completion": r} for q, r in zip(posts["query"], posts["reference_response"])]
    lines, their_weights, _ = theirs(
        SFTTrainer, SFTConfig, tmp_path / "theirs", causal_lm(world / "policy"), rows, tokenizer_of(world),
        completion_only_loss=completion_only, learning_rate=lr, weight_decay=decay,
    )
    assert mine["loss"] == close(lines[0]["loss"])
    assert mine["grad_norm"] == close(lines[0]["grad_norm"], 1e-4)
    # Weight decay: HF's Trainer spares biases and layer norms, N+ (torch's AdamW on all parameters) does not,
    # and neither do we.
    start = load_file(world / "policy/model.safetensors")
    spared = {name for name in start if name.endswith(".bias") or "norm" in name}
    torch.testing.assert_close(
        weights["gpt_neox.final_layer_norm.weight"] - their_weights["gpt_neox.final_layer_norm.weight"],
        -lr * decay * start["gpt_neox.final_layer_norm.weight"], rtol=0, atol=EXACT,
    )
    assert_same_step(
        {n: w + lr * decay * start[n] if n in spared else w for n, w in weights.items()}, their_weights, start
    )


def test_defaults_of_trl_that_an_ablation_has_to_know():
    """TRL 1.16's defaults beside the scripts': a run with each side's defaults is not the same algorithm."""
    rloo = RLOOConfig(output_dir="x", bf16=False, use_cpu=True)
    mine = train_rloo.Config(data_dir="", model="", reward_model="", out_dir="")
    assert (rloo.temperature, mine.temperature) == (1.0, 0.7)
    assert (rloo.num_iterations, mine.ppo_epochs) == (1, 4)
    assert (rloo.max_grad_norm, mine.max_grad_norm) == (1.0, 0.0)
    assert (rloo.adam_epsilon, mine.adam_eps) == (1e-8, 1e-5)
    assert parse_reward(mine.reward) == {"score": 1.0, "kl": rloo.beta}
    assert (rloo.num_generations, rloo.epsilon) == (mine.k, mine.clip)
    assert not hasattr(rloo, "missing_eos_penalty") and mine.missing_eos == "replace"
    assert CPOConfig(output_dir="x", bf16=False, use_cpu=True).cpo_alpha == 1.0
