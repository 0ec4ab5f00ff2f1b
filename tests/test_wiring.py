"""What a script hands to its parts: how it samples, which models learn, how many updates, what is saved."""

import json
import math

import pytest
import torch
from tiny import SCRIPTS, SHAPE, TRAINING, R, log, measured, result, weights
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import evaluate
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from rlhf.groups import Groups
from rlhf.model import NeoX
from study import best_of_n

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
each_training = pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.__name__)
POLICIES = [train_sft, train_rloo, train_simpo]
each_policy = pytest.mark.parametrize("script", POLICIES, ids=lambda s: s.__name__)


# --- what generation is called with


def asked(call: dict) -> dict:
    return {key: call[key] for key in ("K", "max_new_tokens", "temperature", "top_p")}


@each_policy
def test_a_run_ends_with_greedy_samples(tiny, generated, script):
    """Of the final model, which transformers continues in the same way."""
    run = tiny.fresh(script)
    last = generated[-1]
    assert last["prompts"] == [row["query_token"] for row in tiny.rows("sft_validation")][:4]
    assert (last["K"], last["max_new_tokens"], last["temperature"]) == (1, R, 0.0)
    lengths = [len(response) for (response,) in last["responses"]]
    assert result(run)["greedy/tokens"] == pytest.approx(sum(lengths) / 4)
    assert result(run)["greedy/eos_share"] == pytest.approx(last["ended"].double().mean().item())
    model = AutoModelForCausalLM.from_pretrained(run)
    for prompt, (response,) in zip(last["prompts"], last["responses"]):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, max_new_tokens=R, do_sample=False, attention_mask=torch.ones_like(ids))
        assert theirs[0, len(prompt):].tolist() == response


def test_rollouts(tiny, generated):
    run = tiny.fresh(train_rloo, temperature=0.6, top_p=0.9, k=4)
    *rollouts, _ = generated
    assert [asked(call) for call in rollouts] == [dict(K=4, max_new_tokens=R, temperature=0.6, top_p=0.9)] * 2
    known = [row["query_token"] for row in tiny.rows("sft_train")]
    assert all(prompt in known for call in rollouts for prompt in call["prompts"])
    assert rollouts[0]["prompts"] != rollouts[1]["prompts"]
    assert not rollouts[0]["noise"].equal(rollouts[1]["noise"])
    for call, line in zip(rollouts, log(run), strict=True):
        lengths = [len(y) for group in call["responses"] for y in group]
        assert len(lengths) == 8 and line["response_length"] == pytest.approx(sum(lengths) / 8)
        assert line["eos_share"] == pytest.approx(call["ended"].double().mean().item())


def test_samples_of_an_evaluation(tiny, generated):
    """Summaries at --temperature; KL and entropy of others, at --sample_temperature without a nucleus."""
    tiny.fresh(evaluate, temperature=0.6, top_p=0.9, sample_temperature=0.5)
    summaries, samples = generated
    assert asked(summaries) == dict(K=1, max_new_tokens=R, temperature=0.6, top_p=0.9)
    assert asked(samples) == dict(K=1, max_new_tokens=R, temperature=0.5, top_p=1.0)
    generated.clear()
    tiny.fresh(evaluate, temperature=0.6, sample_temperature=0.0)
    assert len(generated) == 1


def test_samples_of_best_of_n(tiny, generated):
    tiny.fresh(best_of_n, temperature=0.6, top_p=0.9)
    (call,) = generated
    assert asked(call) == dict(K=4, max_new_tokens=R, temperature=0.6, top_p=0.9)


# --- which models learn


@each_script
def test_only_the_policy_is_trainable(tiny, script):
    """A model that is only read is frozen: no graph, no gradient, and bfloat16 where products are."""
    trainable = {}

    def look(module, inputs):
        if isinstance(module, NeoX):
            trainable[module] = any(p.requires_grad for p in module.parameters())

    handle = register_module_forward_pre_hook(look)
    try:
        tiny.fresh(script, dtype="bfloat16")
    finally:
        handle.remove()
    models = {
        train_sft: 1, train_rm: 1, train_simpo: 2, train_rloo: 3, train_ppo: 4, train_online: 3, sample: 2,
        evaluate: 3, best_of_n: 2,
    }[script]
    learners = 2 if script is train_ppo else int(script in TRAINING)
    assert len(trainable) == models and sum(trainable.values()) == learners
    for model, learns in trainable.items():
        matrix = model.gpt_neox.layers[0].attention.dense.weight
        assert matrix.dtype == (torch.float32 if learns else torch.bfloat16)


@pytest.mark.parametrize("ppo_epochs", [1, 2, 3])
def test_the_scoring_pass_is_the_first_learning_pass(tiny, ppo_epochs):
    """Of the policy on the packed rows of an update: one pass with a gradient per epoch, and one without it
    after them, for the drift; none for the scoring alone."""
    passes = []

    def look(module, inputs):
        trainable = isinstance(module, NeoX) and any(p.requires_grad for p in module.parameters())
        # else a step of generation
        if trainable and isinstance(getattr(inputs[2], "__self__", None), Groups):
            passes.append("learns" if torch.is_grad_enabled() else "looks")

    handle = register_module_forward_pre_hook(look)
    try:
        run = tiny.fresh(train_rloo, ppo_epochs=ppo_epochs)
    finally:
        handle.remove()
    assert passes == (["learns"] * ppo_epochs + ["looks"]) * len(log(run))


# --- how many updates


@pytest.mark.parametrize("episodes, updates", [(8, 1), (9, 2), (16, 2), (20, 3)])
def test_rloo_samples_at_least_its_episodes(tiny, episodes, updates):
    lines = log(tiny.run(train_rloo, episodes=episodes))
    assert [line["episode"] for line in lines] == [8 * step for step in range(1, updates + 1)]


@pytest.mark.parametrize("script, rows", [(train_sft, 24), (train_rm, 12), (train_simpo, 12)])
def test_an_incomplete_batch_is_dropped(tiny, script, rows):
    assert len(log(tiny.run(script, batch_size=5))) == rows // 5
    assert len(log(tiny.run(script, batch_size=5, epochs=1.5))) == rows * 3 // 2 // 5


# --- the configuration that is saved


@each_training
def test_the_saved_config(tiny, script):
    """Here and as transformers reads it: special tokens not swapped, the architecture that was trained."""
    run = tiny.run(script)
    kind = "GPTNeoXForSequenceClassification" if script is train_rm else "GPTNeoXForCausalLM"
    special = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    expected = SHAPE | special | dict(
        model_type="gpt_neox", architectures=[kind], vocab_size=512, hidden_act="gelu", attention_bias=True,
        use_parallel_residual=True, rotary_emb_base=10000.0, dtype="float32", torch_dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    saved = json.loads((run / "config.json").read_text())
    assert {key: saved.get(key) for key in expected} == expected
    assert saved.get("num_labels") == (1 if script is train_rm else None)
    read = AutoConfig.from_pretrained(run)
    for key in (*special, "architectures", "vocab_size", "hidden_size", "layer_norm_eps"):
        assert getattr(read, key) == expected[key], key
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())
    assert all(math.isfinite(value) for value in measured(run).values())


@each_training
def test_the_saved_tokenizer(tiny, script):
    tokenizer = AutoTokenizer.from_pretrained(tiny.run(script))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|padding|>"]
    assert tokenizer.padding_side == "right"


@each_policy
def test_transformers_generates_with_the_saved_special_tokens(tiny, script):
    generation = AutoModelForCausalLM.from_pretrained(tiny.run(script)).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (0, 1)
