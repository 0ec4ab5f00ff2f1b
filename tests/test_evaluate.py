"""evaluate.py on a tiny world: numbers by formulas, kill and resume, bad input, a real server as a judge."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from judge_server import JudgeServer
from tokenizers import Tokenizer

import data.toy
import evaluate
import evaluation.llm_judge
from data.toy_world import gold_reward
from evaluate import Config, find_checkpoints, main
from evaluation.tables import write_sweep
from rlhf.config import UserError
from rlhf.groups import pack
from rlhf.model import EOS, NeoX, NeoXConfig
from rlhf.pretrained import from_pretrained, load_tokenizer, save_pretrained

torch.set_num_threads(1)
N = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared toy data and four random models: sft, two checkpoints of a run, a reward model.

    std 0.3: they say different things.
    """
    root = tmp_path_factory.mktemp("world")
    data.toy.main(data.toy.Config(
        out_dir=str(root / "data"), posts=N, pairs=4, rankings=1, validation=40, test=1, size="small",
    ))
    raw = json.loads((root / "data/base/config.json").read_text())
    tokenizer = load_tokenizer(str(root / "data/base"))
    for seed, name in enumerate(["sft", "rloo/ckpt/step_00000009", "rloo/ckpt/step_00000010"]):
        model = NeoX(NeoXConfig.from_dict({**raw, "initializer_range": 0.3})).init_weights(seed)
        with torch.no_grad():
            model.embed_out.weight[EOS] *= 3  # now and then one of them ends
        save_pretrained(model, tokenizer, root / name)
    save_pretrained(NeoX(NeoXConfig.from_dict(raw), "score").init_weights(7), tokenizer, root / "rm")
    (root / "rloo/ckpt/writing").mkdir()
    return root


def config(world: Path, out: Path, **changes) -> Config:
    defaults = {
        "data_dir": str(world / "data"), "model": str(world / "sft"), "out_dir": str(out), "n": N,
        "device": "cpu", "response_tokens": 12, "judge_cache": str(out.parent / "answers.jsonl"),
    }
    return Config(**{**defaults, **changes})


def table(path: Path) -> list[dict]:
    return pq.read_table(path / "summaries.parquet").to_pylist()


def full_logprobs(model: NeoX, query: list[int], tokens: list[int]) -> torch.Tensor:
    """log softmax over the vocabulary at every response token, (R, V), the plain way."""
    groups = pack([query], [[tokens]], max_positions=256)
    with torch.no_grad():
        hidden = model(groups.ids, groups.positions, groups.attend)[groups.predicts]  # (R, C)
        return model.embed_out(hidden).double().log_softmax(-1)  # (R, V)


def full_score(model: NeoX, query: list[int], tokens: list[int]) -> float:
    groups = pack([query], [[tokens]], max_positions=256)
    with torch.no_grad():
        hidden = model(groups.ids, groups.positions, groups.attend)  # (T, C)
        return model.scores(hidden[groups.last[0, 0]]).item()


