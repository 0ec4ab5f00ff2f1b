"""The study of the online family: its commands, its table, answers over training, a language model as a
reward and as what compares."""

import json
import sys
from pathlib import Path

import pytest
from test_loss_table import write_run, write_sweep

import train_online
import train_ppo
import train_rloo
import train_sft
import train_simpo
from rlhf.config import RunError, UserError, parser
from rlhf.reward_fn import load_reward_fn, rewards_of
from study import losses, online, pipeline, plot, samples
from study.tasks import Task, given

ROOT = Path(__file__).parents[1]


def configured(task: Task):
    """The script of a task, and the configuration that its command line gives."""
    import sample

    script, *options = task.words
    modules = {m.__name__: m for m in (train_rloo, train_ppo, train_online, train_sft, train_simpo, sample)}
    module = modules[script.removesuffix(".py")]
    return module, module.Config(**vars(parser(module.Config, None).parse_args(options)))


@pytest.mark.parametrize("name", online.METHODS)
def test_every_method_is_a_valid_command(name):
    """Every option is known, and the script's own check passes; the pipeline's ends meet."""
    cfg = online.Config(out_dir="out/x", episodes=3200)
    chain = online.chain(name, 2, cfg)
    for task in chain:
        module, given = configured(task)
        if hasattr(module, "with_options"):
            given = module.with_options(given)
            given = given[0] if isinstance(given, tuple) else given
        if hasattr(module, "check"):
            module.check(given)
        assert given.seed == 2 and given.resume
    assert given.out_dir == f"out/x/{name}_s2"
    first = configured(chain[0])[1]
    assert first.data_dir == "out/x/data"
    if len(online.METHODS[name]) > 3:
        assert given.data_dir == first.out_dir == f"out/x/{name}_s2_data"


# as scripts before study/pipeline.py wrote them, where a run of them is to go on
EARLIER = {
    "rloo": [
        "train_rloo.py --resume --data_dir=o/data --model=o/sft --reward_model=o/rm --out_dir=o/rloo_s1 "
        "--seed=1 --k=4 --batch_size=64 --episodes=2560 --lr=2e-4 --ppo_epochs=1 --schedule=constant "
        "--reward=kl:0.1",
    ],
    "ensemble": [
        "train_rloo.py --resume --data_dir=o/data --model=o/sft --reward_model=o/rm --out_dir=o/ensemble_s1 "
        "--seed=1 --k=4 --batch_size=64 --episodes=2560 --lr=2e-4 --ppo_epochs=1 --schedule=constant "
        "--reward=kl:0.1 --reward_model=o/rm,o/rm_2,o/rm_3",
    ],
    "mpo": [
        "sample.py --resume --data_dir=o/data --model=o/sft --reward_model=o/rm --out_dir=o/mpo_s1_data "
        "--seed=1 --rows=800 --select=gap --k=4 --gap=0.5",
        "train_simpo.py --resume --data_dir=o/mpo_s1_data --model=o/sft --out_dir=o/mpo_s1 --seed=1 "
        "--batch_size=32 --lr=1e-4 --loss=dpo --beta=0.1 --out_dir=o/mpo_s1_dpo",
        "train_rloo.py --resume --data_dir=o/mpo_s1_data --model=o/sft --reward_model=o/rm "
        "--out_dir=o/mpo_s1 --seed=1 --k=4 --batch_size=64 --episodes=2560 --lr=2e-4 --ppo_epochs=1 "
        "--schedule=constant --reward=kl:0.1 --model=o/mpo_s1_dpo",
    ],
}


