"""Every option of every script reaches what it is for: two values, two results.

A script that parses an option, records it in run.json and then forgets it looks right from outside. Here
each option gets a second value on a tiny world, and the weights (an option of the training) or the logged
numbers (one of the evaluation) must differ. An option of memory and speed must give the same result, and
leave a trace.
"""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import SCRIPTS, TRAINING, base, distance, gap, log, weights
from torch.nn.modules.module import register_module_forward_pre_hook

import evaluate
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from rlhf.model import NeoX
from rlhf.policy import POLICY_LOSSES
from study import best_of_n

SAME = 2e-5  # rounding
DIFFERENT = 5e-4  # the least effect of an option; nothing may lie between the two

# Tested in test_scripts.py, test_cli.py or test_judge.py, or invisible without a hub or a language model.
ELSEWHERE = {
    "revision", "out_dir", "resume", "overwrite", "device", "reward_fn", "compare_fn",
    "samples_every", "dry_run", "plain", "rank_timeout",
    "wandb", "tensorboard", "clip", "clip_high", "value_clip",
    "judge_order", "judge_model", "judge_url", "judge_template", "judge_cache", "judge_concurrency",
    "judge_timeout", "judge_max_tokens", "judge_max_requests", "judge_max_cost", "judge_price_in",
    "judge_price_out",
}
OTHER_MODEL = dict(model="{world}/other", data_dir="{world}/shuffled", dtype="bfloat16", seed=2)
OTHER_REFERENCE = dict(ref_model="{world}/other")
OTHER_REWARD_MODEL = dict(reward_model="{world}/other_rm")
OPTIMIZATION = OTHER_MODEL | dict(lr=0.05, schedule="constant", warmup=0.5, weight_decay=0.1, adam_eps=0.1,
                                  max_grad_norm=0.01)
EPOCHS = OPTIMIZATION | dict(epochs=2.0)
LOSS = dict(loss=dict(loss="simpo", ref_model=""), beta=1.0, gamma=0.5, gamma_beta_ratio=0.5,
            label_smoothing=0.1)
# {option of one loss: that loss and another value}; compared with the same loss
OPTION_OF_A_LOSS = dict(
    alpha=("alphapo", 1.0), delta=("slic", 100.0), tau=("gammapo", 0.1), sft_coef=("cpo", 0.2),
    r_max=("chipo", 1e-3), top_k=("cringe", 3), calibration=("vpo", "reference"),
)
MISSING_EOS = dict(missing_eos="subtract", missing_eos_penalty=3.0)
MIX = dict(reward_mix=dict(reward_model="{world}/rm,{world}/other_rm", reward_mix="min"))
REWARD = MISSING_EOS | MIX | dict(
    reward="kl+maxent:0.1", invalid_logprob_fill=1.0, attached=dict(attached=True, ppo_epochs=1),
    entropy_target=dict(entropy_target=5.0, entropy_rate=0.2), score_after="a",
    entropy_rate=dict(entropy_target=5.0, entropy_rate=0.5),
)
ROLLOUT = dict(rollout="adaptive", reset_share=dict(rollout="reset", reset_share=0.9))
ALGORITHM = dict(k=4, advantage="grpo", episodes=20, batch_size=6, ppo_epochs=1)
RATIO = dict(policy_loss="token")
SAMPLING = dict(temperature=1.0, top_p=0.5)
PPO = dict(
    kl_coef=0.5, missing_eos="replace", missing_eos_penalty=3.0, k=4, episodes=28, batch_size=6, ppo_epochs=1,
    clip=0.5, vf_coef=0.1, gamma=0.8, lam=0.5, temperature=1.0, response_tokens=8,
)
PAIRS = dict(
    k=6, mixture=0.5, opponent=1.0, data_pair=True, round_updates=2, temperature=0.7, top_p=0.5,
    response_tokens=8, move_reference=dict(round_updates=2, move_reference=True), batch_size=8, episodes=24,
    epochs=2,
)
ONLINE = PAIRS | dict(
    scorer="gold", label="sampled", missing_eos="replace", missing_eos_penalty=30.0, explore=0.1,
    loss=dict(loss="simpo"), beta=0.5, gamma=dict(loss="simpo", gamma=1.0), label_smoothing=0.2,
)

