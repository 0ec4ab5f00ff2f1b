"""One prompt and K responses to it: how N such groups become one row of tokens.

    row:        [ p p p p p p | a a a a | b b b | c c c c c | next group ... ]
    positions:  [ 0 1 2 3 4 5 | 6 7 8 9 | 6 7 8 | 6 7 8 9 10 | 0 1 ... ]
    may attend: to earlier tokens of the prompt and of the same response; never to another response or group
    predicts:   the LAST PROMPT TOKEN predicts the first token of every response

A prompt is computed once, forward and backward, and shared by its K responses; only the end of the row is
padded. Others share prompts too: dpo-prefix-sharing (arXiv 2410.20305) for pairs; PrefixGrouper (2506.05433),
Tree Training (2511.00413), Unsloth and verl for RL. Ours is one layout for every stage, in plain PyTorch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import UserError
from rlhf.fast import flex_options, paths
from rlhf.matmul import ROWS
from rlhf.model import PAD

FLEX_BLOCK = 128  # tokens in a block of flex_attention


@dataclass
class Groups:
    """N prompts, K responses each, as one row of T tokens with M = number of response tokens.

    ids, positions  (T,)       the row
    predicts        (M,)       index into the row: the position whose hidden state predicts targets[m]
    targets         (M,)       the response tokens, in the order group, response, time
    last            (N, K)     index into the row: the last token of each response (a reward model reads here)
    response_mask   (N, K, R)  True on response tokens including the first EOS; R = longest response here
    slots           (M,)       where the response tokens are in a flat (N, K, R)
    segments                   per group (start in the row, prompt length P, response lengths); the padding is
                               one more segment, without responses
    """

    ids: Tensor
    positions: Tensor
    predicts: Tensor
    targets: Tensor
    last: Tensor
    response_mask: Tensor
    slots: Tensor
    segments: list[tuple[int, int, list[int]]]
    # masks, made when first needed
    _biases: dict[torch.dtype, list[Tensor | None]] = field(default_factory=dict, init=False, repr=False)
    _block_mask: object = field(default=None, init=False, repr=False)

    def unpack(self, flat: Tensor) -> Tensor:
        """Per-token values (M,) -> (N, K, R), differentiable; 0 where response_mask is False."""
        out = flat.new_zeros(self.response_mask.numel())
        return out.scatter(0, self.slots, flat).view(self.response_mask.shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the row, (T, H, D) each; on CUDA one flex_attention, else `group_attention`."""
        if q.is_cuda and not paths.plain:
            return self.flex_attend(q, k, v)
        return group_attention(q, k, v, self.segments, self.response_biases(q.dtype))

    def response_biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Per group the `response_bias` of its responses, or None where one causal mask does it (K = 1)."""
        if dtype not in self._biases:
            self._biases[dtype] = [
                response_bias(P, lengths, dtype).to(self.ids.device) if len(lengths) > 1 else None
                for _, P, lengths in self.segments
            ]
        return self._biases[dtype]

    def flex_attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._block_mask is None:
            self._block_mask = block_mask(self.segments, len(self.ids), q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, D)
        options = flex_options(q.shape[2], q.shape[3])
        out = flex(q.is_cuda)(q, k, v, block_mask=self._block_mask, kernel_options=options)
        return out[0].transpose(0, 1)  # (T, H, D)


def response_bias(P: int, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """0 where a response token may look, -inf elsewhere: (S, P + S), S = all response tokens of the group."""
    own = torch.block_diag(*[torch.ones(R, R).tril() for R in lengths]).bool()  # (S, S)
    prompt = torch.ones(len(own), P, dtype=torch.bool)
    allowed = torch.cat([prompt, own], dim=1)  # (S, P + S)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf"))


def group_attention(q: Tensor, k: Tensor, v: Tensor, segments: list, biases: list[Tensor | None]) -> Tensor:
    """Attention inside each group, (T, H, D): the prompt over itself (causal), the responses over both.

    Two calls per group instead of one dense mask over the row: no (T, T) scores, and the half of the prompt's
    scores that lies above the diagonal is skipped too.
    """
    out = []
    sizes = [P + sum(lengths) for _, P, lengths in segments]
    # split, not slices: the gradient of a slice is a zero tensor as long as the row, once per group
    groups = zip(*[x.split(sizes) for x in (q, k, v)])
    for group, (_, P, _), bias in zip(groups, segments, biases):
        q, k, v = (x.transpose(0, 1)[None] for x in group)  # (1, H, P + S, D)
        if bias is None:
            both = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.append(both[0].transpose(0, 1))  # (P + S, H, D)
        else:
            prompt = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
            responses = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=bias)
            out.append(prompt[0].transpose(0, 1))  # (P, H, D)
            out.append(responses[0].transpose(0, 1))  # (S, H, D)
    return torch.cat(out)  # (T, H, D)


def block_mask(segments: list, T: int, device: torch.device):
    """The same rule as a BlockMask for flex_attention.

    Which blocks are empty or full follows from the layout. torch's create_block_mask would ask every pair of
    tokens, in (T, T) tensors: 50 GB for a prefill of 256 long prompts.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # of each token: its group, ascending along the row (padding is the last one)
    group = torch.full((T + -T % FLEX_BLOCK,), len(segments), dtype=torch.int32)
    response = torch.zeros_like(group)  # of each token: its response, from 1; 0 is the prompt
    for n, (start, P, lengths) in enumerate(segments):
        end = start + P + sum(lengths)
        group[start:end] = n
        numbers = torch.arange(1, len(lengths) + 1, dtype=torch.int32)
        response[start + P : end] = numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    group = group.to(device)
    response = response.to(device)

    def may_attend(b, h, i, j):
        return (i >= j) & (group[i] == group[j]) & ((response[j] == 0) | (response[i] == response[j]))

    blocks = group.view(-1, FLEX_BLOCK)  # (B, FLEX_BLOCK)
    first = blocks[:, 0]  # (B,) first group of each block
    last = blocks[:, -1]  # (B,) last group
    only_prompt = (response.view(-1, FLEX_BLOCK) == 0).all(1)  # (B,)
    index = torch.arange(len(blocks), device=device)
    past = index[:, None] > index  # (B queries, B keys)
    # visible: a group in common, and not in the future
    visible = (index[:, None] >= index) & (last >= first[:, None])
    # full: nothing but earlier prompt tokens of the one group that the queries belong to
    full = visible & past & (first == last[:, None]) & only_prompt
    return BlockMask.from_kv_blocks(
        *visible_blocks(visible & ~full), *visible_blocks(full),
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=may_attend, seq_lengths=(T, T),
    )


