"""Packed groups against one row per completion in transformers: log-probs, rewards, gradients; and that
packing leaves no trace in the numbers."""

import pytest
import torch
from util import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    WIDE,
    error,
    logprobs_of,
    packed_logprobs,
    pair,
    random_groups,
    raw_config,
    worst_gradient,
)

import rlhf.groups
from rlhf.config import UserError
from rlhf.groups import block_mask, group_attention, micro_batches, pack

# K lengths for each of N prompts
SHAPES = {
    "K=1": [[4], [1], [9]], "K=2": [[5, 3], [1, 7], [2, 2]],
    "K=4": [[3, 1, 6, 2], [5, 5, 5, 5], [1, 1, 1, 8]], "one group": [[2, 4, 3]],
    "one token each": [[1, 1], [1, 1]],
}
VARIANTS = ["parallel residual", "all at once"]


def their_batch(prompts, responses, side: str):
    """One row per completion, padded on `side`, with attention mask and position ids; and where each prompt
    and each row ends."""
    rows = [prompt + answer for prompt, answers in zip(prompts, responses) for answer in answers]
    starts = [len(prompt) for prompt, answers in zip(prompts, responses) for _ in answers]
    longest = max(map(len, rows))
    shift = [longest - len(row) if side == "left" else 0 for row in rows]
    ids = torch.ones(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, shift[i] : shift[i] + len(row)] = torch.tensor(row)
        mask[i, shift[i] : shift[i] + len(row)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return inputs, [(s + start, s + len(row)) for s, start, row in zip(shift, starts, rows)]


def their_logprobs(theirs, prompts, responses, side="right"):
    """Log-prob of every response token (M,), in the order group, response, time."""
    inputs, spans = their_batch(prompts, responses, side)
    # [:, t] is of token t + 1
    logprobs = (
        theirs(**inputs).logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    )
    return torch.cat([logprobs[i, start - 1 : end - 1] for i, (start, end) in enumerate(spans)])


def scores_of(model, groups):
    return model.scores(model(groups.ids, groups.positions, groups.attend)[groups.last])  # (N, K)


@pytest.fixture(scope="module")
def models():
    return {(v, head): pair(raw_config(v), head) for v in VARIANTS for head in ("embed_out", "score")}


# --- against transformers


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_and_gradients(variant, shape, side, models):
    ours, theirs = models[variant, "embed_out"]
    ours.zero_grad(), theirs.zero_grad()
    prompts, responses = random_groups(SHAPES[shape])
    mine = packed_logprobs(ours, prompts, responses)
    expected = their_logprobs(theirs, prompts, responses, side)
    assert error(mine, expected) < TOLERANCE
    weight = torch.randn(len(expected))
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reward_scores_and_gradients(variant, shape, models):
    """At the last token of every response. transformers finds it as the last one that is not padding."""
    ours, theirs = models[variant, "score"]
    ours.zero_grad(), theirs.zero_grad()
    prompts, responses = random_groups(SHAPES[shape], ended=True)
    mine = scores_of(ours, pack(prompts, responses, max_positions=128)).flatten()
    expected = theirs(**their_batch(prompts, responses, "right")[0]).logits[:, 0]
    assert error(mine, expected) < TOLERANCE
    weight = torch.randn(len(expected))
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    assert worst_gradient(ours, theirs) < GRADIENT_TOLERANCE


# --- twins that must fail


def neighbours_visible(P, lengths, dtype):
    """Every response sees those before it in the row."""
    total = sum(lengths)
    may = torch.cat([torch.ones(total, P), torch.ones(total, total).tril()], dim=1).bool()
    return torch.zeros(may.shape, dtype=dtype).masked_fill(~may, float("-inf"))


def test_the_comparison_sees_a_response_that_sees_its_neighbour(models, monkeypatch):
    ours, theirs = models["parallel residual", "embed_out"]
    prompts, responses = random_groups(SHAPES["K=2"])
    monkeypatch.setattr(rlhf.groups, "response_bias", neighbours_visible)
    with torch.no_grad():
        assert (
            error(packed_logprobs(ours, prompts, responses), their_logprobs(theirs, prompts, responses))
            > WIDE
        )


@pytest.mark.parametrize("field", ["predicts", "last"])
@pytest.mark.parametrize("by", [-1, 1])
def test_the_comparison_sees_an_index_off_by_one(field, by, models):
    prompts, responses = random_groups(SHAPES["K=2"])
    groups = pack(prompts, responses, max_positions=128, multiple=40)
    setattr(groups, field, getattr(groups, field) + by)
    with torch.no_grad():
        if field == "predicts":
            ours, theirs = models["parallel residual", "embed_out"]
            assert error(logprobs_of(ours, groups), their_logprobs(theirs, prompts, responses)) > WIDE
        else:
            ours, theirs = models["parallel residual", "score"]
            expected = theirs(**their_batch(prompts, responses, "right")[0]).logits[:, 0]
            assert error(scores_of(ours, groups).flatten(), expected) > WIDE


def test_the_comparison_sees_positions_that_go_on_after_the_first_response(models):
    ours, theirs = models["parallel residual", "embed_out"]
    prompts, responses = random_groups(SHAPES["K=2"])
    groups = pack(prompts, responses, max_positions=128)
    groups.positions = torch.cat([torch.arange(P + sum(lengths)) for _, P, lengths in groups.segments])
    with torch.no_grad():
        assert error(logprobs_of(ours, groups), their_logprobs(theirs, prompts, responses)) > WIDE


# --- packing leaves no trace


def run_in_slices(model, prompts, responses, slices, **options):
    """Log-probs and summed gradients, the groups taken a slice at a time."""
    model.zero_grad()
    parts = [packed_logprobs(model, prompts[s], responses[s], **options) for s in slices]
    for part in parts:
        part.sum().backward()
    return torch.cat(parts).detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "options, tokens",
    [({"multiple": 64}, 10**6), ({"multiple": 7}, 10**6), ({}, 1), ({}, 30), ({"multiple": 16}, 30)],
)
@pytest.mark.parametrize("shape", ["K=1", "K=4"])
def test_padding_and_micro_batches_change_nothing(shape, options, tokens, models):
    ours, _ = models["parallel residual", "embed_out"]
    prompts, responses = random_groups(SHAPES[shape])
    expected, gradients = run_in_slices(ours, prompts, responses, [slice(None)], multiple=1)
    actual, others = run_in_slices(
        ours, prompts, responses, micro_batches(prompts, responses, tokens), **options
    )
    assert error(actual, expected) < TOLERANCE
    assert max(error(a, b) for a, b in zip(others, gradients)) < GRADIENT_TOLERANCE