# {option: another value, or the options to change}: the final weights must differ
CHANGES_THE_WEIGHTS = {
    train_sft: EPOCHS | dict(init="scratch", train_rows=20, loss_on="response", batch_size=5),
    train_rm: EPOCHS | dict(init="scratch", train_rows=6, center_rows=4, center=False, batch_size=4),
    train_simpo: EPOCHS | OTHER_REFERENCE | LOSS | dict(train_rows=6, batch_size=4),
    train_rloo: OPTIMIZATION | OTHER_REFERENCE | OTHER_REWARD_MODEL | REWARD | ALGORITHM | RATIO
    | SAMPLING | ROLLOUT | dict(response_tokens=8),
    train_ppo: OPTIMIZATION | OTHER_REFERENCE | OTHER_REWARD_MODEL | PPO,
    train_online: OPTIMIZATION | OTHER_REFERENCE | OTHER_REWARD_MODEL | MIX | ONLINE,
}
# ... the numbers must differ, and the weights must not
CHANGES_THE_NUMBERS = {
    train_sft: dict(eval_rows=3, eval_every=2),
    train_rm: dict(eval_rows=3),
    train_simpo: dict(eval_rows=3, eval_every=2),
    train_rloo: dict(eval_rows=6),
    train_ppo: dict(eval_rows=3),
    train_online: dict(eval_rows=3),
    sample: OTHER_MODEL | OTHER_REWARD_MODEL | dict(
        rows=6, k=6, temperature=0.7, top_p=0.5, response_tokens=8, select="best", scorer="gold", beta=0.01,
        accept=4, gap=dict(select="gap", gap=0.1)),
    evaluate: OTHER_MODEL | OTHER_REFERENCE | OTHER_REWARD_MODEL | SAMPLING | dict(
        split="test", n=3, response_tokens=8, sample_temperature=0.5, judge="rm",
        agreement="", agreement_rows=3),
    best_of_n: OTHER_MODEL | OTHER_REWARD_MODEL | SAMPLING | dict(
        split="train", rows=3, samples=8, missing_eos_penalty=3.0),
}
# ... nothing may differ; each has a test of its own that it does what it says
CHANGES_NOTHING = {"micro_batch_tokens", "rollout_prompts", "gradient_checkpointing", "compile",
                   "save_every", "keep", "html", "html_rows"}


def cases(table: dict) -> list:
    found = []
    for script, options in table.items():
        for name, value in options.items():
            change = value if isinstance(value, dict) else {name: value}
            found.append(pytest.param(script, change, id=f"{script.__name__}-{name}"))
    return found


each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
each_training = pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.__name__)


# --- two values, two results


@each_script
def test_no_option_is_left_out(script):
    tried = set()
    for other, change in [case.values for case in cases(CHANGES_THE_WEIGHTS) + cases(CHANGES_THE_NUMBERS)]:
        if other is script:
            tried |= {name for name, value in change.items() if value != base(script).get(name)}
    if script is train_simpo:
        tried |= OPTION_OF_A_LOSS.keys()
    assert not set(script.Config.__dataclass_fields__) - tried - CHANGES_NOTHING - ELSEWHERE


@pytest.mark.parametrize("script, change", cases(CHANGES_THE_WEIGHTS))
def test_another_value_trains_another_model(tiny, script, change):
    assert distance(tiny.run(script, **change), tiny.run(script)) > DIFFERENT


@pytest.mark.parametrize("option", OPTION_OF_A_LOSS)
def test_another_value_of_a_loss_trains_another_model(tiny, option):
    loss, value = OPTION_OF_A_LOSS[option]
    usual = tiny.run(train_simpo, loss=loss, beta=None)
    assert distance(tiny.run(train_simpo, loss=loss, beta=None, **{option: value}), usual) > DIFFERENT


@pytest.mark.parametrize("script, change", cases(CHANGES_THE_NUMBERS))
def test_another_value_measures_something_else(tiny, script, change):
    run = tiny.run(script, **change)
    assert gap(run, tiny.run(script)) > DIFFERENT
    assert script not in TRAINING or distance(run, tiny.run(script)) == 0


@each_script
def test_the_same_values_give_the_same_run(tiny, script):
    """Else a difference would mean nothing."""
    again = tiny.fresh(script)
    assert gap(again, tiny.run(script)) == 0
    assert script not in TRAINING or distance(again, tiny.run(script)) == 0


def test_another_clip_range_trains_another_model(tiny):
    """In more updates than other options need: of so few samples few ratios leave the range."""
    runs = [tiny.run(train_rloo, episodes=32, **change) for change in ({}, dict(clip=0.5))]
    assert distance(*runs) > DIFFERENT


@pytest.mark.parametrize("clip_high", [None, 0.3])
def test_both_bounds_of_the_clip_reach_the_policy_loss(tiny, monkeypatch, clip_high):
    seen = []
    usual = POLICY_LOSSES["sequence"]
    spy = lambda *args, **bounds: seen.append(bounds) or usual(*args, **bounds)  # noqa: E731
    monkeypatch.setitem(POLICY_LOSSES, "sequence", spy)
    tiny.fresh(train_rloo, clip=0.15, clip_high=clip_high)
    assert seen and all(bounds == {"clip": 0.15, "clip_high": clip_high} for bounds in seen)


