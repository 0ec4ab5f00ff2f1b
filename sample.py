r"""Sample, score, select: K responses to every prompt become tables for train_sft.py and train_simpo.py.

    best   per prompt the response with the highest score: RAFT (arXiv 2304.06767), ReST    -> sft_train
    own    ... with the highest log-prob under the model itself: sharpening (2412.01951)    -> sft_train
    rso    rejection sampling from pi exp(r / beta), pairs by score: RSO (2309.06657)       -> pairs_train
    gap    the best and the worst where they are --gap or more apart: mixed preference optimisation
           (2403.19443)                                                                     -> pairs_train
           prompts with a smaller gap, to go on with by RL                                  -> sft_train

A response without EOS is never selected. Every other table is copied. Leaves out: the training
(runs/online.sh has each as a pipeline).
CPU, toy world:
    python sample.py --data_dir=out/toy/data --model=out/toy/sft --reward_model=out/toy/rm --select=best \
        --k=8 --temperature=1 --rows=4000 --out_dir=out/toy/best_of_8
GPU, Pythia 1B: the same with out/tldr, out/1b/sft, out/1b/rm and the defaults
"""

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from data.gold import gold
from rlhf.common import frozen, load_model, setup
from rlhf.config import UserError, check_ranges, command_line
from rlhf.data import check_tables, has_column, open_table, read_meta
from rlhf.dist import FIRST, deal, gather, on_first
from rlhf.files import data_aside, move_data_in, read_objects, write_file
from rlhf.forward import response_scores, token_stats
from rlhf.generate import generate_all
from rlhf.groups import micro_batches, pack
from rlhf.masked import seq_logprobs
from rlhf.model import NeoX
from rlhf.out_dir import check_inputs, check_same, enter, forget_replaced, inputs_of, unlock
from rlhf.pretrained import load_tokenizer, read_json
from rlhf.summaries import texts_of

MAY_CHANGE = {"resume", "overwrite", "device", "micro_batch_tokens", "rank_timeout"}  # where one goes on
IDS = pa.list_(pa.int32())


@dataclass(frozen=True, kw_only=True)
class Config:
    # I/O
    data_dir: str  # prepared data: the prompts are those of its table sft_train
    model: str  # what is sampled from: Hugging Face directory, run directory or hub id
    reward_model: str = ""  # what scores; not needed with --scorer=gold or --select=own
    revision: str = "main"  # revision of hub ids
    out_dir: str  # the prepared data directory to write
    resume: bool = False  # go on where a killed command stopped
    overwrite: bool = False  # replace what is in out_dir
    # samples
    rows: int = 0  # the first prompts (0 = all)
    k: int = 8  # responses per prompt (RSO: 64)
    temperature: float = 0.7  # sampling temperature, also of the log-probs of --select=own
    top_p: float = 1.0  # nucleus of the samples (1 = off; RSO has top-k 40 in its place)
    response_tokens: int = 0  # longest response (0 = what the data says; 53 for TL;DR)
    # selection
    select: Literal["best", "own", "rso", "gap"] = "best"  # see above
    scorer: Literal["rm", "gold"] = "rm"  # whose scores: the reward model's, or the toy world's true ones
    beta: float = 0.5  # of rso: small picks the highest scores, large takes any
    accept: int = 8  # of rso: accepted responses per prompt; neighbours in order of acceptance are a pair
    gap: float = 1.0  # of gap: difference of scores from which a prompt is a pair
    # system
    seed: int = 1  # of the samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #   of matrix products; auto: bfloat16 on CUDA, float32 on CPU
    plain: bool = False  # no flex_attention, no CUDA graph, no torch.compile: slower, needs no compiler
    micro_batch_tokens: int = 8192  # tokens in one forward: memory and speed, not the result
    rollout_prompts: int = 64  # prompts in one generation call: memory and speed, not the result
    rank_timeout: float = 600.0  # seconds that a rank (torchrun) waits for another one


def check(cfg: Config) -> None:
    check_ranges(cfg)
    pairs = cfg.select in ("rso", "gap")
    if cfg.k < 1 + pairs:
        raise UserError(f"--k={cfg.k}: --select={cfg.select} needs at least {1 + pairs} responses per prompt")
    if cfg.select == "rso" and cfg.accept > cfg.k:
        raise UserError(f"--accept={cfg.accept}: of --k={cfg.k} responses no more than that can be accepted")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature={cfg.temperature} must be above 0")
    if cfg.select != "own" and cfg.scorer == "rm" and not cfg.reward_model:
        raise UserError("what scores? give --reward_model, or --scorer=gold in the toy world")


# --- selections: scores (K,) of one prompt's responses, -inf where one must not be chosen -> their numbers