def visible_blocks(visible: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) bool -> per block of queries how many blocks of keys it sees, and their indices, those first."""
    counts = visible.sum(-1, dtype=torch.int32)
    order = visible.int().argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], order.int()[None, None]  # (1, 1, B), (1, 1, B, B)


@cache
def flex(compiled: bool):
    """flex_attention, compiled on CUDA: uncompiled it holds all the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def pack(
    prompts: list[list[int]], responses: list[list[list[int]]], *,
    max_positions: int, device: torch.device | str = "cpu",
    multiple: int | None = None, max_response: int | None = None,
) -> Groups:
    """N prompts and, for each, K responses (token ids) -> `Groups` on `device`.

    A response ends with its EOS if it has one.
    multiple      fill the row with padding up to a multiple of this many tokens
                  (default: FLEX_BLOCK on CUDA; on the CPU ROWS if there are more than ROWS tokens)
    max_response  R of the response mask, if no response here is longer (default: the longest one here)
    Raises UserError for an empty prompt, for unequal K and for a sequence longer than `max_positions`.
    """
    K = len(responses[0])
    device = torch.device(device)
    ids, positions, predicts, targets, last, segments = [], [], [], [], [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        check_group(prompt, answers, K, max_positions)
        P = len(prompt)
        prompt_start = len(ids)
        prompt_end = prompt_start + P - 1
        segments.append((prompt_start, P, [len(a) for a in answers]))
        ids += prompt
        positions += range(P)
        for answer in answers:
            start = len(ids)
            ids += answer
            positions += range(P, P + len(answer))
            targets += answer
            if answer:
                predicts += [prompt_end, *range(start, len(ids) - 1)]
            last.append(len(ids) - 1 if answer else prompt_end)
    lengths = torch.tensor([lengths for *_, lengths in segments]).view(len(prompts), K)  # (N, K)
    R = max(max_response or 0, int(lengths.max()) if lengths.numel() else 0)
    mask = torch.arange(R) < lengths[..., None]  # (N, K, R)
    if multiple is None:
        multiple = FLEX_BLOCK if device.type == "cuda" else ROWS if len(ids) > ROWS else 1
    padding = -len(ids) % multiple
    if padding:
        segments.append((len(ids), padding, []))

    def to_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)

    return Groups(
        ids=to_device(ids + [PAD] * padding),
        positions=to_device(positions + list(range(padding))),
        predicts=to_device(predicts),
        targets=to_device(targets),
        last=to_device(last).view(len(prompts), K),
        response_mask=mask.to(device, non_blocking=True),
        slots=mask.flatten().nonzero()[:, 0].to(device, non_blocking=True),
        segments=segments,
    )


def check_group(prompt: list[int], answers: list[list[int]], K: int, max_positions: int) -> None:
    """Raises the errors of `pack` for one group."""
    P = len(prompt)
    R = max(map(len, answers), default=0)
    if P == 0:
        raise UserError("a prompt has no tokens: nothing could predict the first token of its response")
    if len(answers) != K:
        raise UserError(f"a prompt has {len(answers)} responses where the first has {K}: "
                        "every prompt of a batch needs the same number")
    if P + R > max_positions:
        raise UserError(f"prompt ({P} tokens) and response ({R}) are longer than the model's context "
                        f"({max_positions})")


def micro_batches(
    prompts: list[list[int]], responses: list[list[list[int]]], max_tokens: int,
) -> Iterator[slice]:
    """Slices of consecutive groups, with at most `max_tokens` tokens each; a longer group goes alone."""
    start = 0
    tokens = 0
    for n, (prompt, answers) in enumerate(zip(prompts, responses)):
        size = len(prompt) + sum(map(len, answers))
        if n > start and tokens + size > max_tokens:
            yield slice(start, n)
            start = n
            tokens = 0
        tokens += size
    if start < len(prompts):
        yield slice(start, len(prompts))