def test_every_number_of_a_greedy_evaluation(world, tmp_path, capsys):
    ref = str(world / "rloo/ckpt/step_00000009")
    rm = str(world / "rm")
    result = main(config(world, tmp_path / "out", judge="gold,rm", reward_model=rm, ref_model=ref))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = table(tmp_path / "out")
    policy = from_pretrained(str(world / "sft"))
    reference = from_pretrained(ref)
    reward_model = from_pretrained(rm, head="score")
    source = pq.read_table(world / "data/sft_validation.parquet").slice(0, N).to_pylist()
    total = Counter()
    for row, post in zip(rows, source, strict=True):
        assert (row["id"], row["query"]) == (post["id"], post["query"])
        assert row["reference"] == post["reference_response"]
        query = post["query_token"]
        p = full_logprobs(policy, query, row["tokens"])  # (R, V)
        q = full_logprobs(reference, query, row["tokens"])  # (R, V)
        ids = torch.tensor(row["tokens"])
        assert torch.equal(p.argmax(-1), ids)  # greedy
        own = p.gather(1, ids[:, None])[:, 0]  # (R,)
        other = q.gather(1, ids[:, None])[:, 0]  # (R,)
        assert row["log_ratios"] == pytest.approx((own - other).tolist(), abs=2e-4)
        assert row["ended"] == (row["tokens"][-1] == EOS)
        assert len(ids) <= 12
        facts = json.loads(post["facts"])
        gold = gold_reward(facts, row["summary"], row["ended"])
        human = gold_reward(facts, post["reference_response"], True)
        assert [row["gold"], row["gold_reference"]] == [gold, human]
        assert row["preference/gold"] == (0.5 if gold == human else float(gold > human))
        assert row["scores"] == pytest.approx(full_score(reward_model, query, row["tokens"]), abs=1e-5)
        assert row["preference/rm"] == float(row["scores"] > row["scores_reference"])
        total["tokens"] += len(ids)
        total["logprob"] += own.sum().item()
        total["ref_logprob"] += other.sum().item()
        total["wins"] += row["preference/gold"]
    nll = -total["ref_logprob"] / total["tokens"]
    assert result["ref_perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert result["surprisal"] == pytest.approx(-total["logprob"] / total["tokens"], rel=1e-4)
    assert result["log_ratio"] == pytest.approx((total["logprob"] - total["ref_logprob"]) / N, rel=1e-4)
    assert result["response_length"] == total["tokens"] / N
    assert result["win_rate"] == total["wins"] / N == result["judges"]["gold"]["win_rate"]
    assert result["judges"]["rm"]["judged"] == N
    assert json.loads((tmp_path / "out/result.json").read_text())["kl"] == result["kl"] > 0


def test_kl_and_entropy_are_of_samples(world, tmp_path):
    """kl and kl_full estimate one number, are 0 to the model itself; summaries may be their own sample."""
    ref = str(world / "rloo/ckpt/step_00000009")
    sampled = main(config(world, tmp_path / "a", ref_model=ref, temperature=1.0, n=40))
    rows = table(tmp_path / "a")
    assert sampled["kl"] == pytest.approx(sampled["log_ratio"])
    assert sampled["entropy"] > 0
    assert [row["sample_kl"] for row in rows] == pytest.approx([sum(row["log_ratios"]) for row in rows])
    spread = torch.tensor([row["sample_kl"] - row["sample_kl_full"] for row in rows])
    assert abs(spread.mean()) < 4 * spread.std() / len(rows) ** 0.5
    row = rows[0]
    query = pq.read_table(world / "data/sft_validation.parquet")["query_token"][0].as_py()
    p = full_logprobs(from_pretrained(str(world / "sft")), query, row["tokens"])  # (R, V)
    q = full_logprobs(from_pretrained(ref), query, row["tokens"])  # (R, V)
    assert row["sample_kl_full"] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3)
    assert row["sample_entropy"] == pytest.approx(-(p.exp() * p).sum().item(), rel=1e-3)
    itself = main(config(world, tmp_path / "b", ref_model=str(world / "sft"), n=8))
    assert itself["kl"] == itself["log_ratio"] == 0
    assert itself["kl_full"] == pytest.approx(0, abs=1e-5)
    none = main(config(world, tmp_path / "c", sample_temperature=0.0, n=8))
    assert not {"kl", "entropy", "ref_perplexity", "win_rate", "step"} & set(none)
    main(config(world, tmp_path / "d", ref_model=ref, temperature=1.0, n=40))
    assert repr(table(tmp_path / "d")) == repr(rows)  # seeded


def sweep_settings(world: Path) -> dict:
    model = f"{world / 'sft'},{world / 'rloo/ckpt/*'}"
    return {"model": model, "judge": "gold", "ref_model": str(world / "sft"), "n": 8, "html": True}


