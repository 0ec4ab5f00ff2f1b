"""Rollouts: dataset reset, adaptive rounds, budgets, two samplers; the coefficient that follows the entropy,
and the gradient that eq. 7 drops. Scores: test_scores.py."""

import itertools
from pathlib import Path

import pytest
import torch
from enumeration import Responses
from own import LINES, lines_of, rloo
from tiny import distance, gap, log

import train_rloo
from rlhf.config import UserError
from rlhf.masked import seq_logprobs
from rlhf.model import EOS
from rlhf.policy import leave_one_out, minus_all_drawn
from rlhf.rewards import adapted, own_terms, rlhf_reward
from rlhf.rollout import ROLLOUTS, balanced, forced_tokens, shares, two_samplers

torch.set_num_threads(1)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def nothing(*_):
    """A timer's lap."""


# --- dataset reset


def test_forced_tokens_are_the_first_of_the_human_response():
    references = [[list(range(1, n)) + [EOS]] for n in (2, 3, 5, 9)] * 200
    forced = forced_tokens(references, 1.0, 6, seed=3)
    assert all(own == human[: len(own)] for own, (human,) in zip(forced, references))
    sizes = [{len(own) for own in forced[i::4]} for i in range(4)]
    assert sizes == [{1}, {1, 2}, {1, 2, 3, 4}, {1, 2, 3, 4, 5}]  # of 9 tokens at most 5: one of 6 is left
    counts = torch.tensor([len(own) for own in forced[2::4]]).bincount()[1:]
    assert counts.min() > 30  # 200 draws of four lengths
    some = forced_tokens(references, 0.25, 6, seed=3)
    assert 0.15 < sum(map(bool, some)) / len(some) < 0.35
    assert not any(forced_tokens(references, 0.0, 6, seed=3))
    assert forced_tokens([[[EOS]]], 1.0, 6, seed=3) == [[]]  # nothing but an EOS to force


def test_a_reset_forces_a_prefix_that_only_the_score_sees():
    """Two prompts: the first goes on from [7, 8], the second from nothing; R = 3."""
    asked, scored = [], []

    def sample(prompts, k):
        asked.extend(prompts)
        return [[[4, EOS], [4, 5, 6]] for _ in prompts], torch.tensor([[True, False]] * 2)

    def score(drawn, responses, ended):
        scored.append((responses, ended.tolist()))
        return {"scores": torch.zeros(2, 2)}

    drawn = {"query_token": [[1, 2], [3]], "forced": [[7, 8], []]}
    rollout = ROLLOUTS["reset"](sample, score, drawn, 2, 3, nothing)
    assert asked == rollout.prompts == [[1, 2, 7, 8], [3]]
    assert rollout.responses == [[[4], [4]], [[4, EOS], [4, 5, 6]]]  # at most 3 tokens with the forced ones
    assert scored == [([[[7, 8, 4], [7, 8, 4]], [[4, EOS], [4, 5, 6]]], [[False, False], [True, False]])]


def test_dataset_reset_at_probability_0_is_rloo_bit_for_bit(tiny):
    usual = tiny.run(train_rloo)
    never = tiny.run(train_rloo, rollout="reset", reset_share=0.0)
    assert distance(never, usual) == 0 and gap(never, usual) == 0
    always = tiny.run(train_rloo, rollout="reset")
    assert distance(always, usual) > 1e-3


def test_forced_tokens_get_no_gradient():
    """Enumerated: all responses after the forced first token y_1. The gradient of RLOO's loss reaches no
    distribution before it."""
    Y = Responses(vocab=3, length=3)
    logits = torch.randn(Y.prefixes, Y.vocab, dtype=torch.float64).requires_grad_()
    mask = Y.mask[0].clone()
    mask[:, 0] = False  # forced
    own = (Y.ids[:, 0] == 1) & (Y.lengths > 1)
    logp = seq_logprobs(Y.logprobs(logits)[0], mask)[own]  # of what follows
    assert logp.exp().sum().item() == pytest.approx(1.0)
    gradient = torch.autograd.grad((logp.exp().detach() * torch.arange(len(logp)) * logp).sum(), logits)[0]
    first = Y.prefix[0, 0]
    assert gradient[first].abs().max() == 0 and gradient.abs().max() > 0.01


# --- Reinforce-Ada


def test_balanced():
    positive = [True, False, True, False, False, True]
    assert balanced(positive, 4) == [0, 2, 1, 3]
    assert balanced([True] * 5 + [False], 4) == [0, 1, 2, 5]
    assert balanced([False] * 6, 4) == [0, 1, 2, 3]
    assert balanced([True, False, False], 3) == [0, 1, 2]


