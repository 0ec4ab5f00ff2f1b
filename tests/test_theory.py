"""The theory of "Failure Modes of Maximum Entropy RLHF" (arXiv 2509.20265) as numbers, in float64, on a
language that can be listed.

15 responses of 1 to 3 tokens; the policy is any distribution over them, held as an autoregressive table of
logits. Wherever rlhf/ implements a formula the test uses it, so that a wrong formula there turns an equation
here red. What the paper does not say is at the end: what dividing the bonus by |y| does to the correspondence
between RLOO and SimPO.
"""

import itertools
import math

import pytest
import torch
from enumeration import Responses

from rlhf.losses import bradley_terry_loss, dpo, simpo, simpo_pl
from rlhf.masked import mean_logprobs, seq_logprobs
from rlhf.policy import leave_one_out
from rlhf.rewards import rlhf_reward

torch.set_num_threads(1)
ALPHA = 0.7
Y = Responses(vocab=3, length=3)  # 15 responses of 1 to 3 tokens
EVEN = Responses(vocab=2, length=3, stops=False)  # 8 responses of 3 tokens


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_of(responses):
    """True rewards r(x, y) of all responses, (Y,)."""
    return normal(responses.count, seed=0)


def random_logits(responses, seed):
    return normal(responses.prefixes, responses.vocab, seed=seed).requires_grad_()


def log_pi(responses, logprobs):
    """Per-token log-probs (1, Y, R) -> log pi(y) (Y,)."""
    return seq_logprobs(logprobs, responses.mask)[0]


def followed(responses, scores, *, ref_logprobs=None, **terms):
    """What RLOO follows in expectation, a function of log-probs: its gradient is sum_y grad pi(y) R(y), the
    bonus in R being constant. terms: {name of a reward term: its coefficient}."""
    def surrogate(logprobs):
        reference = torch.zeros_like(logprobs) if ref_logprobs is None else ref_logprobs
        rewards, _ = rlhf_reward(scores[None], logprobs, reference, responses.mask, {"score": 1.0, **terms})
        return (log_pi(responses, logprobs).exp() * rewards[0]).sum()
    return surrogate


def gradient(responses, objective, logits):
    return torch.autograd.grad(objective(responses.logprobs(logits)), logits)[0]


def ascend(responses, objective):
    """Gradient ascent with momentum from the uniform policy until the gradient is zero (1e-11) -> per-token
    log-probs (1, Y, R)."""
    logits = torch.zeros(responses.prefixes, responses.vocab, dtype=torch.float64)
    velocity = torch.zeros_like(logits)
    for _ in range(20000):
        step = gradient(responses, objective, logits.requires_grad_())
        if step.abs().max() < 1e-11:
            return responses.logprobs(logits.detach())
        velocity = 0.9 * velocity + 0.5 * step
        logits = logits.detach() + velocity
    raise AssertionError("the ascent did not converge")


def close(actual, expected, atol=1e-7):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def optimum(responses, scores, alpha=ALPHA):
    """Per-token log-probs (1, Y, R) of the policy of eq. 3, softmax(r / alpha)."""
    return responses.logprobs(responses.logits_of((scores / alpha).softmax(0)))


def pairs_of(responses):
    """All ordered pairs of different responses, (N, 2)."""
    return torch.tensor(list(itertools.permutations(range(responses.count), 2)))


# --- Section 2: the KL-constrained objective


def test_section_2_2_kl_constrained_optimum():
    """RLOO's KL reward leads to pi = pi_ref exp(r / beta) / Z, where r = beta log(pi / pi_ref) + beta log Z:
    DPO's implicit reward."""
    beta, scores = 1.2, scores_of(Y)
    ref = Y.logprobs(0.4 * random_logits(Y, 1).detach())
    found = ascend(Y, followed(Y, scores, kl=beta, ref_logprobs=ref))
    close(log_pi(Y, found), (log_pi(Y, ref) + scores / beta).log_softmax(0))
    pairs = pairs_of(Y)
    implicit = dpo(found[0][pairs], ref[0][pairs], Y.mask[0][pairs], beta=beta)[1]
    close(implicit[:, 0] - implicit[:, 1], scores[pairs[:, 0]] - scores[pairs[:, 1]])


# --- Section 3 and Appendix C