def accepted(scores: Tensor, beta: float, count: int, generator: torch.Generator) -> list[int]:
    """RSO's rejection sampling: up to `count` responses, in order of acceptance.

    In rounds through those left, each is taken with probability exp((r - r_max) / beta), r_max among those
    left when the round began: the algorithm in RSO's appendix, which merges equal responses first. The first
    one follows pi exp(r / beta) / Z if r_max is the highest score there is.
    """
    left = [i for i, score in enumerate(scores.tolist()) if score > -torch.inf]
    taken = []
    while left and len(taken) < count:
        chance = ((scores[left] - scores[left].max()) / beta).exp()
        coins = torch.rand(len(left), generator=generator)
        new = [i for i, heads in zip(left, (coins < chance).tolist()) if heads]
        taken += new[: count - len(taken)]
        left = [i for i in left if i not in new]
    return taken


def pair_of(scores: Tensor, responses: list[list[int]], one: int, other: int) -> tuple[int, int] | None:
    """(better, worse); None where nothing can be learnt: equal scores or equal responses."""
    if scores[one] == scores[other] or responses[one] == responses[other]:
        return None
    return (one, other) if scores[one] > scores[other] else (other, one)


def select(
    cfg: Config, scores: Tensor, responses: list[list[int]], generator: torch.Generator,
) -> tuple[list[tuple], list[int | None], str]:
    """Of one prompt: its pairs (chosen, rejected), its rows of sft_train (the number of a response, or None
    for the human one), and the name under which the prompt is counted."""
    possible = int((scores > -torch.inf).sum())
    if not possible:
        return [], [], "no response with EOS"
    if cfg.select in ("best", "own"):
        return [], [int(scores.argmax())], "selected"
    if cfg.select == "gap":
        best = int(scores.argmax())
        worst = int(torch.where(scores > -torch.inf, scores, torch.inf).argmin())
        if scores[best] - scores[worst] < cfg.gap:
            return [], [None], "narrow"
        pair = pair_of(scores, responses, best, worst)
        return ([pair], [], "wide") if pair else ([], [None], "narrow")
    taken = accepted(scores, cfg.beta, cfg.accept, generator)
    pairs = [pair_of(scores, responses, *two) for two in zip(taken[::2], taken[1::2])]
    pairs = [pair for pair in pairs if pair]
    return pairs, [], "with pairs" if pairs else "without two different responses"


@torch.no_grad()
def scores_of(model: NeoX, head: str, prompts: list, responses: list, cfg: Config) -> Tensor:
    """(n, K) on the CPU: a reward model's scores (head "score"), or a language model's log pi(y|x)."""
    context = model.config.max_position_embeddings
    slices = deal(micro_batches(prompts, responses, cfg.micro_batch_tokens))
    scores = []
    for s in slices:
        groups = pack(prompts[s], responses[s], max_positions=context, device=model.device)
        if head == "score":
            scores.append(response_scores(model, groups))
        else:
            logprobs = token_stats(model, groups, cfg.temperature).logprobs  # (n, K, R)
            scores.append(seq_logprobs(logprobs, groups.response_mask))
    return torch.cat(gather(scores, slices)).cpu()


# --- files