def test_one_by_one(models):
    """K responses in one group, or K groups of one response each."""
    ours, _ = models["parallel residual", "embed_out"]
    prompts, responses = random_groups(SHAPES["K=4"])
    with torch.no_grad():
        alone = [
            packed_logprobs(ours, [p], [[answer]])
            for p, answers in zip(prompts, responses)
            for answer in answers
        ]
        assert error(torch.cat(alone), packed_logprobs(ours, prompts, responses)) < TOLERANCE


def test_an_empty_response_is_skipped(models):
    """It has no log-probs; a reward model reads the prompt's last token."""
    prompts, responses = random_groups(SHAPES["K=2"])
    with_empty = [[answers[0], [], answers[1]] for answers in responses]
    groups = pack(prompts, with_empty, max_positions=128)
    with torch.no_grad():
        ours, _ = models["parallel residual", "embed_out"]
        assert error(logprobs_of(ours, groups), packed_logprobs(ours, prompts, responses)) < TOLERANCE
    assert groups.ids[groups.last[:, 1]].tolist() == [p[-1] for p in prompts]
    assert not groups.response_mask[:, 1].any()


# --- the layout, by hand


def test_layout_by_hand():
    groups = pack([[10, 11, 12], [20]], [[[13, 14], [15]], [[21], [22, 23]]], max_positions=5, multiple=4)
    assert groups.ids.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 1, 1]
    assert groups.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 0, 1]
    assert groups.predicts.tolist() == [2, 3, 2, 6, 6, 8]
    assert groups.targets.tolist() == [13, 14, 15, 21, 22, 23]
    assert groups.last.tolist() == [[4, 5], [7, 9]]
    assert groups.response_mask.tolist() == [[[True, True], [True, False]], [[True, False], [True, True]]]


def test_unpack():
    groups = pack([[10], [20]], [[[1, 2], [3]], [[4], [5, 6]]], max_positions=3)
    flat = torch.tensor([1.0, 2, 3, 4, 5, 6], requires_grad=True)
    assert groups.unpack(flat).tolist() == [[[1, 2], [3, 0]], [[4, 0], [5, 6]]]
    (groups.unpack(flat) * torch.arange(8.0).view(2, 2, 2)).sum().backward()
    assert flat.grad.tolist() == [0, 1, 2, 4, 6, 7]


def test_max_response_widens_the_mask():
    groups = pack([[10], [20]], [[[1, 2], [3]], [[4], [5, 6]]], max_positions=3, max_response=5)
    assert groups.response_mask.shape == (2, 2, 5) and groups.response_mask.sum(-1).tolist() == [
        [2, 1],
        [1, 2],
    ]
    assert groups.unpack(torch.arange(6.0)).flatten(1).tolist() == [
        [0, 1, 0, 0, 0, 2, 0, 0, 0, 0],
        [3, 0, 0, 0, 0, 4, 5, 0, 0, 0],
    ]
    # a longer response is not cut: unpack would shift the rest
    short = pack([[10]], [[[1, 2], [3]]], max_positions=3, max_response=1)
    assert short.unpack(torch.tensor([1.0, 2, 3])).tolist() == [[[1, 2], [3, 0]]]


