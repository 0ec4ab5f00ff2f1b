"""A language small enough to list: every response over a tiny vocabulary, and a policy that is one table of
logits per prefix."""

import torch
from torch import Tensor


class Responses:
    """All Y responses of at most `length` tokens over `vocab` tokens. Token 0 is EOS; a response stops at it
    or is cut at `length`.

    With stops=False no token ends a response, so all have the same length. The padding of the per-token
    log-probs holds garbage.
    """

    def __init__(self, vocab: int, length: int, stops: bool = True):
        self.vocab = vocab
        texts, open_ends = [], [()]
        for _ in range(length):
            grown = [prefix + (token,) for prefix in open_ends for token in range(vocab)]
            open_ends = [y for y in grown if not (stops and y[-1] == 0)]
            texts += [y for y in grown if stops and y[-1] == 0]
        texts += open_ends
        prefixes = sorted({y[:t] for y in texts for t in range(len(y))})
        self.count, self.prefixes = len(texts), len(prefixes)
        self.lengths = torch.tensor([len(y) for y in texts])
        self.mask = (torch.arange(length) < self.lengths[:, None])[None]  # (1, Y, R)
        self.ids = torch.tensor([y + (0,) * (length - len(y)) for y in texts])  # (Y, R)
        # (Y, R)
        self.prefix = torch.tensor(
            [[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(length)] for y in texts]
        )

    def logprobs(self, logits: Tensor) -> Tensor:
        """Logits (prefixes, V) -> per-token log-probs (1, Y, R) of every response."""
        picked = logits.log_softmax(-1)[self.prefix, self.ids]  # (Y, R)
        return torch.where(self.mask, picked[None], 7.0)

    def logits_of(self, probs: Tensor) -> Tensor:
        """Distribution over the responses (Y,) -> logits (prefixes, V) of the policy that has it: log of each
        next token's mass."""
        kept = self.mask[0]
        mass = torch.zeros(self.prefixes, self.vocab, dtype=probs.dtype)
        return mass.index_put(
            (self.prefix[kept], self.ids[kept]), probs[:, None].expand_as(kept)[kept], accumulate=True
        ).log()
