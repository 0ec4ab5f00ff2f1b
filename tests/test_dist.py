"""One, two and three ranks (gloo) against one process: the same samples, logs and weights.

AdamW's epsilon is 1 here (tiny.base): a step is lr x gradient, so a wrong gradient is a wrong weight.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tiny import SHAPE, VOCABULARY, apart, base, distance, log, measured, weights

import evaluate
import sample
import train_online
import train_ppo
import train_rloo
import train_rm
import train_sft
import train_simpo
from rlhf.model import NeoX, NeoXConfig
from rlhf.pretrained import load_tokenizer, save_pretrained
from study import best_of_n

HERE = Path(__file__).parent
CLOSE = 1e-5  # of weights
LONG = {"micro_batch_tokens": 1}  # every prompt alone: 3 on 2 ranks, 5 on 3

# name -> script, options. Batches of 3, 5 and 6 prompts: 2 and 3 ranks do not always divide them.
RUNS = {
    "sft": (train_sft, dict(batch_size=6, save_every=2, max_grad_norm=1.0, eval_every=1)),
    "sft_alone": (train_sft, dict(batch_size=5, **LONG)),
    "rm": (train_rm, dict(center=True)),
    "dpo": (train_simpo, dict(gradient_checkpointing=True)),
    "vpo": (train_simpo, dict(loss="vpo", beta=None)),
    "rloo": (train_rloo, dict(batch_size=10, episodes=30, save_every=1, samples_every=1)),
    "rloo_clipped": (train_rloo, dict(
        batch_size=6, episodes=12, max_grad_norm=0.5, gradient_checkpointing=True, rollout_prompts=1,
        samples_every=1, **LONG,
    )),
    "adaptive": (train_rloo, dict(rollout="adaptive", k=2, batch_size=6, episodes=12)),
    "ppo": (train_ppo, dict(batch_size=10, episodes=20, max_grad_norm=1.0, save_every=1)),
    "online": (train_online, dict(batch_size=20, episodes=40, mixture=0.3, round_updates=1)),
    "bf16": (train_sft, dict(batch_size=6, dtype="bfloat16", **LONG)),
    "rloo_bf16": (train_rloo, dict(
        batch_size=12, episodes=12, rollout_prompts=1, dtype="bfloat16", **LONG,
    )),
    "one_long": (train_sft, dict(data_dir="{world}/one_long", batch_size=6, micro_batch_tokens=100)),
    "tied": (train_sft, dict(model="{world}/tied", batch_size=5)),
}
RESUMED = ("sft", "rloo", "ppo")
JUDGED = {  # no weights, but numbers and tables
    "evaluate": (evaluate, dict(judge="gold,rm", n=5)),
    "sample": (sample, dict(rows=7, rollout_prompts=3)),
    "best_of_n": (best_of_n, dict(rows=5)),
}
BROKEN = {  # what is broken: the run that has to differ then
    "mean_of_gradients": "dpo", "norms_not_summed": "dpo", "noise_per_rank": "rloo", "wrong_order": "rloo",
}


def options(tiny, name: str, out: Path, **changes) -> dict:
    script, own = (RUNS | JUDGED)[name]
    merged = base(script) | own | changes | {"out_dir": str(out)}
    merged = {k: v.format(world=tiny.root) if isinstance(v, str) else v for k, v in merged.items()}
    return {k: v for k, v in merged.items() if v is not None}


def job(tiny, name: str, out: Path | str, broken: str = "", folders: tuple = (), **changes) -> dict:
    """`folders`: where each rank stands."""
    script = (RUNS | JUDGED)[name][0].__name__
    config = options(tiny, name, out, **changes)
    folders = [str(folder) for folder in folders or 3 * [tiny.root]]
    return {"script": script, "config": config, "broken": broken, "folders": folders}


def cut(run: Path, copy: Path, step: int) -> Path:
    """The run as a kill after this step's checkpoint left it."""
    shutil.copytree(run, copy)
    for path in copy.iterdir():
        if path.is_file() and path.name not in ("run.json", "metrics.jsonl", "samples.jsonl"):
            path.unlink()
    for folder in (copy / "ckpt").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


