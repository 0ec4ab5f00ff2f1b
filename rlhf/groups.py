"""One prompt and K responses to it: how N such groups become one row of tokens.

    row:        [ p p p p p p | a a a a | b b b | c c c c c | next group ... ]
    positions:  [ 0 1 2 3 4 5 | 6 7 8 9 | 6 7 8 | 6 7 8 9 10 | 0 1 ... ]
    may attend: to earlier tokens of the prompt and of the same response; never to another response or group
    predicts:   the LAST PROMPT TOKEN predicts the first token of every response

A prompt is computed once, forward and backward, and shared by its K responses; nothing is padded but the end of the row, to a round length; the vocabulary
head sees only the positions that predict a response token. The prefix sharing for pairs is that of arXiv 2410.20305; here it serves every stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import UserError
from rlhf.matmul import ROWS
from rlhf.model import PAD

FLEX_BLOCK = 128  # tokens in a block of flex_attention


@dataclass
class Groups:
    """N prompts, K responses each, as one row of T tokens with M = number of response tokens.

    ids, positions  (T,)       the row
    predicts        (M,)       index into the row: the position whose hidden state predicts targets[m]
    targets         (M,)       the response tokens, in the order group, response, time
    last            (N, K)     index into the row of the last token of each response (where a reward model is read)
    response_mask   (N, K, R)  True on response tokens including the first EOS; R = longest response here
    slots           (M,)       where the response tokens are in a flat (N, K, R)
    segments                   per group: (where it starts in the row, prompt length, response lengths); on the CPU also of the padding, without responses
    """

    ids: Tensor
    positions: Tensor
    predicts: Tensor
    targets: Tensor
    last: Tensor
    response_mask: Tensor
    slots: Tensor
    segments: list[tuple[int, int, list[int]]]

    def unpack(self, flat: Tensor) -> Tensor:
        """Per-token values (M,) -> (N, K, R), differentiable. Where response_mask is False the result holds 0 and must not be read."""
        return flat.new_zeros(self.response_mask.numel()).scatter(0, self.slots, flat).view(self.response_mask.shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the row, (T, H, D) each. See `group_attention`; on CUDA one flex_attention over the whole row."""
        if q.is_cuda:
            return self.flex_attend(q, k, v)
        return group_attention(q, k, v, self.segments, self.response_biases(q.dtype))

    def response_biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Per group the additive mask of its responses (K R, P + K R), or None where one causal mask does it (K = 1). Built once per row."""
        if getattr(self, "_biases", None) is None or self._biases[0] is not dtype:
            self._biases = (dtype, [response_bias(P, lengths, dtype) if len(lengths) > 1 else None for _, P, lengths in self.segments])
        return self._biases[1]

    def flex_attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if getattr(self, "_block_mask", None) is None:
            self._block_mask = block_mask(self.segments, len(self.ids), q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, D)
        return flex(q, k, v, self._block_mask)[0].transpose(0, 1)  # (T, H, D)


def response_bias(P: int, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """0 where a response token may look, -inf where not: (sum R, P + sum R)."""
    own = torch.block_diag(*[torch.ones(R, R).tril() for R in lengths]).bool()  # (sum R, sum R)
    may = torch.cat([torch.ones(len(own), P, dtype=torch.bool), own], dim=1)
    return torch.zeros(may.shape, dtype=dtype).masked_fill(~may, float("-inf"))


def group_attention(q: Tensor, k: Tensor, v: Tensor, segments: list, biases: list[Tensor | None]) -> Tensor:
    """Attention inside each group: the prompt over itself (causal), the responses over the prompt and over themselves.

    Two calls per group instead of one dense mask over the row: no (T, T) scores, and the prompt's half above the diagonal is skipped too.
    """
    out = []
    # split, not slices: the gradient of a slice is a zero tensor as long as the row, once per group
    parts = zip(*[x.split([P + sum(lengths) for _, P, lengths in segments]) for x in (q, k, v)])
    for group, (_, P, _), bias in zip(parts, segments, biases):
        q, k, v = (x.transpose(0, 1)[None] for x in group)  # (1, H, P + sum R, D)
        if bias is None:
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))  # (P + R, H, D)
        else:
            prompt = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
            responses = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=bias)
            out += [prompt[0].transpose(0, 1), responses[0].transpose(0, 1)]  # (P, H, D), (sum R, H, D)
    return torch.cat(out)  # (T, H, D)


def block_mask(segments: list, T: int, device: torch.device):
    """The same rule for flex_attention: (group, response) of each token decides; response 0 is the prompt. Padding after the groups sees padding only.

    Which blocks are empty or full follows from the layout. torch's create_block_mask would ask every pair of tokens, in (T, T) tensors: 50 GB for a prefill
    of 256 long prompts.
    """
    from torch.nn.attention.flex_attention import BlockMask
    group = torch.full((T + -T % FLEX_BLOCK,), len(segments), dtype=torch.int32)  # never falls along the row; padding is a group of its own, the last
    response = torch.zeros_like(group)
    for n, (start, P, lengths) in enumerate(segments):
        group[start : start + P + sum(lengths)] = n
        marks = torch.repeat_interleave(torch.arange(1, len(lengths) + 1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.long))
        response[start + P : start + P + sum(lengths)] = marks
    group, response = group.to(device), response.to(device)

    def may_attend(b, h, i, j):
        return (i >= j) & (group[i] == group[j]) & ((response[j] == 0) | (response[i] == response[j]))

    first, last = (group.view(-1, FLEX_BLOCK)[:, i] for i in (0, -1))  # (B,): the first and the last group of a block
    only_prompt = (response.view(-1, FLEX_BLOCK) == 0).all(1)
    at = torch.arange(len(first), device=device)
    some = (at[:, None] >= at) & (last >= first[:, None])  # (B queries, B keys): a group in common, and not in the future
    full = some & (at[:, None] > at) & (first == last[:, None]) & only_prompt  # nothing but earlier prompt tokens of the queries' one group
    lists = []
    for blocks in (some & ~full, full):
        lists += [blocks.sum(-1, dtype=torch.int32)[None, None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=may_attend, seq_lengths=(T, T))


def flex(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    global _flex
    if _flex is None:  # compiled on first use: uncompiled flex_attention materialises the scores
        from torch.nn.attention.flex_attention import flex_attention
        _flex = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    return _flex(q, k, v, block_mask=mask)


_flex = None


def pack(prompts: list[list[int]], responses: list[list[list[int]]], *, max_positions: int, device: torch.device | str = "cpu",
         multiple: int | None = None, max_response: int | None = None) -> Groups:
    """N prompts and, for each, K responses (token ids; a response ends with its EOS if it has one) -> `Groups` on `device`.

    multiple      fill the row with padding up to a multiple of this many tokens (default: FLEX_BLOCK on CUDA; on the CPU ROWS, beyond ROWS tokens)
    max_response  R of the response mask, if no response here is longer (default: the longest response here)
    Raises UserError for an empty prompt, for unequal K and for a sequence longer than `max_positions`.
    """
    K = len(responses[0])
    ids, positions, predicts, targets, last, segments, lengths_all = [], [], [], [], [], [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        P, start = len(prompt), len(ids)
        if P == 0:
            raise UserError("a prompt has no tokens: nothing could predict the first token of its response")
        if len(answers) != K:
            raise UserError(f"a prompt has {len(answers)} responses where the first has {K}: every prompt of a batch needs the same number")
        if P + max((len(a) for a in answers), default=0) > max_positions:
            raise UserError(f"prompt ({P} tokens) and response ({max(map(len, answers), default=0)}) are longer than the model's context ({max_positions})")
        ids += prompt
        positions += range(P)
        for answer in answers:
            first = len(ids)
            if answer:
                predicts += [start + P - 1, *range(first, first + len(answer) - 1)]
            ids += answer
            positions += range(P, P + len(answer))
            targets += answer
            last.append(len(ids) - 1 if answer else start + P - 1)
        segments.append((start, P, [len(a) for a in answers]))
        lengths_all.append([len(a) for a in answers])
    device = torch.device(device)
    padding = -len(ids) % (multiple or (FLEX_BLOCK if device.type == "cuda" else ROWS if len(ids) > ROWS else 1))
    if padding and device.type != "cuda":
        segments.append((len(ids), padding, []))
    lengths = torch.tensor(lengths_all).view(len(prompts), K)  # (N, K)
    R = max(max_response or 0, int(lengths.max()) if lengths.numel() else 0)
    mask = torch.arange(R) < lengths[..., None]  # (N, K, R)
    tensors = [torch.tensor(ids + [PAD] * padding), torch.tensor(positions + list(range(padding))), torch.tensor(predicts, dtype=torch.long),
               torch.tensor(targets, dtype=torch.long), torch.tensor(last, dtype=torch.long).view(len(prompts), K), mask, mask.flatten().nonzero()[:, 0]]
    return Groups(*[t.to(device, non_blocking=True) for t in tensors], segments)


def micro_batches(prompts: list[list[int]], responses: list[list[list[int]]], max_tokens: int) -> Iterator[slice]:
    """Slices of consecutive groups whose tokens, prompt once and all responses, stay under `max_tokens` (a longer group goes alone)."""
    start, tokens = 0, 0
    for n, (prompt, answers) in enumerate(zip(prompts, responses)):
        size = len(prompt) + sum(map(len, answers))
        if n > start and tokens + size > max_tokens:
            yield slice(start, n)
            start, tokens = n, 0
        tokens += size
    if start < len(prompts):
        yield slice(start, len(prompts))