def adaptive(scripted, k=4):
    """A rollout whose samples have the scripted scores, [prompt][sample in the order of drawing]."""
    drawn_so_far = [0] * len(scripted)
    rounds = []

    def sample(prompts, k):
        responses = []
        for (n,) in prompts:
            responses.append([[100 * n + i] for i in range(drawn_so_far[n], drawn_so_far[n] + k)])
            drawn_so_far[n] += k
        rounds.append([n for (n,) in prompts])
        return responses, torch.ones(len(prompts), k, dtype=torch.bool)

    def score(drawn, responses, ended):
        scores = [[scripted[y // 100][y % 100] for (y,) in group] for group in responses]
        human = torch.full((len(scores), 1), 0.5)
        return {"scores": torch.tensor(scores), "ended": ended, "reference_scores": human}

    drawn = {"query_token": [[n] for n in range(len(scripted))]}
    return ROLLOUTS["adaptive"](sample, score, drawn, k, 9, nothing), rounds


def test_reinforce_ada_worked_example():
    """3 of 16 positive, 2 + 2 kept: A = (.8125, .8125, -.1875, -.1875), as the mean is 3/16. Baselined by the
    four kept ones it would be +-1/2."""
    scores = [0.0] * 16
    for positive in (0, 13, 15):
        scores[positive] = 1.0
    rollout, rounds = adaptive([scores, [1.0, 1.0, 0.0, 0.0], [0.0] * 16, [1.0] * 16])
    assert rounds == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [0, 2, 3]]
    kept = rollout.scored["scores"]
    assert rollout.responses[0] == [[0], [13], [1], [2]] and kept[0].tolist() == [1, 1, 0, 0]
    advantages = minus_all_drawn(kept, rollout.left_out)
    close(advantages[0], [0.8125, 0.8125, -0.1875, -0.1875])
    close(advantages[1:], [[0.5, 0.5, -0.5, -0.5], [0.0] * 4, [0.0] * 4])
    assert (leave_one_out(kept)[0] - advantages[0]).abs().max() > 0.1
    assert rollout.log == {"samples_drawn": 52.0, "never_positive": 0.25, "never_negative": 0.25}


def test_prompts_that_never_get_a_positive_sample_are_counted(tiny):
    """Four prompts; 2 to 8 samples of each."""
    run = tiny.run(train_rloo, rollout="adaptive", k=2, batch_size=8, episodes=16)
    for line in log(run):
        assert 0 <= line["never_positive"] <= 1 and 8 <= line["samples_drawn"] <= 32


# --- a budget per prompt


def test_shares_of_a_budget():
    assert shares(torch.tensor([3.0, 1.0, 0.0]), 4) == [3, 1, 0]
    assert shares(torch.tensor([1.0, 1.0, 1.0]), 4) == [2, 1, 1]
    assert shares(torch.zeros(3), 4) == [2, 1, 1]
    for seed in range(20):
        spread = torch.rand(7, generator=torch.Generator().manual_seed(seed))
        assert sum(shares(spread, 7)) == 7


def test_the_budget_goes_where_scores_differ_and_every_prompt_counts_alike():
    def sample(prompts, k):
        return [[[p[0], i, EOS] for i in range(k)] for p in prompts], torch.ones(len(prompts), k).bool()

    def score(drawn, responses, ended):
        wide = {1: 3.0, 2: 1.0, 3: 0.0}
        scores = [[wide[y[0]] * y[1] for y in group] for group in responses]
        return {"scores": torch.tensor(scores)}

    rollout = ROLLOUTS["budget"](sample, score, {"query_token": [[1], [2], [3]]}, 2, 9, nothing)
    assert rollout.prompts == [[1], [2], [3], [1], [1], [2]]
    close(rollout.weights[:, 0], [2 / 3, 1.0, 2.0, 2 / 3, 2 / 3, 1.0])
    # the weighted mean over rows is the mean over prompts of the mean over their rows
    values = torch.tensor([5.0, 7.0, 11.0, 5.0, 5.0, 7.0])
    assert (rollout.weights[:, 0] * values).mean().item() == pytest.approx((5 + 7 + 11) / 3)


# --- two samplers


def test_two_samplers():
    calls = []

    def sample(prompts, k, mixture):
        calls.append((k, mixture))
        return [[[len(calls)]] * k for _ in prompts], torch.ones(len(prompts), k).bool()

    assert two_samplers(sample, [[1]], 4, 0.25, None)[0] == [[[1]] * 4]
    responses, ended = two_samplers(sample, [[1]], 4, 0.25, 1.0)
    assert responses == [[[2], [2], [3], [3]]] and ended.shape == (1, 4)
    assert calls == [(4, 0.25), (2, 0.25), (2, 1.0)]


# --- the entropy's coefficient, and the gradient that eq. 7 drops


def test_the_coefficient_follows_the_entropy(tiny):
    assert adapted(0.1, 1.0, 1.5, 0.2) == pytest.approx(0.2)
    assert adapted(0.1, 2.5, 1.5, 0.2) == 0.0
    options = dict(reward="maxent_length:0.1", entropy_target=5.0, entropy_rate=0.2, episodes=24)
    lines = log(tiny.run(train_rloo, **options))
    assert lines[0]["coefficient/maxent_length"] == 0.1
    for before, after in itertools.pairwise(lines):
        rise = 0.2 * (5.0 - before["entropy"])
        assert after["coefficient/maxent_length"] == pytest.approx(before["coefficient/maxent_length"] + rise)
        assert after["reward/maxent_length"] == pytest.approx(
            after["coefficient/maxent_length"] * after["bonus/maxent_length"], rel=1e-6
        )


@pytest.mark.parametrize("options", [
    dict(reward="maxent_length:0.1", entropy_target=9.0), dict(rollout="adaptive"), dict(rollout="reset"),
], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(prepare, models, monkeypatch, options):
    """Killed before the fourth update was logged; the newest checkpoint is that of the second."""
    prepare({"a.jsonl": LINES})
    rloo(reward_model="rm", **options, out_dir="whole")
    usual = train_rloo.Run.log

    def dies(self, step, metrics, show=()):
        if step == 4:
            raise KeyboardInterrupt
        usual(self, step, metrics, show)

    with monkeypatch.context() as patch:
        patch.setattr(train_rloo.Run, "log", dies)
        with pytest.raises(KeyboardInterrupt):
            rloo(reward_model="rm", **options)
    rloo(reward_model="rm", **options, resume=True)
    logs = [lines_of(f"{run}/metrics.jsonl") for run in ("whole", "rloo")]
    numbers = [[{k: v for k, v in line.items() if "second" not in k} for line in log] for log in logs]
    assert numbers[0] == numbers[1] and len(logs[0]) == 4


Y = Responses(vocab=3, length=3)
SCORES = torch.randn(Y.count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LOGITS = torch.randn(Y.prefixes, Y.vocab, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
REF = torch.randn(Y.prefixes, Y.vocab, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def followed(coefficients, attached):
    """Expected gradient of the reward climbed by REINFORCE, with the terms' own gradient if `attached`."""
    logits = LOGITS.clone().requires_grad_()
    logprobs, ref = Y.logprobs(logits), Y.logprobs(REF)
    rewards, _ = rlhf_reward(SCORES[None], logprobs, ref, Y.mask, coefficients)
    logp = seq_logprobs(logprobs, Y.mask)
    value = (logp.exp().detach() * rewards * logp).sum()
    if attached:
        value = value + (logp.exp().detach() * own_terms(logprobs, ref, Y.mask, coefficients)).sum()
    return torch.autograd.grad(value, logits)[0]


def objective(coefficients):
    """Exact gradient of E[score + terms], the log-probs in the terms included."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = Y.logprobs(logits)
    logp = seq_logprobs(logprobs, Y.mask)[0]
    terms = own_terms(logprobs, Y.logprobs(REF), Y.mask, coefficients)[0]
    return torch.autograd.grad((logp.exp() * (SCORES + terms)).sum(), logits)[0]


def test_attached_terms_make_the_gradient_whole():
    """README: what eq. 7 as a reward drops is the gradient of -beta E[1/|y|]. Of KL and eq. 6 it is 0."""
    beta = 0.8
    whole = {"score": 1.0, "maxent_length": beta}
    close(followed(whole, True), objective(whole), atol=1e-12)
    dropped = followed(whole, True) - followed(whole, False)
    logits = LOGITS.clone().requires_grad_()
    probs = seq_logprobs(Y.logprobs(logits), Y.mask)[0].exp()
    short = torch.autograd.grad(-beta * (probs / Y.lengths).sum(), logits)[0]
    close(dropped, short, atol=1e-12)
    assert dropped.abs().max() > 0.01
    for term in ("kl", "maxent"):
        coefficients = {"score": 1.0, term: beta}
        close(followed(coefficients, False), objective(coefficients), atol=1e-12)


def test_attached_in_the_script(tiny):
    """One pass: it is another update for eq. 7, and (on average only) the same one for eq. 6."""
    options = dict(ppo_epochs=1, reward="maxent_length:0.5", episodes=8)
    runs = [tiny.run(train_rloo, **options, attached=attached) for attached in (False, True)]
    assert distance(*runs) > 5e-4 and gap(*runs) < 1  # the rollout is the same


@pytest.mark.parametrize("changes, message", [
    (dict(rollout="ada"), "--rollout=ada: known are plain, reset, adaptive, budget"),
    (dict(rollout="budget", batch_size=6), "with --rollout=budget by twice that"),
    (dict(entropy_target=1.0), "--entropy_target changes the coefficient of maxent or maxent_length"),
    (dict(attached=True, ppo_epochs=2), "--attached .* takes --ppo_epochs=1"),
    (dict(reward_mix="most"), "--reward_mix=most: known are mean"),
    (dict(rollout="reset", reward_model="", reward_fn="x.py:f"), "no such file: x.py"),
])
def test_bad_options_are_named(prepare, models, changes, message):
    prepare({"a.jsonl": LINES})
    with pytest.raises(UserError, match=message):
        rloo(**{"reward_model": "rm", **changes})
    assert not Path("rloo").exists()


def test_rollouts_need_human_responses(prepare, models):
    prepare({"a.jsonl": [{"prompt": row["prompt"]} for row in LINES]})
    for rollout in ("reset", "adaptive"):
        with pytest.raises(UserError, match="no column reference_response_token"):
            rloo(reward_model="rm", rollout=rollout)
    assert lines_of("a.jsonl")