@pytest.mark.parametrize(
    "prompts, responses, named",
    [
        ([[5], []], [[[1]], [[1]]], "a prompt has no tokens"),
        ([[5], [5]], [[[1], [2]], [[1]]], "a prompt has 1 responses where the first has 2"),
        (
            [[5] * 7],
            [[[1], [2] * 4]],
            r"prompt \(7 tokens\) and response \(4\) are longer than the model's context \(10\)",
        ),
    ],
)
def test_refused_groups(prompts, responses, named):
    with pytest.raises(UserError, match=named):
        pack(prompts, responses, max_positions=10)


def test_the_longest_sequence_that_fits():
    assert len(pack([[5] * 7], [[[1], [2] * 3]], max_positions=10).ids) == 11


# --- the path of CUDA, on the CPU


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("shape", [*SHAPES, "prompts only"])
def test_flex_attention_is_the_same(shape, multiple):
    """On CUDA padding is in no segment; "prompts only" is what generation prefills."""
    prompts, responses = random_groups(SHAPES.get(shape, [[], [], []]))
    groups = pack(prompts, responses, max_positions=128, multiple=multiple)
    T, real = len(groups.ids), sum(P + sum(lengths) for _, P, lengths in groups.segments[: len(prompts)])
    q, k, v = torch.randn(3, T, 3, 16)
    expected = group_attention(q, k, v, groups.segments, groups.response_biases(q.dtype))
    assert torch.equal(groups.attend(0, q, k, v), expected)
    groups.segments = groups.segments[: len(prompts)]
    with torch.no_grad():
        actual = groups.flex_attend(q, k, v)
    assert error(actual[:real], expected[:real]) < TOLERANCE and actual.isfinite().all()


@pytest.mark.parametrize("K", [0, 1, 3])
def test_blocks_of_the_mask_are_what_its_rule_says(K):
    """Every pair of tokens that may look is in a listed block, and a block that is listed as full has no pair
    that may not."""
    seen = 0  # full blocks
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        segments, start = [], 0
        for _ in range(5):
            P, *lengths = (
                torch.randint(1, most, (1,), generator=generator).item() for most in (900, *[90] * K)
            )
            segments.append((start, P, lengths))
            start += P + sum(lengths)
        T = start + -start % 128 + 128 * (seed % 2)  # up to a whole block of padding
        mask = block_mask(segments, T, torch.device("cpu"))
        may = mask.mask_mod(0, 0, torch.arange(T)[:, None], torch.arange(T))  # (T, T)
        some = torch.zeros(T // 128, T // 128, dtype=torch.bool)
        full = torch.zeros(T // 128, T // 128, dtype=torch.bool)
        for blocks, count, index in (
            (some, mask.kv_num_blocks, mask.kv_indices),
            (full, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            for row, (n, columns) in enumerate(zip(count[0, 0].tolist(), index[0, 0].tolist())):
                blocks[row, columns[:n]] = True
        pairs = may.view(T // 128, 128, T // 128, 128).transpose(1, 2)  # (B, B, 128, 128)
        assert not (some & full).any() and torch.equal(some | full, pairs.flatten(2).any(-1))
        assert pairs[full].all()
        seen += full.sum().item()
    assert seen > 5


def test_block_mask_by_hand():
    """Groups [p p a a b] and [p a], and one token of padding: who sees whom."""
    mask = block_mask([(0, 2, [2, 1]), (5, 1, [1])], 8, torch.device("cpu")).mask_mod
    seen = [[j for j in range(8) if mask(0, 0, torch.tensor(i), torch.tensor(j))] for i in range(8)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6], [7]]


# --- micro-batches


@pytest.mark.parametrize("budget", [1, 20, 37, 60, 10**6])
def test_micro_batches_cover_every_group_once_under_the_budget(budget):
    prompts, responses = random_groups([[n % 5 + 1, 3] for n in range(23)])
    sizes = [len(p) + sum(map(len, answers)) for p, answers in zip(prompts, responses)]
    slices = list(micro_batches(prompts, responses, budget))
    assert [n for s in slices for n in range(23)[s]] == list(range(23))
    for s in slices:
        assert sum(sizes[s]) <= budget or s.stop - s.start == 1
    for a, b in zip(slices, slices[1:]):  # no slice could have taken one more
        assert sum(sizes[a]) + sizes[b.start] > budget
    assert list(micro_batches([], [], budget)) == []