@pytest.mark.parametrize("name", EARLIER)
def test_runs_of_earlier_scripts_are_known_as_finished(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = online.chain(name, 1, online.Config(out_dir="o"))
    for task, command in zip(chain, EARLIER[name], strict=True):
        assert not task.finished()
        task.out.mkdir(parents=True)
        (task.out / "result.json").write_text("{}")
        (task.out / "run.json").write_text(json.dumps({"command": command, "config": {}}))
        assert task.finished()
        other = command.replace("--seed=1", "--seed=2")
        (task.out / "run.json").write_text(json.dumps({"command": other, "config": {}}))
        assert not task.finished()


def test_what_earlier_scripts_prepared_is_known_as_finished():
    out = Path("o")
    found = [*pipeline.sft_model(out), *pipeline.reward_models(out, out, (1, 2, 3)),
             *losses.tasks("dpo", 2, out)]
    rm = ("train_rm.py --resume --data_dir=o/data --model=o/data/base --init=scratch --out_dir=o/{} "
          "--seed={} --lr=1.5e-3 --warmup=0.1 --max_grad_norm=0.5 --adam_eps=1e-8 --batch_size=32 "
          "--train_rows=20000 --center_rows=500")
    earlier = [
        "train_sft.py --resume --data_dir=o/data --model=o/data/base --init=scratch --out_dir=o/sft "
        "--lr=2e-3 --warmup=0.05 --batch_size=16 --train_rows=4800 --loss_on=response --max_grad_norm=1",
        rm.format("rm", 1), rm.format("rm_2", 2), rm.format("rm_3", 3),
        "train_simpo.py --resume --data_dir=o/data --model=o/sft --loss=dpo --seed=2 --train_rows=5000 "
        "--batch_size=32 --lr=1e-4 --out_dir=o/dpo_s2",
    ]
    assert [given(task.words) for task in found] == [given(command.split()) for command in earlier]


def test_options_of_the_studies():
    with pytest.raises(UserError, match="--only=rlo: unknown: rlo; known: rloo"):
        online.main(online.Config(out_dir="x", only="rlo"))
    for seeds in ("", "1,", "1,a", "1,1", "0"):
        with pytest.raises(UserError, match=f"--seeds={seeds}: whole numbers from 1"):
            online.main(online.Config(out_dir="x", seeds=seeds))


def test_table_of_methods(tmp_path, capsys):
    write_run(tmp_path, "sft", "train_sft", [0.0])
    for name, script in (("rloo_s1", "train_rloo"), ("rloo_s2", "train_rloo"), ("ppo_s1", "train_ppo")):
        write_run(tmp_path, name, script, [0.0], **({"kl_coef": 0.1} if script == "train_ppo" else {}))
    write_sweep(tmp_path, sft=(0.5, 0.0, 20), rloo_s1=(0.7, 1, 20), rloo_s2=(0.8, 2, 30), ppo_s1=(0.9, 3, 25))
    (tmp_path / "seconds.txt").write_text("rloo_s1 10\nrloo_s1_data 5\nrloo_s2 17\n")
    online.main(online.Config(out_dir=str(tmp_path), table=True))
    assert capsys.readouterr().out.splitlines() == [
        "| method | arXiv | command | gold | KL | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
        "| (SFT) | | | 0.50 | 0.00 | 20.00 | |",
        "| RLOO | 2402.14740 | `train_rloo.py --reward=kl:0.1` | 0.75 ± 0.07 | 1.50 ± 0.71 "
        "| 25.00 ± 7.07 | 16 |",
        "| PPO with a critic | 2403.17031 | `train_ppo.py --kl_coef=0.1` | 0.90 | 3.00 | 25.00 |  |",
    ]
    write_run(tmp_path, "xpo_s1", "train_online", [0.0])
    with pytest.raises(UserError, match="xpo_s1: no eval"):
        online.table(tmp_path)


def test_the_readme_has_every_method_with_its_command():
    readme = (ROOT / "README.md").read_text()
    for name, (title, source, *_) in online.METHODS.items():
        assert f"| {title} | {source} | {online.short(name)} |" in readme, name


def test_the_hand_written_reward():
    prompts = ["SUBREDDIT: r/x\n\nPOST: monday keys boss cars\n\nTL;DR:"] * 3
    texts = [" monday keys.", " monday keys monday keys.", " x keys."]
    assert online.faithful(prompts, texts) == [0.2, 0.0, 0.0]


# --- answers over training


def look(step: int, *texts: str, prompt: str = "POST: $a$\n\nTL;DR:") -> str:
    responses = [{"text": text, "score": 0.5 * i, "ended": i != 1} for i, text in enumerate(texts)]
    return json.dumps({"step": step, "prompt": prompt, "responses": responses}) + "\n"


def test_answers_over_training(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [look(step, f" word {step // 20}", " again", prompt=p)
                 for step in range(1, 102, 10) for p in ("first", "second")]
        (tmp_path / name / "samples.jsonl").write_text("".join(lines) + '{"step": 1')
    found = samples.read_samples(tmp_path / "a/samples.jsonl")
    assert list(found) == ["first", "second"] and len(found["first"]) == 11
    lines = samples.column(found["second"])
    shown = [text for text, _ in lines if text.startswith("update")]
    assert shown == ["update 1", "update 21", "update 41", "update 61", "update 81", "update 101"]
    assert lines[2:4] == [("  0.00  word 0", "black"), ("  0.50  again [...]", "black")]
    assert lines[6:8] == [("  0.00  word 1", "black"), ("  0.50  again [...]", samples.GRAY)]
    out = tmp_path / "picture.png"
    plot.main(plot.Config(runs=f"A={tmp_path}/a,{tmp_path}/b", samples=True, prompt=2, out=str(out)))
    assert out.stat().st_size > 5000
    with pytest.raises(UserError, match="--prompt=3: the run shows 2 prompts"):
        plot.main(plot.Config(runs=f"{tmp_path}/a", samples=True, prompt=3))
    (tmp_path / "b/samples.jsonl").write_text(look(1, "x", prompt="third"))
    with pytest.raises(UserError, match="b shows other prompts than A"):
        plot.main(plot.Config(runs=f"A={tmp_path}/a,{tmp_path}/b", samples=True))
    (tmp_path / "b/samples.jsonl").write_text("")
    with pytest.raises(UserError, match="no samples in it"):
        plot.main(plot.Config(runs=f"{tmp_path}/b", samples=True))
    with pytest.raises(UserError, match="matches no run .a directory with samples.jsonl"):
        plot.main(plot.Config(runs=f"{tmp_path}/c", samples=True))


# --- a language model as reward, and as what compares


@pytest.fixture
def judge_fn(monkeypatch, tmp_path):
    """(module, environment of a server) -> its functions, as a script loads them."""
    pytest.importorskip("openai", reason="openai is not installed (requirements-judge.txt)")

    def load(url: str, name: str):
        for key, value in {"JUDGE_MODEL": "tiny", "JUDGE_URL": url, "NO_PROXY": "127.0.0.1",
                           "JUDGE_CACHE": str(tmp_path / "cache.jsonl")}.items():
            monkeypatch.setenv(key, value)
        sys.modules.pop("reward_fn_judge_fn", None)
        return load_reward_fn(f"{ROOT}/evaluation/judge_fn.py:{name}")

    return load


def test_a_language_model_grades(judge_fn, capsys):
    from judge_server import JudgeServer

    def answer(prompt):
        said = prompt.split("### Summary:\n")[1].split("\n\n### Instructions")[0]
        return {"good": "9", "fair": "Grade: 5/10.", "odd": "five"}[said]

    with JudgeServer(answer) as server:
        grade = judge_fn(server.url, "grade")
        scores = rewards_of(grade, ["POST: a"] * 4, [" good", " fair", " odd", " good"])
        asked = sum(server.answered.values())
        rewards_of(grade, ["POST: a"], [" good"])
        assert sum(server.answered.values()) == asked == 3  # nothing twice
    assert scores.tolist() == pytest.approx([0.9, 0.5, 0.5, 0.9])
    assert "1 of 4 answers could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("answer, grade", [
    ("7", 0.7), ("10", 1.0), ("7/10", 0.7), ("**8**", 0.8),
    ("0", None), ("11", None), ("7.5", None), ("", None), ("between 6 and 8", None),
])
def test_grades(judge_fn, answer, grade):
    read = judge_fn("http://127.0.0.1:1/v1", "parse_grade")(answer)
    assert read == grade if grade else read != read


def test_a_language_model_compares(judge_fn):
    from judge_server import JudgeServer

    with JudgeServer() as server:  # the text that sorts first is better
        prefer = judge_fn(server.url, "prefer")
        wins = rewards_of(prefer, ["POST: a"] * 3, [" b", " c", " d"], [" c", " b", " d"])
    assert wins.tolist() == [1.0, 0.0, 0.5]


def test_a_language_model_that_nobody_named(judge_fn, monkeypatch):
    grade = judge_fn("http://127.0.0.1:1/v1", "grade")
    monkeypatch.delenv("JUDGE_MODEL")
    with pytest.raises(RunError, match="JUDGE_MODEL"):
        rewards_of(grade, ["a"], ["b"])
