"""Groups -> numbers per token or per response: the only place where a model reads a packed row, and its head.

A precision (autocast) or a sharded head has to be known here and in `generate.py`, and nowhere else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.groups import Groups
from rlhf.logprobs import compare_logprobs, head_nll, token_logprobs
from rlhf.model import NeoX


@dataclass
class TokenStats:
    """What is known of each response token, (N, K, R) each, in nats; 0 where response_mask is False.

    logprobs      log-prob of the token under the model, differentiable
    entropy       of the model's whole next-token distribution, differentiable
    ref_logprobs  log-prob of the token under the reference; None without a reference
    kl            KL(model || reference) of the whole next-token distributions; None without a reference
    mean_logits   mean over the vocabulary of the model's logits; None if not asked for
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None
    mean_logits: Tensor | None = None


def predicting(model: NeoX, groups: Groups) -> Tensor:
    """The hidden states that predict the response tokens, (M, C)."""
    return model(groups.ids, groups.positions, groups.attend)[groups.predicts]


def token_stats(
    model: NeoX, groups: Groups, temperature: float = 1.0, reference: NeoX | None = None, *,
    mean_logits: bool = False,
) -> TokenStats:
    """`TokenStats` of the response tokens of a packed row, at a sampling temperature.

    The reference may have another width than the model. The numbers of both come from one pass over the
    vocabulary, in chunks: no (tokens, V) matrix is held (see logprobs.py).
    """
    head, targets = model.embed_out.weight, groups.targets
    with model.autocast():
        if reference is None:
            hidden = predicting(model, groups)  # (M, C)
            columns = token_logprobs(hidden, head, targets, temperature)  # (M,) each
        else:
            with torch.no_grad():
                ref_hidden = predicting(reference, groups)  # (M, C')
            hidden = predicting(model, groups)
            ref_head = reference.embed_out.weight
            columns = compare_logprobs(hidden, head, ref_hidden, ref_head, targets, temperature)  # (M,) each
    stats = TokenStats(*map(groups.unpack, columns))
    if mean_logits:  # mean_v (h . w_v) = h . mean_v w_v
        stats.mean_logits = groups.unpack(hidden.detach().float() @ head.detach().mean(0))
    return stats


def summed_nll(model: NeoX, groups: Groups) -> Tensor:
    """-sum of the log-probs of all response tokens of a packed row, in nats: the loss of SFT before division.

    The same number as from `token_stats`, by three products with the head instead of four.
    """
    with model.autocast():
        return head_nll(predicting(model, groups), model.embed_out.weight, groups.targets)


def response_scores(reward_model: NeoX, groups: Groups) -> Tensor:
    """Rewards (N, K), read at the last token of each response, differentiable."""
    with reward_model.autocast():
        hidden = reward_model(groups.ids, groups.positions, groups.attend)  # (T, C)
    return reward_model.scores(hidden[groups.last])  # (N, K)