def test_eq_2_eq_6_detached_bonus_has_the_gradient_of_the_entropy_objective():
    """grad of E[r] + alpha H(pi) (eq. 2), entropy differentiated, equals what RLOO follows under eq. 6, bonus
    detached."""
    scores, logits = scores_of(Y), random_logits(Y, 2)

    def objective(logprobs):
        logp = log_pi(Y, logprobs)
        return (logp.exp() * (scores - ALPHA * logp)).sum()

    close(gradient(Y, followed(Y, scores, maxent=ALPHA), logits), gradient(Y, objective, logits), atol=1e-12)


def test_eq_3_eq_8_c_1_ascent_lands_on_softmax_and_eq_4_eq_10_gives_the_reward_back():
    """Gradient ascent under eq. 6 ends at pi(y) = exp(r / alpha) / Z, and no random policy has a larger E[r]
    + alpha H. There r = alpha log pi + alpha log Z for every response."""
    scores = scores_of(Y)
    found = log_pi(Y, ascend(Y, followed(Y, scores, maxent=ALPHA)))
    close(found, (scores / ALPHA).log_softmax(0))
    close(ALPHA * found + ALPHA * (scores / ALPHA).logsumexp(0), scores)
    others = (3 * normal(1000, Y.count, seed=3)).log_softmax(1)
    best, *values = ((logp.exp() * (scores - ALPHA * logp)).sum().item() for logp in (found, *others))
    # alpha log Z, C.1
    assert best == pytest.approx((ALPHA * (scores / ALPHA).logsumexp(0)).item()) and best > max(values)


def test_eq_5_eq_9_c_2_bradley_terry_from_the_policy():
    """p(y1 > y2) from the true reward is sigma(alpha log pi*(y1) - alpha log pi*(y2)): DPO's loss with a
    reference of zeros, all pairs."""
    scores, pairs = scores_of(Y), pairs_of(Y)
    logprobs = optimum(Y, scores)[0][pairs]  # (N, 2, R)
    from_policy, implicit = dpo(logprobs, torch.zeros_like(logprobs), Y.mask[0][pairs], beta=ALPHA)
    from_reward = bradley_terry_loss(scores[pairs[:, 0]], scores[pairs[:, 1]])
    close(from_policy, from_reward, atol=1e-12)
    # eq. 1 and 9: e^r1 / (e^r1 + e^r2)
    close((-from_reward).exp(), scores[pairs].softmax(1)[:, 0], atol=1e-12)
    close(implicit + ALPHA * (scores / ALPHA).logsumexp(0), scores[pairs], atol=1e-12)  # eq. 10


def plackett_luce(values):
    """Eq. 11 as it stands: values (..., K), best first -> probability of that ranking."""
    return torch.stack(
        [values[..., k].exp() / values[..., k:].exp().sum(-1) for k in range(values.shape[-1])]
    ).prod(0)


def rankings(K=4):
    """All K! rankings of the first K responses, (K!, K)."""
    return torch.tensor(list(itertools.permutations(range(K))))


def test_eq_11_eq_12_c_3_plackett_luce_from_the_policy():
    """Responses of one length L = 3, so that beta = alpha L makes the length-normalised s of simpo_pl the
    paper's s = alpha log pi*."""
    scores, order = scores_of(EVEN), rankings()
    losses, rewards = simpo_pl(
        optimum(EVEN, scores)[0][order], None, EVEN.mask[0][order], beta=ALPHA * 3, gamma=0.0
    )
    close((-losses).exp(), plackett_luce(scores[order]), atol=1e-12)
    close(rewards + ALPHA * (scores / ALPHA).logsumexp(0), scores[order], atol=1e-12)


def test_c_3_simpo_pl_is_a_distribution_over_rankings():
    """Lengths 1 to 3, any policy: the probabilities of all rankings sum to one and equal eq. 12 with s =
    (beta / |y|) log pi."""
    order = rankings()
    logprobs = Y.logprobs(random_logits(Y, 4).detach())
    losses, _ = simpo_pl(logprobs[0][order], None, Y.mask[0][order], beta=2.0, gamma=0.0)
    close((-losses).exp().sum(), 1.0, atol=1e-12)
    close((-losses).exp(), plackett_luce(2.0 * mean_logprobs(logprobs, Y.mask)[0][order]), atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_c_3_simpo_pl_at_two_responses_is_the_pair_loss(gamma):
    pairs = pairs_of(Y)
    logprobs = Y.logprobs(random_logits(Y, 5).detach())[0][pairs]
    pl, pair = (
        loss(logprobs, None, Y.mask[0][pairs], beta=2.0, gamma=gamma)[0] for loss in (simpo_pl, simpo)
    )
    close(pl, pair, atol=1e-12)


def test_c_4_gradient_of_the_loss_summed_log_probs():
    """grad L = -alpha sigma(alpha log pi(y_l) - alpha log pi(y_w)) [grad log pi(y_w) - grad log pi(y_l)], in
    the logits, for every pair."""
    logits = random_logits(Y, 6)
    for pair in pairs_of(Y)[::17]:
        logprobs = Y.logprobs(logits)
        loss, _ = dpo(logprobs[:, pair], torch.zeros_like(logprobs[:, pair]), Y.mask[:, pair], beta=ALPHA)
        logp_w, logp_l = log_pi(Y, logprobs)[pair]
        closed = -ALPHA * torch.sigmoid(ALPHA * (logp_l - logp_w)).detach() * (logp_w - logp_l)
        close(
            *(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, closed)), atol=1e-12
        )