def write_tables(cfg: Config, parts: list[dict], tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Writes sft_train or pairs_train or both, copies the other tables; rows of each written table."""
    rows = open_table(cfg.data_dir, "sft_train", [], cfg.rows).num_rows
    columns = pq.read_schema(Path(cfg.data_dir) / "sft_train.parquet").names
    table = open_table(cfg.data_dir, "sft_train", columns, rows)
    sft = [entry for part in parts for entry in part["sft"]]  # [row, tokens or None] each
    pairs = [entry for part in parts for entry in part["pairs"]]  # [row, chosen, rejected] each
    wanted = {"best": [sft], "own": [sft], "rso": [pairs], "gap": [sft, pairs]}[cfg.select]
    if not all(wanted):
        empty = "sft_train" if wanted[0] is sft and not sft else "pairs_train"
        counts = sum((Counter(part["counts"]) for part in parts), Counter())
        found = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise UserError(f"nothing was selected for {empty} (prompts: {found}): change --gap, --k, --rows, "
                        "--temperature or --response_tokens, and --overwrite")
    written = {}
    if cfg.select != "rso":
        written["sft_train"] = table.take([row for row, _ in sft])
        if cfg.select != "gap":
            best = {"reference_response": [tokens for _, tokens in sft]}
            written["sft_train"] = with_responses(written["sft_train"], best, tokenizer)
    if cfg.select in ("rso", "gap"):
        own = [c for c in ("id", "query", "facts", "query_token") if c in columns]
        posts = table.select(own).take([row for row, _, _ in pairs])
        sides = {"chosen": [c for _, c, _ in pairs], "rejected": [r for _, _, r in pairs]}
        written["pairs_train"] = with_responses(posts, sides, tokenizer)
    for source in Path(cfg.data_dir).iterdir():
        if source.name == "tokenizer.json" or source.suffix == ".parquet" and source.stem not in written:
            shutil.copyfile(source, out / source.name)
    for name, table in written.items():
        pq.write_table(table, out / f"{name}.parquet")
    return {name: len(table) for name, table in written.items()}


def with_responses(
    table: pa.Table, responses: dict[str, list[list[int]]], tokenizer: Tokenizer,
) -> pa.Table:
    """The table with the texts and tokens of these responses, {column: one per row}, in place of its own."""
    for name, tokens in responses.items():
        texts = pa.array(texts_of(tokenizer, [tokens]), pa.string())
        for column, values in ((name, texts), (f"{name}_token", pa.array(tokens, IDS))):
            if column in table.column_names:
                table = table.set_column(table.column_names.index(column), column, values)
            else:
                table = table.append_column(column, values)
    return table


def main(cfg: Config) -> dict:
    meta = read_meta(cfg.data_dir)
    check(cfg)
    device = setup(cfg.seed, cfg.device, cfg.plain, cfg.rank_timeout)
    R = cfg.response_tokens or meta["response_tokens"]  # longest response
    true_reward = gold(cfg.data_dir)  # known in the toy world only
    if cfg.scorer == "gold" and not true_reward:
        raise UserError(f"--scorer=gold: nobody knows the true reward of {cfg.data_dir}: "
                        "give --reward_model")
    out = Path(cfg.out_dir)
    sampled = out / "parts.jsonl"  # one line for each generation call; gone when the tables are there
    about = check_same(cfg, may_change=MAY_CHANGE)
    if cfg.resume and (out / "result.json").exists():
        result = read_json(out / "result.json")
        on_first(partial(sampled.unlink, missing_ok=True))
        print(f"{out}: finished already\n{json.dumps(result)}")
        return result
    if cfg.resume:
        check_inputs(about, cfg)
    columns = ["query_token", "facts"] if has_column(cfg.data_dir, "sft_train", "facts") else ["query_token"]
    table = open_table(cfg.data_dir, "sft_train", columns, cfg.rows)
    data = {column: table[column].to_pylist() for column in columns}

    load = partial(
        load_model, data_dir=cfg.data_dir, revision=cfg.revision, device=device, dtype=cfg.dtype
    )
    model = frozen(load(cfg.model))
    scorer = (model, "embed_out")
    if cfg.scorer == "rm" and cfg.select != "own":
        scorer = (frozen(load(cfg.reward_model, head="score")), "score")
    tokenizer = load_tokenizer(cfg.model, cfg.revision)
    check_tables(cfg.data_dir, [model, scorer[0]], ("sft_train", cfg.rows, R))
    enter(cfg, about, inputs_of(cfg))
    parts = [part for _, part in read_objects(sampled)]
    on_first(lambda: write_file(sampled, "".join(json.dumps(part) + "\n" for part in parts)))

    # every generation call has random numbers of its own: what was sampled before does not matter
    starts = range(0, len(data["query_token"]), cfg.rollout_prompts)
    bar = tqdm(starts[len(parts) :], initial=len(parts), total=len(starts), desc=str(out), mininterval=5)
    for start in bar:
        rows = range(start, min(start + cfg.rollout_prompts, len(data["query_token"])))
        prompts = [data["query_token"][i] for i in rows]
        seed = cfg.seed * 1_000_003 + start
        responses, ended = generate_all(
            model, prompts, cfg.k, R, batch=cfg.rollout_prompts, temperature=cfg.temperature, top_p=cfg.top_p,
            generator=torch.Generator(device).manual_seed(seed),
        )
        if cfg.scorer == "gold" and cfg.select != "own":
            facts = [data["facts"][i] for i in rows for _ in range(cfg.k)]
            truth = true_reward(facts, texts_of(tokenizer, responses), ended.flatten().tolist())
            scores = torch.tensor(truth).view(ended.shape)  # (n, K)
        else:
            scores = scores_of(*scorer, prompts, responses, cfg)
        scores = scores.masked_fill(~ended, -torch.inf)
        coins = torch.Generator().manual_seed(seed)
        part = {"sft": [], "pairs": [], "counts": Counter()}
        for row, own, group in zip(rows, scores, responses):
            pairs, kept, counted = select(cfg, own, group, coins)
            part["pairs"] += [[row, group[chosen], group[rejected]] for chosen, rejected in pairs]
            part["sft"] += [[row, None if i is None else group[i]] for i in kept]
            part["counts"][counted] += 1
        parts.append(part)
        if FIRST:
            with open(sampled, "a") as file:
                file.write(json.dumps(part) + "\n")
    result = on_first(lambda: write_data(cfg, meta, parts, tokenizer, out))
    sampled.unlink(missing_ok=True)
    forget_replaced(out)
    unlock(out)
    print(json.dumps(result))
    return result


def write_data(cfg: Config, meta: dict, parts: list[dict], tokenizer: Tokenizer, out: Path) -> dict:
    """The prepared data of these samples, and result.json, which it returns."""
    counts = sum((Counter(part["counts"]) for part in parts), Counter())
    aside = data_aside(out)
    written = write_tables(cfg, parts, tokenizer, aside)
    settings = {key: value for key, value in asdict(cfg).items() if key not in MAY_CHANGE}
    result = {"prompts": counts, "rows": written, "settings": settings, "out_dir": str(out)}
    splits = {**meta.get("splits", {}), **written}
    about = {**meta, "splits": splits, "sampled": result}
    (aside / "meta.json").write_text(json.dumps(about, indent=2) + "\n")
    move_data_in(out)
    write_file(out / "result.json", json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    command_line(main, Config)