@pytest.fixture(scope="module")
def more(tiny) -> None:
    """Data with one very long response; a model whose head is its embedding."""
    folder = tiny.root / "one_long"
    shutil.copytree(tiny.root / "data", folder)
    rows = tiny.rows("sft_train")
    response = rows[3]["reference_response_token"]
    rows[3]["reference_response_token"] = [*(15 * response[:-1]), response[-1]][-150:]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sft_train.parquet")
    config = NeoXConfig(vocab_size=VOCABULARY, **SHAPE | {"tie_word_embeddings": True})
    tied = NeoX(config).init_weights(5)
    save_pretrained(tied, load_tokenizer(str(tiny.root / "policy")), tiny.root / "tied")


def jobs_of(tiny, ranks: int) -> dict[str, dict]:
    return {name: job(tiny, name, tiny.root / f"{name}_{ranks}") for name in RUNS | JUDGED}


@pytest.fixture(scope="module")
def one(tiny, more, launcher) -> dict[str, Path]:
    """Every run in one process; meanwhile those on one rank are begun."""
    launcher.start(1, list(jobs_of(tiny, 1).values()), tiny.root / "jobs_1")
    out = {}
    for name, (script, _) in (RUNS | JUDGED).items():
        out[name] = tiny.root / f"one_{name}"
        result = script.main(script.Config(**options(tiny, name, out[name])))
        (out[name] / "returned.json").write_text(json.dumps(result))
    assert not any(error for (error,) in launcher.results(1, tiny.root / "jobs_1"))
    return out


@pytest.fixture(scope="module")
def ranked(tiny, one, launcher) -> dict[tuple[str, int], Path]:
    """Every run on 1, 2 and 3 ranks, resumed ones and broken ones."""
    out = {(name, 1): tiny.root / f"{name}_1" for name in RUNS | JUDGED}
    for n in (2, 3):
        jobs = jobs_of(tiny, n)
        for name in RESUMED:
            before = one[name] if n == 2 else out[name, 2]  # 1 -> 2 and 2 -> 3 ranks
            folder = cut(before, tiny.root / f"{name}_resumed_{n}", 2 if name != "ppo" else 1)
            jobs[f"{name} resumed"] = job(tiny, name, folder, resume=True)
        if n == 2:
            for broken, name in BROKEN.items():
                jobs[broken] = job(tiny, name, tiny.root / broken, broken)
            folder = cut(one["sft"], tiny.root / "moments_lost", 2)
            jobs["moments_lost"] = job(tiny, "sft", folder, "moments_lost", resume=True)
        errors = launcher.run(n, list(jobs.values()), tiny.root / f"jobs_{n}")
        failed = {name: error for name, error in zip(jobs, errors) if any(error)}
        # Log-probs of other responses under the ratio: that it ends in infinite weights is a difference too.
        assert failed.keys() <= {"wrong_order"}, failed
        assert all("not finite" in said for error in failed.values() for said in error), failed
        out |= {(name, n): Path(task["config"]["out_dir"]) for name, task in jobs.items()}
    return out


def moved(tiny, name: str, run: Path) -> float:
    start = weights(tiny.root / "policy")
    end = weights(run)
    shared = start.keys() & end.keys()
    return apart({k: start[k] for k in shared}, {k: end[k] for k in shared})


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_makes_the_same_run(tiny, one, ranked, name, ranks):
    run = ranked[name, ranks]
    assert moved(tiny, name, one[name]) > 1e-3
    assert distance(run, one[name]) < CLOSE
    ours, theirs = measured(run), measured(one[name])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        close = 1e-3 * max(1.0, abs(value)) if key.endswith("grad_norm") else 1e-4 * max(1.0, abs(value))
        assert abs(ours[key] - value) < close, key
    assert json.loads((run / "run.json").read_text())["ranks"] == ranks


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", JUDGED)
def test_prompts_are_shared_and_one_rank_writes(one, ranked, name, ranks):
    run = ranked[name, ranks]
    ours, theirs = measured(run), measured(one[name])
    assert ours.keys() == theirs.keys() and len(ours) > 5
    assert max(abs(ours[key] - value) / max(1, abs(value)) for key, value in theirs.items()) < 1e-4
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in one[name].iterdir())