def test_c_4_gradient_of_the_loss_length_normalised_with_margin():
    """r = (beta / |y|) log pi(y): grad L = -beta sigma(r_l - r_w + gamma) [grad log pi(y_w) / |y_w| - grad
    log pi(y_l) / |y_l|]."""
    beta, gamma, logits = 2.0, 0.5, random_logits(Y, 6)
    for pair in pairs_of(Y)[::17]:
        logprobs = Y.logprobs(logits)
        loss, _ = simpo(logprobs[:, pair], None, Y.mask[:, pair], beta=beta, gamma=gamma)
        (logp_w, logp_l), (len_w, len_l) = log_pi(Y, logprobs)[pair], Y.lengths[pair]
        weight = torch.sigmoid(beta * logp_l / len_l - beta * logp_w / len_w + gamma).detach()
        closed = -beta * weight * (logp_w / len_w - logp_l / len_l)
        close(
            *(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, closed)), atol=1e-12
        )


def test_c_5_lemma_1_same_class_same_preferences():
    """r' = r + f(x): the same Bradley-Terry and Plackett-Luce probabilities, and so the same losses."""
    scores, pairs, order = scores_of(Y), pairs_of(Y), rankings()
    shifted = scores + 3.3
    close(bradley_terry_loss(*shifted[pairs].T), bradley_terry_loss(*scores[pairs].T), atol=1e-12)
    close(plackett_luce(shifted[order]), plackett_luce(scores[order]), atol=1e-12)
    logprobs = Y.logprobs(random_logits(Y, 7).detach())
    # a constant per token is a constant in the length-normalised reward
    for index, loss in [(pairs, simpo), (order, simpo_pl)]:
        close(
            *(
                loss((logprobs + c)[0][index], None, Y.mask[0][index], beta=2.0, gamma=0.5)[0]
                for c in (0.0, -1.1)
            ),
            atol=1e-12,
        )


def test_c_5_lemma_2_same_class_same_optimum():
    """r' = r + f(x): the same gradient everywhere, the same leave-one-out advantages, the same policy in the
    end."""
    scores, logits = scores_of(Y), random_logits(Y, 8)
    objectives = [followed(Y, r, maxent=ALPHA) for r in (scores, scores + 3.3)]
    close(*(gradient(Y, objective, logits) for objective in objectives), atol=1e-12)
    close(leave_one_out(scores[None] + 3.3), leave_one_out(scores[None]), atol=1e-12)
    close(*(log_pi(Y, ascend(Y, objective)) for objective in objectives))


def projected(scores, alpha=ALPHA):
    """The operator of C.6: f(r, alpha) = r - alpha log Z."""
    return scores - alpha * (scores / alpha).logsumexp(0)


def test_c_6_theorem_1_every_class_has_the_form_alpha_log_pi():
    """f(r, alpha) is in the class of r, equals alpha log pi_r, is the same for the whole class, and
    projecting twice changes nothing."""
    scores = scores_of(Y)
    found = log_pi(Y, ascend(Y, followed(Y, scores, maxent=ALPHA)))
    close(projected(scores), ALPHA * found)
    close((projected(scores) - scores).std(), 0.0, atol=1e-12)
    close(projected(scores + 3.3), projected(scores), atol=1e-12)
    close(projected(projected(scores)), projected(scores), atol=1e-12)