def test_a_sweep_is_one_table_and_one_page(world, tmp_path):
    out = tmp_path / "out"
    result = main(config(world, out, **sweep_settings(world)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["sft", "step_00000009", "step_00000010"]
    assert [line.get("step") for line in lines] == [None, 9, 10]
    assert result["checkpoints"] == 3
    assert result["win_rate"] == max(line["win_rate"] for line in lines)
    assert lines[0]["kl"] == 0 < lines[1]["kl"]
    rows = [table(out / line["name"]) for line in lines]
    for line, own in zip(lines, rows, strict=True):
        difference = sum(row["preference/gold"] for row in own) / 8 - lines[0]["win_rate"]
        assert line["difference"] == pytest.approx(difference)
        assert line["difference_low"] <= difference <= line["difference_high"]
        assert line["win_rate_low"] <= line["win_rate"] <= line["win_rate_high"]
        assert line["gold/win_rate"] == line["win_rate"]
    assert len((out / "sweep.csv").read_text().splitlines()) == 4
    page = json.loads((out / "page.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert [k["win_rate"] for k in page["checkpoints"]] == [line["win_rate"] for line in lines]
    assert page["judges"] == ["gold"]
    for post, *together in zip(page["posts"], *rows, strict=True):
        assert post["query"] == together[0]["query"]
        for shown, row in zip(post["summaries"], together, strict=True):
            assert shown["text"] == row["summary"]
            assert shown["preferences"] == [row["preference/gold"]]
            assert len(shown["pieces"]) == len(shown["ratios"]) == len(row["tokens"])


def test_a_sweep_skips_what_is_done(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    settings = sweep_settings(world)
    result = main(config(world, out, **settings))
    csv = (out / "sweep.csv").read_text()
    page = (out / "page.html").read_text()
    monkeypatch.setattr(evaluate, "summarise", lambda *args, **rest: pytest.fail("summarised again"))
    assert main(config(world, out, **settings))["win_rate"] == result["win_rate"]
    assert (out / "sweep.csv").read_text() == csv
    assert (out / "page.html").read_text() == page
    monkeypatch.undo()
    shutil.rmtree(out / "step_00000010")
    main(config(world, out, **settings))
    assert (out / "sweep.csv").read_text() == csv
    trained_anew = world / "rloo/ckpt/step_00000010"
    weights = trained_anew / "model.safetensors"
    before = weights.read_bytes()
    os.utime(weights)  # a copy with another date is the same model
    seen = []

    def summarise(cfg, path, **rest):
        seen.append(path)
        return table(out / "sft")

    monkeypatch.setattr(evaluate, "summarise", summarise)
    main(config(world, out, **settings))
    assert not seen and (out / "sweep.csv").read_text() == csv
    weights.write_bytes((world / "rloo/ckpt/step_00000009/model.safetensors").read_bytes())
    main(config(world, out, **settings))
    weights.write_bytes(before)
    assert seen == [str(trained_anew)] and (out / "sweep.csv").read_text() != csv
    assert f"{out}/step_00000010: evaluated anew" in capsys.readouterr().out


def test_a_sweep_without_a_judge_names_no_best(world, tmp_path):
    settings = sweep_settings(world) | {"judge": "none", "n": 2}
    assert set(main(config(world, tmp_path / "out", **settings))) == {"checkpoints", "out_dir", "seconds"}
    lines = [{"name": "a", "win_rate": None}, {"name": "b", "win_rate": 0.0}, {"name": "c", "win_rate": 0.25}]
    assert evaluate.best_of(lines) == {"checkpoints": 3, "best": "c", "win_rate": 0.25}


def test_a_sweep_goes_on_beside_results_with_fewer_columns(tmp_path):
    """A result.json that an earlier version wrote lacks a column: its place in the table is empty."""
    results = [{"name": "old", "judges": {}}, {"name": "new", "lc_extrapolated": True, "judges": {}}]
    assert len(write_sweep(tmp_path, results, {}, [])) == 2
    assert (tmp_path / "sweep.csv").read_text() == "name,lc_extrapolated\nold,\nnew,True\n"


def test_names_of_checkpoints(tmp_path):
    for path in ("a/ckpt/step_9", "a/ckpt/step_10", "b/ckpt/step_9", "b/ckpt/writing"):
        (tmp_path / path).mkdir(parents=True)
    assert list(find_checkpoints(f"{tmp_path}/a/ckpt/*")) == ["step_9", "step_10"]
    several = ["a-ckpt-step_9", "a-ckpt-step_10", "b-ckpt-step_9"]
    assert list(find_checkpoints(f"{tmp_path}/*/ckpt/*")) == several
    assert find_checkpoints("EleutherAI/pythia-1b") == {"pythia-1b": "EleutherAI/pythia-1b"}
    assert find_checkpoints("out/sft/,out/rm") == {"sft": "out/sft", "rm": "out/rm"}


def bad_inputs() -> dict:
    return {
        "no data": ({"data_dir": "nowhere"}, "nowhere"),
        "no model": ({"model": "nowhere/model"}, "nowhere/model"),
        "no match": ({"model": "nowhere/*"}, "no directory matches"),
        "twice": ({"model": "a,a"}, "twice"),
        "twice, in two spellings": ({"model": "a,./a/"}, "twice"),
        "nothing": ({"model": ""}, "no model"),
        "no split": ({"split": "tset"}, "sft_tset"),
        "no judge": ({"judge": "golden"}, "golden"),
        "no reward model": ({"judge": "rm"}, "--reward_model"),
        "a policy as reward model": ({"judge": "rm", "reward_model": "{world}/sft"}, "not a reward model"),
        "agreement of nobody": ({"agreement": "pairs_validation"}, "--judge"),
        "no such pairs": ({"judge": "gold", "agreement": "pairs_x"}, "pairs_x"),
        "a nucleus of nothing": ({"top_p": 0.0}, "--top_p"),
        "too long": ({"response_tokens": 500}, "context"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line(world, tmp_path, case):
    changes, message = bad_inputs()[case]
    if "reward_model" in changes:
        changes["reward_model"] = changes["reward_model"].format(world=world)
    with pytest.raises(UserError, match=message) as error:
        main(config(world, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)


def test_an_existing_directory_is_not_overwritten(world, tmp_path, capsys):
    out = tmp_path / "out"
    small = {"n": 4, "sample_temperature": 0.0}
    main(config(world, out, **small))
    before = (out / "summaries.parquet").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        main(config(world, out, **small))
    with pytest.raises(UserError, match="--n was 4, is 5"):
        main(config(world, out, resume=True, n=5, sample_temperature=0.0))
    assert main(config(world, out, resume=True, **small))["rows"] == 4
    assert (out / "summaries.parquet").read_bytes() == before
    assert main(config(world, out, overwrite=True, n=5, sample_temperature=0.0))["rows"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds no run.json"):
            main(config(world, tmp_path / "mine", **small, **changes))


def test_agreement_with_the_human_choices(world, tmp_path, capsys):
    settings = {"judge": "gold", "agreement": "pairs_validation", "n": 4, "sample_temperature": 0.0}
    found = main(config(world, tmp_path / "out", **settings))["agreement"]["gold"]
    agreed = []
    for pair in pq.read_table(world / "data/pairs_validation.parquet").to_pylist():
        facts = json.loads(pair["facts"])
        chosen, rejected = (gold_reward(facts, pair[side], True) for side in ("chosen", "rejected"))
        agreed.append(0.5 if chosen == rejected else float(chosen > rejected))
    assert found["pairs"] == len(agreed) == 40
    assert found["agreement"] == pytest.approx(sum(agreed) / 40)
    out = capsys.readouterr().out
    assert "judge gold agrees with people on" in out
    assert f"(by {found['longer_by']})" in out


def test_a_length_controlled_win_rate_that_extrapolates_says_so(world, tmp_path, capsys):
    """One token a summary is far shorter than any reference: the number stands, with a flag in the result and
    a line under the table."""
    settings = {"n": 8, "sample_temperature": 0.0}
    short = main(config(world, tmp_path / "short", judge="gold", response_tokens=1, **settings))
    assert short["lc_extrapolated"] is short["judges"]["gold"]["lc_extrapolated"] is True
    assert short["lc_win_rate"] is not None
    assert "lc_win of sft is extrapolated" in capsys.readouterr().out
    about_as_long = str(world / "rloo/ckpt/step_00000010")
    fair = main(config(world, tmp_path / "fair", judge="gold", model=about_as_long, **settings))
    assert fair["lc_extrapolated"] is False
    assert "is extrapolated" not in capsys.readouterr().out
    assert "lc_extrapolated" not in main(config(world, tmp_path / "none", **settings))


# --- the language model as the judge


@pytest.fixture
def key(monkeypatch):
    reason = "openai is not installed (requirements-judge.txt): the language-model judge is not tested"
    pytest.importorskip("openai", reason=reason)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-to-be-seen-0123456789")
    monkeypatch.setattr(evaluation.llm_judge, "FIRST_WAIT", 0.02)
    return "sk-never-to-be-seen-0123456789"


def test_killed_and_resumed_gives_the_identical_table(world, tmp_path, key):
    """kill -9 while it summarises, judges and ends; the server fails now and then. Then the same command to
    the end."""
    settings = {
        "model": str(world / "rloo/ckpt/*"), "judge": "llm,gold", "judge_model": "tiny",
        "ref_model": str(world / "sft"), "n": 16,
    }

    def flaky(prompt: str, attempt: int) -> str | None:
        return random.Random(prompt).choice(["500", "cut", None]) if attempt % 2 == 0 else None

    with JudgeServer(fault=flaky, delay=0.03) as server:
        whole = config(world, tmp_path / "whole/out", **settings, judge_url=server.url)
        main(whole)
        asked = sum(server.answered.values())
        killed = config(world, tmp_path / "killed/out", **settings, judge_url=server.url)
        first = tmp_path / "killed/out/step_00000009"
        moments = [
            first.exists,
            (first / "summaries.parquet").exists,
            lambda: sum(server.answered.values()) > 1.3 * asked,
            lambda: sum(server.answered.values()) > 1.8 * asked,
            (first / "result.json").exists,
            lambda: False,
        ]
        ends = []
        for moment in moments:
            process = multiprocessing.get_context("fork").Process(target=main, args=(killed,))
            process.start()
            while process.is_alive() and not moment():
                time.sleep(0.001)
            if moment():
                process.kill()
            process.join()
            ends.append(process.exitcode)
        assert ends[-1] == 0, ends
        assert ends.count(-signal.SIGKILL) >= 3, ends
        assert asked <= sum(server.answered.values()) - asked <= asked + 4 * killed.judge_concurrency
    for file in ("sweep.csv", "metrics.jsonl"):
        assert (tmp_path / "whole/out" / file).read_bytes() == (tmp_path / "killed/out" / file).read_bytes()
    for name in ("step_00000009", "step_00000010"):
        assert repr(table(tmp_path / "whole/out" / name)) == repr(table(tmp_path / "killed/out" / name))
        assert not list((tmp_path / "killed/out" / name).glob("*.writing"))
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert key.encode() not in written


def chain_model(folder: Path) -> None:
    """A GPT-NeoX that says "Preferred: A" to whatever it reads: its layers add nothing, a token's embedding
    points at the next one's row."""
    words = ["<|endoftext|>", "<|padding|>", "Preferred", ":", " A", "\n", "#"]
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words + letters))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": "Preferred| A|."}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.from_str(json.dumps({
        "version": "1.0",
        "added_tokens": [{"id": i, "content": words[i], **flags} for i in (0, 1)],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"},
        "pre_tokenizer": split,
        "decoder": {"type": "Fuse"},
    }))
    model = NeoX(NeoXConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    ))
    said = ["#", "Preferred", ":", " A", "<|endoftext|>"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        ids = tokenizer.get_vocab()
        for place, (now, then) in enumerate(zip(said, said[1:])):
            model.gpt_neox.embed_in.weight[ids[now], place] = 1.0
            model.embed_out.weight[ids[then], place] = 1.0
    save_pretrained(model, tokenizer, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}#"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_against_a_real_server(world, tmp_path, key):
    """`transformers serve`, with faults in front of it: a model that always prefers what it sees first is
    reported as just that."""
    for package in ("fastapi", "uvicorn"):
        reason = "transformers[serving] is not installed: no real server as the judge"
        pytest.importorskip(package, reason=reason)
    chain_model(tmp_path / "judge")
    port = str(random.Random(os.getpid()).randint(20000, 50000))
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "judge")]
    serve += ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(serve, stdout=log, stderr=log, env=environment)

    def faults(prompt: str, attempt: int) -> str | None:
        return random.Random(prompt).choice(["429", "500", "cut", None]) if attempt == 0 else None

    try:
        deadline = time.time() + 60
        while "startup complete" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        with JudgeServer(upstream=f"http://127.0.0.1:{port}/v1", fault=faults) as proxy:
            result = main(config(
                world, tmp_path / "out", n=8, sample_temperature=0.0, judge="llm", judge_url=proxy.url,
                judge_model=str(tmp_path / "judge"), judge_concurrency=2,
            ))
            assert set(proxy.answered.values()) == {1}
            assert len(proxy.answered) == 16
    finally:
        process.terminate()
        process.wait(20)
    verdict = result["judges"]["llm"]
    assert table(tmp_path / "out")[0]["answers/llm"] == ["Preferred: A"] * 2
    assert (verdict["win_rate"], verdict["judged"], verdict["unread"]) == (0.5, 8, 0)
    assert (verdict["first_share"], verdict["consistent"]) == (1.0, 0.0)