def test_every_reward_moves_the_weights_its_own_way(tiny):
    rewards = ["kl:0.5", "maxent:0.5", "maxent_length:0.5", "minent_length:0.5", "kl:0.5+minent_length:0.5",
               "kl:0.2+minent_length:0.5", "kl:0.5+minent_length:0.2", "score:0+kl:0.5", "score:0.5",
               "chi2:0.5", "ref_logprob:0.5"]
    runs = [tiny.run(train_rloo, reward=reward) for reward in rewards]
    assert all(distance(a, b) > DIFFERENT for i, a in enumerate(runs) for b in runs[:i])


# --- memory and speed: the same result, and a trace


@contextmanager
def forward_calls():
    """Counts the forward calls of every kind of module."""
    calls = Counter()
    handle = register_module_forward_pre_hook(lambda module, _: calls.update([type(module).__name__]))
    try:
        yield calls
    finally:
        handle.remove()


def assert_same(script, run: Path, usual: Path) -> None:
    assert gap(run, usual) < SAME
    assert script not in TRAINING or distance(run, usual) < SAME


@each_script
def test_micro_batches(tiny, script):
    with forward_calls() as few:
        usual = tiny.fresh(script)
    with forward_calls() as many:
        run = tiny.fresh(script, micro_batch_tokens=60)
    assert many[NeoX.__name__] > few[NeoX.__name__]
    assert_same(script, run, usual)


@each_training
def test_gradient_checkpointing(tiny, script):
    """Every pass that learns runs the two norms of the two layers again."""
    with forward_calls() as once:
        usual = tiny.fresh(script)
    with forward_calls() as twice:
        run = tiny.fresh(script, gradient_checkpointing=True)
    passes = len(log(run)) * base(script).get("ppo_epochs", 1) * (2 if script is train_ppo else 1)
    assert twice["LayerNorm"] - once["LayerNorm"] == 4 * passes
    assert twice[NeoX.__name__] == once[NeoX.__name__]
    assert_same(script, run, usual)


@each_training
def test_compile(tiny, script, monkeypatch):
    """Two layers of each model, with a torch.compile that leaves the function as it is."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    run = tiny.fresh(script, compile=True)
    models = {train_rloo: 3, train_online: 3, train_ppo: 4, train_simpo: 2}.get(script, 1)
    assert sum(f.__name__ == "project" for f in compiled) == 2 * models
    assert_same(script, run, tiny.run(script))


def test_the_sampler_of_a_round_is_compiled_too(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    run = tiny.fresh(train_online, compile=True, round_updates=2)
    rounds = len(list((run / "rounds").iterdir()))
    assert rounds == 2 and sum(f.__name__ == "project" for f in compiled) == 2 * (3 + rounds)
    assert_same(train_online, run, tiny.run(train_online, round_updates=2))


@each_training
def test_checkpoints(tiny, script):
    usual = tiny.run(script)
    steps = len(log(usual))
    assert steps >= 2 and not (usual / "ckpt").exists()
    for options, expected in (
        (dict(save_every=2, keep=0), range(2, steps + 1, 2)),
        (dict(save_every=1, keep=0), range(1, steps + 1)),
        (dict(save_every=1, keep=1), [steps]),
    ):
        run = tiny.fresh(script, **options)
        assert [path.name for path in sorted((run / "ckpt").iterdir())] == [f"step_{n:08d}" for n in expected]
        assert gap(run, usual) == 0 and distance(run, usual) == 0
    last = weights(run / f"ckpt/step_{steps:08d}")
    final = weights(run)
    moved = {name for name in final if not torch.equal(last[name], final[name])}
    centred = {"gpt_neox.final_layer_norm.bias"}  # by train_rm.py, after the last update
    assert moved == (centred if script is train_rm else set())


def test_a_page_beside_the_same_evaluation(tiny):
    usual = tiny.run(evaluate)
    page = tiny.fresh(evaluate, html=True)
    short = tiny.fresh(evaluate, html=True, html_rows=2)
    assert gap(page, usual) == gap(short, usual) == 0
    assert (short / "page.html").stat().st_size < (page / "page.html").stat().st_size - 500
    assert not (usual / "page.html").exists()


def test_rollout_prompts_of_a_rollout(tiny, generated):
    tiny.fresh(train_rloo, rollout_prompts=3)
    asked = [(call["temperature"], len(call["prompts"])) for call in generated]
    assert asked == [(0.7, 3), (0.7, 1)] * 2 + [(0.0, 3), (0.0, 1)]


def test_rollout_prompts_of_an_evaluation(tiny, generated):
    """It changes nothing where nothing is drawn."""
    greedy = dict(temperature=0.0, sample_temperature=0.0, agreement="")
    whole = tiny.fresh(evaluate, **greedy, rollout_prompts=64)
    parts = tiny.fresh(evaluate, **greedy, rollout_prompts=4)
    assert [len(call["prompts"]) for call in generated] == [6, 4, 2]
    assert gap(whole, parts) < SAME


def test_rollout_prompts_of_best_of_n(tiny, generated):
    tiny.fresh(best_of_n, rollout_prompts=4)
    assert [len(call["prompts"]) for call in generated] == [4, 2]