def test_proposition_1_the_representative_is_unique():
    """alpha log pi + f(x) = alpha log pi' needs sum_y pi exp(f / alpha) = 1, so f = 0. The implicit rewards
    of the summed loss satisfy it for any policy, and with any constant added they do not. (Length-normalised
    ones do not have this form unless |y| = 1.)"""
    pairs = torch.arange(Y.count)[:, None].expand(-1, 2)
    logprobs, mask = Y.logprobs(random_logits(Y, 9).detach())[0][pairs], Y.mask[0][pairs]
    summed, normalised = (
        loss(logprobs, torch.zeros_like(logprobs), mask, beta=ALPHA)[1][:, 0] for loss in (dpo, simpo)
    )
    close((summed / ALPHA).exp().sum(), 1.0, atol=1e-12)
    close(projected(summed), summed, atol=1e-12)
    for f in (-1.0, -1e-3, 1e-3, 1.0):
        close(((summed + f) / ALPHA).exp().sum(), math.exp(f / ALPHA), atol=1e-12)
    assert (normalised / ALPHA).exp().sum() > 1.1


# --- Section 4.2.1: minimum entropy


def test_section_4_2_1_minimum_entropy_optimum_is_deterministic():
    """Without KL, E[r] + c E[(1/|y|) log pi] <= max r, as the bonus is never positive, and it is max r only
    where pi is 1 on the best response. But every deterministic policy attracts: next to the worst one too the
    step leads to it, as all others pay c log pi."""
    scores, c = scores_of(Y), 1.0
    objective = followed(Y, scores, minent_length=c)
    for spread in (0.1, 1.0, 5.0):
        for seed in range(100):
            logits = spread * random_logits(Y, seed).detach()
            assert objective(Y.logprobs(logits)) < scores.max()
    peaks = 0.9999 * torch.eye(Y.count, dtype=torch.float64) + 0.0001 / Y.count
    close(torch.stack([objective(Y.logprobs(Y.logits_of(p))) for p in peaks]), scores, atol=2e-3)
    for y, peak in enumerate(peaks):
        logits = Y.logits_of(peak).requires_grad_()
        likelier = torch.autograd.grad(log_pi(Y, Y.logprobs(logits))[y], logits)[0]
        assert (likelier * gradient(Y, objective, logits)).sum() > 0
    logits = torch.zeros(Y.prefixes, Y.vocab, dtype=torch.float64)
    for _ in range(500):
        logits = (logits + gradient(Y, objective, logits.requires_grad_())).detach()
    probs = log_pi(Y, Y.logprobs(logits)).exp()
    # from the uniform policy it is the best one that wins here
    assert probs.max() > 0.99 and probs.argmax() == scores.argmax()


def test_section_4_2_1_minimum_entropy_with_kl():
    """kl+minent_length on responses of one length L, KL coefficient beta, c = coefficient / L < beta: r +
    beta log pi_ref - (beta - c) log pi is constant, so pi = (exp(r) pi_ref^beta)^(1 / (beta - c)) / Z:
    sharper than the KL-constrained optimum."""
    beta, c, scores = 1.5, 0.5, scores_of(EVEN)
    ref = EVEN.logprobs(0.4 * random_logits(EVEN, 10).detach())
    found = ascend(EVEN, followed(EVEN, scores, kl=beta, minent_length=c * 3, ref_logprobs=ref))
    close(log_pi(EVEN, found), ((scores + beta * log_pi(EVEN, ref)) / (beta - c)).log_softmax(0))


# --- beyond the paper: length normalisation
#
# The paper ties SimPO to MaxEnt RL without length normalisation (3.2) and then divides by |y| in both (the
# SimPO loss, eq. 7), as something that does "not alter the underlying connection". With different lengths
# there are two different things that eq. 7 can mean.
#
# (a) The maximiser of the objective J(pi) = E[r - (beta/|y|) log pi]. With a multiplier lambda for
#     sum_y pi = 1, d/d pi(y) gives
#         r(y) - (beta/|y|) (log pi(y) + 1) = lambda
#     and for two responses, with m = (1/|y|) log pi(y),
#         r_w - r_l = beta (m_w - m_l) + beta (1/|y_w| - 1/|y_l|):
#     SimPO's implicit reward plus a term of the lengths, which prefers long answers.
# (b) The fixed point of the gradient that RLOO follows, where the bonus is part of the reward and has no
#     gradient of its own:
#         sum_y pi(y) (r(y) - (beta/|y|) log pi(y) - b) grad log pi(y) = 0
#         =>   r(y) - (beta/|y|) log pi(y) = lambda
#     (sum_y pi(y) A(y) grad log pi(y) = 0 for every direction of pi means A constant), so
#         r_w - r_l = beta (m_w - m_l),
#     SimPO's margin exactly. The dropped part, -E[(beta/|y|) grad log pi], is the gradient of
#     -beta E[1/|y|]: it is zero when all lengths are equal (eq. 6 is the case of |y| = 1), and otherwise RLOO
#     climbs J + beta E[1/|y|], a bonus for short answers nobody wrote down.
# In both the constant lambda takes the place of alpha log Z: pi(y) = exp(|y| (r(y) - lambda) / beta) in (b)
# is not a softmax, but lambda cancels in a pair as log Z does. Both objectives are strictly concave in pi, so
# each has one solution.


