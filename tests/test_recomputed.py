"""What the scripts log and train, computed again in the plainest way: transformers, one sequence at a time.

The responses are those that the script itself sampled. The loop of RLOO has twins, the same loop with one
thing changed, that must not agree.
"""

import math
import shutil
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    R,
    apart,
    causal_lm,
    classifier,
    log,
    result,
    their_distributions,
    their_logprobs,
    their_score,
    weights,
)
from util import our_name

import evaluate
import train_rloo
import train_rm
import train_simpo
from rlhf.model import EOS
from study import best_of_n

EXACT = 2e-5  # float32 rounding over several updates
CLEAR = 1e-3  # what a changed loop is off by at least


def close(value: float):
    return pytest.approx(value, rel=EXACT, abs=EXACT)


def mean(values) -> float:
    values = list(values)
    return sum(map(float, values)) / len(values)


# --- RLOO


K = 3
REWARD = dict(kl=0.05, maxent_length=0.1)
RLOO = dict(temperature=1.3, clip=0.1, lr=0.05, ppo_epochs=3)


def plain_rloo(root, rollouts, *, temperature, clip, lr, ppo_epochs, penalty=1.0) -> tuple[list, dict]:
    """RLOO as one would write it down, on what `generate` returned: (numbers per update, final weights)."""
    policy = causal_lm(root / "policy")
    reference = causal_lm(root / "reference")
    reward_model = classifier(root / "rm")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, eps=1.0, weight_decay=0.0)
    lines = []
    for step, rollout in enumerate(rollouts):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(rollouts))
        xs = [x for x in rollout["prompts"] for _ in range(K)]
        ys = [y for group in rollout["responses"] for y in group]
        with torch.no_grad():
            old = [their_logprobs(policy, x, y, temperature) for x, y in zip(xs, ys)]
            ref = [their_logprobs(reference, x, y, temperature) for x, y in zip(xs, ys)]
            scores = [their_score(reward_model, x, y).item() for x, y in zip(xs, ys)]
        scores = [score if y[-1] == EOS else -penalty for score, y in zip(scores, ys)]
        rewards = [score - REWARD["kl"] * (p - q).sum() - REWARD["maxent_length"] * p.mean()
                   for score, p, q in zip(scores, old, ref)]
        clipped = []
        losses = []
        for _ in range(ppo_epochs):
            for i, (x, y) in enumerate(zip(xs, ys)):
                group = rewards[i // K * K : i // K * K + K]
                advantage = rewards[i] - (sum(group) - rewards[i]) / (K - 1)
                ratio = (their_logprobs(policy, x, y, temperature).sum() - old[i].sum()).exp()
                free = -advantage * ratio
                limited = -advantage * ratio.clamp(1 - clip, 1 + clip)
                loss = torch.maximum(free, limited)
                (loss / len(xs)).backward()
                losses.append(loss.item())
                clipped.append(limited > free)
            optimizer.step()
            optimizer.zero_grad()
        quarter = K * max(1, len(rollout["prompts"]) // 4)
        with torch.no_grad():
            drift = [p - their_logprobs(policy, x, y, temperature) for x, y, p in zip(xs[:quarter], ys, old)]
        lines.append({
            "scores": mean(scores), "rlhf_reward": mean(rewards),
            "kl": mean((p - q).sum() for p, q in zip(old, ref)),
            "length_normalized_surprisal": mean(-p.mean() for p in old),
            "surprisal": -torch.cat(old).mean().item(), "loss": mean(losses), "clipfrac": mean(clipped),
            "kl_prev/k1": mean(d.sum() for d in drift),
            "kl_prev/k3": mean((torch.expm1(-d) + d).sum() for d in drift),
        })
    return lines, {our_name(name): p.detach() for name, p in policy.named_parameters()}


def test_rloo_equals_a_plain_loop(tiny, generated):
    """Two rollouts with three passes over each: some ratios are clipped, some responses have no EOS."""
    run = tiny.fresh(
        train_rloo, reward="kl:0.05+maxent_length:0.1", **RLOO, k=K, batch_size=4 * K, episodes=8 * K
    )
    *rollouts, _ = generated
    lines, final = plain_rloo(tiny.root, rollouts, **RLOO)
    assert apart(weights(run), final) < EXACT
    assert apart(load_file(tiny.root / "policy/model.safetensors"), final) > 100 * EXACT
    for ours, theirs in zip(log(run), lines, strict=True):
        assert {key: ours[key] for key in theirs} == {key: close(value) for key, value in theirs.items()}
        assert 0.05 < theirs["clipfrac"] < 0.95 and 0 < ours["eos_share"] < 1
        assert abs(theirs["kl_prev/k1"]) > CLEAR
    for twin in (dict(ppo_epochs=2), dict(clip=5.0), dict(penalty=2.0), dict(temperature=1.0)):
        _, other = plain_rloo(tiny.root, rollouts, **{**RLOO, **twin})
        assert apart(weights(run), other) > CLEAR, twin


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_surprisal_is_the_entropy_of_the_policy_that_samples(tiny, temperature):
    """E[-log pi] = H(pi) at the temperature of the samples; a nucleus leaves out surprising tokens."""
    many = dict(k=16, batch_size=512, episodes=512, ppo_epochs=1, temperature=temperature)
    (line,) = log(tiny.run(train_rloo, **many))
    (nucleus,) = log(tiny.run(train_rloo, **many, top_p=0.8))
    assert abs(line["surprisal"] - line["entropy"]) < 0.1
    assert nucleus["entropy"] - nucleus["surprisal"] > 0.3


def test_the_ablation_fills_up_to_the_longest_possible_response(tiny, generated):
    """Summing c over the padding lowers the bonus -(1/|y|) log pi(y|x) by c (R - |y|) / |y|, whatever else is
    in the micro-batch. The KL is immune."""
    plain = log(tiny.fresh(train_rloo, micro_batch_tokens=100))[0]
    lengths = [[len(y) for y in group] for group in generated[0]["responses"]]
    filled = log(tiny.fresh(train_rloo, micro_batch_tokens=100, invalid_logprob_fill=2.0))[0]
    assert min(map(max, lengths)) < R  # there is a group, hence a micro-batch, without a response of R tokens
    penalty = 2.0 * mean((R - n) / n for group in lengths for n in group)
    assert plain["bonus/maxent_length"] - filled["bonus/maxent_length"] == close(penalty)
    assert plain["bonus/kl"] == close(filled["bonus/kl"])
    assert plain["length_normalized_surprisal"] == filled["length_normalized_surprisal"]


# --- rankings and pairs


def test_the_two_ends_of_a_ranking(tiny):
    """`chosen` is the best of four, `rejected` the worst."""
    run = tiny.run(train_simpo, loss="simpo_pl", ref_model="", batch_size=12)
    (line,) = log(run)
    policy = causal_lm(tiny.root / "policy")
    ranked = []  # per prompt the log-probs of its four responses, best first
    with torch.no_grad():
        for row in tiny.rows("rankings_train"):
            ranked.append([their_logprobs(policy, row["query_token"], y) for y in row["responses_token"]])
    assert {len(row) for row in ranked} == {4}
    for name, end in (("chosen", 0), ("rejected", -1)):
        assert line[f"logps/{name}"] == close(mean(row[end].sum() for row in ranked))
        assert line[f"mean_logps/{name}"] == close(mean(row[end].mean() for row in ranked))
        assert line[f"rewards/{name}"] == close(mean(2.0 * row[end].mean() for row in ranked))
    assert line["margins"] == close(mean(2.0 * (row[0].mean() - row[-1].mean()) for row in ranked))
    assert line["accuracies"] == close(mean(row[0].mean() > row[-1].mean() for row in ranked))
    assert abs(mean(row[1].sum() - row[-1].sum() for row in ranked)) > CLEAR


def test_a_tie_counts_half(tiny):
    """A reward model that gives every response the same score: final norm with weight 0, nothing learnt."""
    folder = shutil.copytree(tiny.root / "policy", tiny.root / "constant")
    tensors = load_file(folder / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tied = result(tiny.run(train_rm, model=str(folder), lr=1e-30, eval_rows=0))
    assert tied["chosen_rewards"] == tied["rejected_rewards"] and tied["loss"] == close(math.log(2))
    assert {value for key, value in tied.items() if key.split("/")[0] == "accuracy"} == {0.5}


# --- best of n


def test_best_of_n_of_the_samples_that_were_drawn(tiny, generated):
    """Mean, over prompts and choices of n samples, of the best score; without EOS the score is -penalty."""
    run = tiny.fresh(best_of_n, samples=6, missing_eos_penalty=3.0)
    (call,) = generated
    model = classifier(tiny.root / "rm")
    raw = []
    scores = []
    with torch.no_grad():
        for x, group in zip(call["prompts"], call["responses"]):
            raw.append([their_score(model, x, y).item() for y in group])
            scores.append([score if y[-1] == EOS else -3.0 for score, y in zip(raw[-1], group)])

    def expected(scores: list[list[float]], n: int) -> float:
        return mean(max(choice) for row in scores for choice in combinations(row, n))

    lines = log(run)
    assert [line["n"] for line in lines] == [1, 2, 4, 6]
    assert [line["scores"] for line in lines] == [close(expected(scores, n)) for n in (1, 2, 4, 6)]
    assert [line["kl"] for line in lines] == [close(math.log(n) - (n - 1) / n) for n in (1, 2, 4, 6)]
    assert all("gold" in line for line in lines)
    assert 0 < call["ended"].double().mean() < 1 and abs(expected(raw, 1) - expected(scores, 1)) > CLEAR
    assert result(run)["scores"] == lines[-1]["scores"] and result(run)["posts"] == 6


# --- evaluation


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_kl_and_entropy_of_an_evaluation(tiny, generated, temperature):
    """Of the samples at --sample_temperature, under both models at that temperature."""
    numbers = result(tiny.fresh(evaluate, temperature=0.0, sample_temperature=temperature, agreement=""))
    _, call = generated
    policy = causal_lm(tiny.root / "policy")
    reference = causal_lm(tiny.root / "reference")
    per_token = {"entropy": [], "kl": [], "kl_full": []}
    with torch.no_grad():
        for x, (y,) in zip(call["prompts"], call["responses"]):
            p = their_distributions(policy, x, y, temperature)
            q = their_distributions(reference, x, y, temperature)
            per_token["entropy"] += -(p.exp() * p).sum(1)
            per_token["kl"] += (p - q)[range(len(y)), y]
            per_token["kl_full"] += (p.exp() * (p - q)).sum(1)
    assert numbers["entropy"] == close(mean(per_token["entropy"]))
    assert numbers["kl"] == close(sum(per_token["kl"]).item() / 6)
    assert numbers["kl_full"] == close(sum(per_token["kl_full"]).item() / 6)
