"""What is logged of an update: its samples, rewards and passes. README, "Every metric of RLOO"."""

import torch
from torch import Tensor

from rlhf.masked import masked_mean, masked_sum
from rlhf.policy import k1, k3
from rlhf.rewards import ENTROPY_BONUS
from rlhf.summaries import mean

EQUAL = 1e-6  # gold rewards closer than this are equal: they are sums of tenths in floating point


def gold_agreement(scores: Tensor, gold: Tensor) -> float:  # (N, K), (N, K)
    """How often the scores order two responses of a prompt as gold does; nan where gold is equal for all."""
    i, j = torch.triu_indices(gold.shape[1], gold.shape[1], offset=1)
    by_gold, by_scores = (gold[:, i] - gold[:, j]), (scores[:, i] - scores[:, j])  # (N, pairs)
    same = (by_gold * by_scores > 0)[by_gold.abs() > EQUAL]
    return same.double().mean().item()


def sample_metrics(batch: dict[str, Tensor]) -> dict[str, float]:
    """What every script logs of its samples, (N, K, R) or (N, K) each.

    kl, kl_k3 and kl_full are KLs of the policy where the sampler is the policy, else means over the samples.
    """
    mask, logprobs, ref_logprobs = batch["mask"], batch["old_logprobs"], batch["ref_logprobs"]
    known = [name for name in ("raw_scores", "rm_std", "gold") if name in batch]
    agree = "gold" in batch and batch["gold"].shape[1] > 1  # there are pairs to order
    return {
        "scores": batch["scores"].mean().item(),
        "scores_std": batch["scores"].std().item(),
        **{name: batch[name].double().mean().item() for name in known},
        **({"gold_agreement": gold_agreement(batch["scores"], batch["gold"])} if agree else {}),
        "kl": masked_sum(k1(logprobs, ref_logprobs), mask).mean().item(),
        "kl_k3": masked_sum(k3(logprobs, ref_logprobs), mask).mean().item(),
        "kl_full": masked_sum(batch["kl_full"], mask).mean().item(),
        "entropy": masked_mean(batch["entropy"].flatten(), mask.flatten()).item(),
        "surprisal": -masked_mean(logprobs.flatten(), mask.flatten()).item(),
        "length_normalized_surprisal": -masked_mean(logprobs, mask).mean().item(),
        "response_length": mask.sum(-1).double().mean().item(),
        "eos_share": batch["ended"].double().mean().item(),
    }


def reward_metrics(batch: dict[str, Tensor], coefficients: dict[str, float]) -> dict[str, float]:
    """What is logged of the rewards of a rollout, (N, K) each."""
    terms = {name: batch[name].mean().item() for name in coefficients if name != "score"}
    human = batch.get("reference_scores", torch.zeros(0))  # (N, 0 or 1)
    over = {"scores_over_reference": (batch["scores"].mean() - human.mean()).item()}
    return {
        **(over if human.numel() else {}),
        "rlhf_reward": batch["rewards"].mean().item(),
        "group_std": batch["rewards"].std(1).mean().item(),
        **{f"bonus/{name}": value for name, value in terms.items()},
        **{f"reward/{name}": coefficients[name] * value for name, value in terms.items()},
        **{f"coefficient/{name}": coefficients[name] for name in ENTROPY_BONUS if name in terms},
    }


def sequence_means(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all sequences of a pass, from its micro-batches."""
    return {key: torch.cat([part[key] for part in parts]).double().mean().item() for key in parts[0]}


def update_metrics(passes: list[dict[str, float]]) -> dict[str, float]:
    """What is logged of the passes of one update: means over them."""
    average = {key: mean([p[key] for p in passes]) for key in passes[0]}
    return {
        "kl_prev/approxkl_avg": average["approxkl"],
        "kl_prev/approxkl_last": passes[-1]["approxkl"],
        "ratio_var": average["ratio_square"] - average["ratio"] ** 2,
        **{key: average[key] for key in ("loss", "clipfrac", "ratio", "grad_norm")},
    }