@pytest.mark.parametrize("ranks", [2, 3])
def test_samples_do_not_depend_on_ranks_or_on_rollout_prompts(tiny, one, ranked, ranks):
    for name in ("rloo", "rloo_clipped"):
        texts = [
            [r["text"] for line in (run / "samples.jsonl").read_text().splitlines()
             for r in json.loads(line)["responses"]]
            for run in (one[name], ranked[name, ranks])
        ]
        assert texts[0] == texts[1] and len(set(texts[0])) > 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_number_of_ranks(one, ranked, name, ranks):
    run = ranked[f"{name} resumed", ranks]
    assert distance(run, one[name]) < CLOSE
    assert [line["step"] for line in log(run)] == [line["step"] for line in log(one[name])]


def test_a_checkpoint_has_the_same_files_and_numbers_whoever_wrote_it(one, ranked):
    folders = [run / "ckpt/step_00000002" for run in (one["sft"], ranked["sft", 2], ranked["sft", 3])]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == names[2] and "optimizer.safetensors" in names[0]
    states = [load_file(folder / "optimizer.safetensors") for folder in folders]
    for state in states[1:]:
        assert apart(state, states[0]) < CLOSE
    assert max(v.abs().max() for k, v in states[0].items() if k.endswith(".exp_avg")) > 1e-3


@pytest.mark.parametrize("broken", [*BROKEN, "moments_lost"])
def test_twin(one, ranked, broken):
    run = ranked[broken, 2]
    diverged = broken == "wrong_order" and not (run / "result.json").exists()
    assert diverged or distance(run, one[BROKEN.get(broken, "sft")]) > 10 * CLOSE


def test_bad_input_is_told_by_every_rank_and_nothing_is_touched(tiny, launcher, tmp_path):
    """Options of one rank, or of one folder per rank; each error is raised by both ranks."""
    both = [tmp_path / "0", tmp_path / "1"]
    for folder, data in zip(both, ("data", "shuffled")):
        folder.mkdir()
        (folder / "data").symlink_to(tiny.root / data)
    out = tmp_path / "run"
    jobs = [
        job(tiny, "sft", out, batch_size=1),
        job(tiny, "rloo", out, batch_size=2, episodes=4),
        job(tiny, "sft", out, folders=both, data_dir="data"),
        job(tiny, "sft", out, "other_code"),
        job(tiny, "sft", "run", folders=both),
        job(tiny, "sft", out, device="cpu", seed=3),
    ]
    told = launcher.run(2, jobs, tmp_path / "jobs.json")
    assert all(bool(ours) == bool(theirs) for ours, theirs in told)
    errors = [error for error, _ in told]
    few = "2 ranks share the 1 prompts of an optimizer step: each needs one; start fewer"
    assert errors[0].startswith(few) and errors[1].startswith(few)
    assert errors[2] == "rank 1 has another model or data than rank 0: all ranks need the same"
    assert errors[3] == "rank 1 has another version of the code than rank 0: all ranks need the same"
    assert errors[4].startswith(f"rank 1 does not see {both[0]}, where rank 0 writes: --out_dir has to be on")
    assert errors[5] == ""
    assert [sorted(path.name for path in folder.iterdir()) for folder in both] == [["data"], ["data"]]


def test_after_whole_and_before_saving_all_is_sharded(tiny, launcher, tmp_path):
    """Layer norms are whole: 1 % of this tiny model."""
    of = {"directory": str(tiny.root / "policy"), "out_dir": str(tmp_path / "saved")}
    jobs = [{"measure": "share", "of": of, "broken": broken} for broken in ("", "no_reshard")]
    held, broken = launcher.run(2, jobs, tmp_path / "jobs.json")
    assert all(0.5 <= share < 0.55 for share in held)
    assert all(share > 0.7 for share in broken)  # the twin: embedding and head stay whole