def length_normalised_objective(responses, scores, beta):
    """J of (a): the entropy term differentiated with the rest."""
    def objective(logprobs):
        return (
            log_pi(responses, logprobs).exp() * (scores - beta * mean_logprobs(logprobs, responses.mask)[0])
        ).sum()
    return objective


def margins(responses, logprobs, scores, beta):
    """True margin minus SimPO's implicit margin, and 1/|y_w| - 1/|y_l|, for all pairs: (N,), (N,)."""
    pairs = pairs_of(responses)
    rewards = simpo(logprobs[0][pairs], None, responses.mask[0][pairs], beta=beta)[1]  # (N, 2)
    excess = (scores[pairs] - rewards) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return excess, 1 / responses.lengths[pairs[:, 0]] - 1 / responses.lengths[pairs[:, 1]]


BETA = 1.5


def test_beyond_eq_7_maximiser_of_the_objective_has_an_extra_length_term():
    """(a): r_w - r_l = beta (m_w - m_l) + beta (1/|y_w| - 1/|y_l|) at the maximum of E[r - (beta/|y|) log
    pi]."""
    scores = scores_of(Y)
    excess, inverse_lengths = margins(
        Y, ascend(Y, length_normalised_objective(Y, scores, BETA)), scores, BETA
    )
    close(excess, BETA * inverse_lengths.double())
    assert excess.abs().max() > 0.9  # 1.5 (1 - 1/3) = 1: no small print at these lengths


def test_beyond_eq_7_fixed_point_of_rloo_has_the_simpo_margin():
    """(b): r_w - r_l = beta (m_w - m_l) where RLOO with eq. 7 comes to rest; pi(y) = exp(|y| (r - lambda) /
    beta), one lambda for all."""
    scores = scores_of(Y)
    found = ascend(Y, followed(Y, scores, maxent_length=BETA))
    close(margins(Y, found, scores, BETA)[0], torch.zeros(Y.count * (Y.count - 1)))
    low, high = -10.0, 10.0  # lambda by bisection: the total probability falls with it
    for _ in range(60):
        middle = (low + high) / 2
        total = (Y.lengths * (scores - middle) / BETA).exp().sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    close(log_pi(Y, found), Y.lengths * (scores - low) / BETA)


def test_beyond_eq_7_rloo_climbs_the_objective_plus_a_bonus_for_short_answers():
    """grad of (b) = grad of J + beta E[1/|y|] at any policy; and the policy of (b) is shorter than the policy
    of (a)."""
    scores, logits = scores_of(Y), random_logits(Y, 11)
    rloo, objective = followed(Y, scores, maxent_length=BETA), length_normalised_objective(Y, scores, BETA)

    def with_bonus(logprobs):
        return objective(logprobs) + (log_pi(Y, logprobs).exp() * BETA / Y.lengths).sum()

    close(gradient(Y, rloo, logits), gradient(Y, with_bonus, logits), atol=1e-12)
    assert (gradient(Y, rloo, logits) - gradient(Y, objective, logits)).abs().max() > 0.01
    a, b = (log_pi(Y, ascend(Y, f)).exp() for f in (objective, rloo))
    assert (a - b).abs().max() > 0.05
    assert (b / Y.lengths).sum() > (a / Y.lengths).sum() + 0.05
    assert (b * Y.lengths).sum() < (a * Y.lengths).sum() - 0.1


def test_beyond_eq_7_with_equal_lengths_the_two_coincide():
    """All of length 3: both are softmax(r L / beta), the MaxEnt optimum of eq. 3 with alpha = beta / L."""
    beta, scores = 3.0, scores_of(EVEN)
    objective = length_normalised_objective(EVEN, scores, beta)
    rloo = followed(EVEN, scores, maxent_length=beta)
    logits = random_logits(EVEN, 12)
    close(gradient(EVEN, objective, logits), gradient(EVEN, rloo, logits), atol=1e-12)
    a, b = (log_pi(EVEN, ascend(EVEN, f)) for f in (objective, rloo))
    close(a, b)
    close(b, (scores * 3 / beta).log_softmax(0))
