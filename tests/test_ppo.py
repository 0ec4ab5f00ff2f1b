"""PPO with a critic: GAE, the losses and the whole update against plain loops; kill and resume; what is
saved."""

import json

import pytest
import torch
from util import WIDE

import data.toy
import train_ppo
from rlhf.groups import pack
from rlhf.model import NeoX, NeoXConfig
from rlhf.policy import clipped_token_loss, clipped_value_loss, gae, whiten
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained

GARBAGE = 77.0  # what the padding holds


@pytest.fixture
def ragged():
    """rewards, values, mask (3, 2, 6) in float64, with garbage in the padding."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 2, 6, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([[1, 6], [3, 4], [5, 2]])
    mask = torch.arange(6) < lengths[..., None]
    return rewards.where(mask, GARBAGE), values.where(mask, -GARBAGE), mask


def plain_gae(rewards, values, gamma, lam):
    """One response, lists: the double sum of the definition."""
    R = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < R else 0.0) - values[t] for t in range(R)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, R)) for t in range(R)]


def ragged_rows(mask):
    return [(n, k, int(mask[n, k].sum())) for n in range(mask.shape[0]) for k in range(mask.shape[1])]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_gae_is_its_definition(ragged, gamma, lam):
    rewards, values, mask = ragged
    actual = gae(rewards, values, mask, gamma, lam)
    wrong = gae(rewards, values, mask, gamma, lam + 0.05)
    worst = 0.0
    for n, k, R in ragged_rows(mask):
        own = plain_gae(rewards[n, k, :R].tolist(), values[n, k, :R].tolist(), gamma, lam)
        expected = torch.tensor(own, dtype=torch.float64)
        assert (actual[n, k, :R] - expected).abs().max() < 1e-12
        worst = max(worst, (wrong[n, k, :R] - expected).abs().max().item())
    assert worst > WIDE and (actual[~mask] == 0).all()


def test_gae_without_values_is_the_reward_to_come(ragged):
    rewards, _, mask = ragged
    to_come = rewards.where(mask, 0.0).flip(-1).cumsum(-1).flip(-1)
    advantages = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    assert (advantages - to_come).where(mask, 0.0).abs().max() < 1e-12


def test_gae_with_lambda_1_is_the_return_minus_the_value(ragged):
    rewards, values, mask = ragged
    to_come = rewards.where(mask, 0.0).flip(-1).cumsum(-1).flip(-1)
    advantages = gae(rewards, values, mask, 1.0, 1.0)
    assert (advantages - (to_come - values)).where(mask, 0.0).abs().max() < 1e-12


def test_whitened(ragged):
    values, _, mask = ragged
    kept = whiten(values, mask)[mask]
    assert abs(kept.mean()) < 1e-12 and kept.var() == pytest.approx(1, abs=1e-6)
    assert (whiten(values, mask)[~mask] == 0).all()


def test_losses_against_a_loop_over_tokens(ragged):
    """And their gradients: none where the clipped branch is the larger one, none in the padding."""
    old_values, returns, mask = ragged
    generator = torch.Generator().manual_seed(2)
    old, new, advantages, values = torch.randn(4, 3, 2, 6, dtype=torch.float64, generator=generator) * 0.3
    new = new.where(mask, GARBAGE).requires_grad_()
    values = (values + old_values).where(mask, GARBAGE).requires_grad_()
    losses, stats = clipped_token_loss(new, old, advantages, mask, 0.2)
    value_losses = clipped_value_loss(values, old_values, returns, mask, 0.2)
    clipped = 0
    for n, k, R in ragged_rows(mask):
        for t in range(R):
            ratio = (new[n, k, t] - old[n, k, t]).exp().item()
            A = advantages[n, k, t].item()
            two = (-A * ratio, -A * min(max(ratio, 0.8), 1.2))
            assert losses[n, k, t].item() == pytest.approx(max(two), abs=1e-12)
            assert bool(stats["clipfrac"][n, k, t]) == (two[1] > two[0])
            clipped += two[1] > two[0]
            v, before, target = (x[n, k, t].item() for x in (values, old_values, returns))
            limited = min(max(v, before - 0.2), before + 0.2)
            expected = max((v - target) ** 2, (limited - target) ** 2) / 2
            assert value_losses[n, k, t].item() == pytest.approx(expected, abs=1e-9)
    assert clipped > 3
    (losses.sum() + value_losses.sum()).backward()
    assert (new.grad[~mask] == 0).all() and (values.grad[~mask] == 0).all()
    assert (new.grad[mask & stats["clipfrac"]] == 0).all() and new.grad[
        mask & ~stats["clipfrac"]
    ].abs().min() > 0


# --- the script


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo")
    sizes = {"posts": 24, "pairs": 4, "rankings": 1, "validation": 4, "test": 1}
    data.toy.main(data.toy.Config(out_dir=str(root / "data"), size="small", **sizes))
    raw = json.loads((root / "data/base/config.json").read_text())
    raw |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    raw["initializer_range"] = 0.3
    tokenizer = load_tokenizer(str(root / "data/base"))
    policy = NeoX(NeoXConfig.from_dict(raw)).init_weights(1)
    with torch.no_grad():
        policy.embed_out.weight[0] *= 3  # now and then a response ends
    save_pretrained(policy, tokenizer, root / "sft")
    save_pretrained(NeoX(NeoXConfig.from_dict(raw), "score").init_weights(2), tokenizer, root / "rm")
    return root


def config(world, out, **changes) -> train_ppo.Config:
    settings = {
        "data_dir": str(world / "data"),
        "model": str(world / "sft"),
        "reward_model": str(world / "rm"),
        "out_dir": str(out),
        "k": 2,
        "batch_size": 8,
        "episodes": 24,
        "ppo_epochs": 2,
        "lr": 1e-2,
        "response_tokens": 8,
        "eval_rows": 2,
        "save_every": 1,
        "device": "cpu",
        "micro_batch_tokens": 400,
    }
    return train_ppo.Config(**settings | changes)


def weights(folder) -> dict:
    return dict(from_pretrained(str(folder)).named_parameters())


def far(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_updates_equal_a_plain_loop(world, tmp_path, monkeypatch):
    """Sample as the script did; then everything again, one response at a time, with Adam."""
    seen = []
    sample = train_ppo.generate_all

    def spy(model, prompts, K, *args, **options):
        found = sample(model, prompts, K, *args, **options)
        seen.append((prompts, *found))
        return found

    monkeypatch.setattr(train_ppo, "generate_all", spy)
    cfg = config(world, tmp_path / "out", episodes=16, clip=0.05, value_clip=0.05, vf_coef=0.5, lam=0.8)
    cfg = train_ppo.Config(**vars(cfg) | {"schedule": "constant", "kl_coef": 0.3})
    train_ppo.main(cfg)
    script = weights(tmp_path / "out")

    def loop(lam=0.8, last_token=-1) -> dict:
        policy, reference = from_pretrained(cfg.model), from_pretrained(cfg.model)
        critic, reward_model = (from_pretrained(cfg.reward_model, head="score") for _ in range(2))
        parameters = [*policy.parameters(), *critic.parameters()]
        adam = torch.optim.AdamW(parameters, lr=cfg.lr, eps=cfg.adam_eps, weight_decay=0.0)

        def run(model, prompt, response):
            groups = pack([prompt], [[response]], max_positions=256)
            return model(groups.ids, groups.positions, groups.attend), groups

        def numbers(prompt, response):
            hidden, groups = run(policy, prompt, response)
            logits = policy.embed_out(hidden[groups.predicts]) / cfg.temperature
            logp = logits.log_softmax(-1).gather(1, groups.targets[:, None])[:, 0]
            states, _ = run(critic, prompt, response)
            return logp, critic.scores(states[groups.predicts])

        for prompts, responses, ended in seen[:2]:
            rows = [(p, y, bool(e)) for p, ys, es in zip(prompts, responses, ended) for y, e in zip(ys, es)]
            known = []
            with torch.no_grad():
                for prompt, response, complete in rows:
                    logp, values = numbers(prompt, response)
                    hidden, groups = run(reference, prompt, response)
                    logits = reference.embed_out(hidden[groups.predicts]) / cfg.temperature
                    ref = logits.log_softmax(-1).gather(1, groups.targets[:, None])[:, 0]
                    states, groups = run(reward_model, prompt, response)
                    rewards = -cfg.kl_coef * (logp - ref)
                    rewards[last_token] += (
                        reward_model.scores(states[groups.last[0, 0]]) if complete else -1.0
                    )
                    advantages = torch.tensor(plain_gae(rewards.tolist(), values.tolist(), 1.0, lam))
                    known.append((logp, values, advantages))
            flat = torch.cat([a for *_, a in known])
            for _ in range(cfg.ppo_epochs):
                for (prompt, response, _), (logp, values, advantages) in zip(rows, known):
                    new, v = numbers(prompt, response)
                    A = (advantages - flat.mean()) / (flat.var() + 1e-8).sqrt()
                    ratio = (new - logp).exp()
                    loss = torch.maximum(-A * ratio, -A * ratio.clamp(0.95, 1.05)).sum()
                    target = advantages + values
                    near = values + (v - values).clamp(-0.05, 0.05)
                    error = torch.maximum((v - target) ** 2, (near - target) ** 2).sum() / 2
                    ((loss + 0.5 * error) / len(flat)).backward()
                adam.step()
                adam.zero_grad()
        return dict(policy.named_parameters())

    assert far(script, loop()) < 2e-4
    assert far(script, weights(world / "sft")) > WIDE
    assert far(script, loop(lam=0.9)) > 1e-3 and far(script, loop(last_token=0)) > 1e-3


def test_resumed_run_is_the_uninterrupted_one(world, tmp_path, monkeypatch):
    """The critic is in the checkpoint: without it the values, and so the policy, would be others."""
    train_ppo.main(config(world, tmp_path / "whole"))
    log = train_ppo.Run.log

    def die(self, step, *args, **options):
        log(self, step, *args, **options)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo.Run, "log", die)
    with pytest.raises(KeyboardInterrupt):
        train_ppo.main(config(world, tmp_path / "cut"))
    monkeypatch.undo()
    train_ppo.main(config(world, tmp_path / "cut", resume=True))
    assert far(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0

    def lines(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    assert lines("whole") == lines("cut") and len(lines("cut")) == 3


def test_the_saved_model_is_the_policy_alone(world, tmp_path):
    train_ppo.main(config(world, tmp_path / "out"))
    assert not [name for name in weights(tmp_path / "out") if "score" in name]
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert {"scores", "gold", "kl", "values", "value_loss", "explained_variance", "clipfrac", "loss"} <= set(
        line
    )


def test_the_reward_is_the_score_less_the_kl(world, tmp_path):
    """What is logged agrees with itself: the reward is the score, less the KL."""
    train_ppo.main(config(world, tmp_path / "out", kl_coef=0.5))
    for line in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines()):
        assert line["rlhf_reward"] == pytest.approx(line["scores"] - 0.5 * line["kl"], abs=1e-4)
