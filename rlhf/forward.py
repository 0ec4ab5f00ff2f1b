"""Groups -> numbers per token or per response: the only place where a model reads a packed row, and its head.

A precision (autocast) or a sharded head has to be known here and in `generate.py`, and nowhere else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.groups import Groups
from rlhf.logprobs import compare_logprobs, head_nll, token_logprobs, top_logprobs
from rlhf.model import PAD, NeoX


@dataclass
class TokenStats:
    """What is known of each response token, (N, K, R) each, in nats; 0 where response_mask is False.

    logprobs      log-prob of the token under the model, differentiable
    entropy       of the model's whole next-token distribution, differentiable
    ref_logprobs  log-prob of the token under the reference; None without a reference
    kl            KL(model || reference) of the whole next-token distributions; None without a reference
    mean_logits   mean over the vocabulary of the model's logits; None if not asked for
    top_logprobs  (N, K, R, k) log-probs of the model's k best tokens, differentiable; None if not asked for
    top_is_token  (N, K, R, k) which of these is the response's own token
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None
    mean_logits: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_is_token: Tensor | None = None


def known(ids: Tensor, rows: int) -> Tensor:
    """Ids as another model reads what the policy sampled: padding for those beyond its `rows`.
    Pythia's vocabularies are padded from 50277 tokens to 50304 or 50432, depending on the size."""
    return torch.where(ids < rows, ids, PAD)


def predicting(model: NeoX, groups: Groups, ids: Tensor) -> Tensor:
    """The hidden states that predict the response tokens, (M, C); ids (T,) as the model reads them."""
    return model(ids, groups.positions, groups.attend)[groups.predicts]


def token_stats(
    model: NeoX, groups: Groups, temperature: float = 1.0, reference: NeoX | None = None, *,
    mean_logits: bool = False, top_k: int = 0,
) -> TokenStats:
    """`TokenStats` of the response tokens of a packed row, at a sampling temperature.

    With top_k, those of the best tokens too, and none of the reference.
    The reference may have another width than the model. The numbers of both come from one pass over the
    vocabulary, in chunks: no (tokens, V) matrix is held (see logprobs.py). A reference with another padded
    vocabulary takes three: log-probs and entropy are of each model's own whole distribution, the one that the
    policy samples from, and `kl` compares the columns that both have.
    """
    targets = groups.targets
    top = None
    with model.autocast():
        if reference is not None and not top_k:
            with torch.no_grad():
                ref_ids = known(groups.ids, reference.config.vocab_size)
                ref_hidden = predicting(reference, groups, ref_ids)  # (M, C')
        hidden = predicting(model, groups, groups.ids)  # (M, C)
        head = model.embed_out.weight  # a sharded one is whole from the forward to the backward
        if top_k:
            columns = top_logprobs(hidden, head, targets, top_k, temperature)  # (M,) twice, (M, k) twice
            *columns, best, top = columns
        elif reference is None:
            columns = token_logprobs(hidden, head, targets, temperature)  # (M,) each
        else:
            ref_head = reference.embed_out.weight
            compare = compare_logprobs if len(head) == len(ref_head) else compare_common
            columns = compare(hidden, head, ref_hidden, ref_head, targets, temperature)  # (M,) each
    stats = TokenStats(*map(groups.unpack, columns))
    if top is not None:
        own = top == targets[:, None]  # (M, k)
        stats.top_logprobs = torch.stack([groups.unpack(column) for column in best.unbind(1)], -1)
        stats.top_is_token = torch.stack([groups.unpack(column) for column in own.unbind(1)], -1)
    if mean_logits:  # mean_v (h . w_v) = h . mean_v w_v
        mean_head = head.detach().mean(0, dtype=torch.float32)  # (C,)
        stats.mean_logits = groups.unpack(hidden.detach().float() @ mean_head)
    return stats


def compare_common(
    hidden: Tensor, head: Tensor, ref_hidden: Tensor, ref_head: Tensor, targets: Tensor, temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compare_logprobs` of two heads with different numbers of rows, (V, C) and (V', C'). A target that the
    reference has no row for counts as padding there."""
    common = min(len(head), len(ref_head))
    targets_there = known(targets, len(ref_head))
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature)[:2]
    with torch.no_grad():
        ref_logprobs = token_logprobs(ref_hidden, ref_head, targets_there, temperature)[0]
        *_, kl = compare_logprobs(
            hidden, head[:common], ref_hidden, ref_head[:common], known(targets, common), temperature
        )
    return logprobs, entropy, ref_logprobs, kl


def summed_nll(model: NeoX, groups: Groups) -> Tensor:
    """-sum of the log-probs of all response tokens of a packed row, in nats: the loss of SFT before division.

    The same number as from `token_stats`, by three products with the head instead of four.
    """
    with model.autocast():
        return head_nll(predicting(model, groups, groups.ids), model.embed_out.weight, groups.targets)


def response_scores(reward_model: NeoX, groups: Groups) -> Tensor:
    """Rewards (N, K), read at the last token of each response, differentiable."""
    with reward_model.autocast():
        ids = known(groups.ids, reward_model.config.vocab_size)
        hidden = reward_model(ids, groups.positions, groups.attend)  # (T, C)
    return reward_model.scores(hidden[groups.last])  # (N, K)


def token_values(critic: NeoX, groups: Groups) -> Tensor:
    """A critic's value of the state before each response token, (N, K, R), differentiable; 0 in the
    padding."""
    with critic.autocast():
        hidden = predicting(critic, groups, known(groups.ids, critic.config.vocab_size))  # (M, C)
    return groups.unpack(critic.scores(hidden))  # (N, K, R)
