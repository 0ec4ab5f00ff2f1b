"""The paper's claims, in its order. results.py writes what they return into RESULTS.md.

Each claim is a function of the runs of runs/study.sh: its rule stands in its text, with the numbers that
the code compares with, and `decide` (verdict.py) turns the rule into a verdict.
"""

from study.claims_kl import clipping, kl_drift_bounded, kl_plateaus, maxent_drift_grows, maxent_kl_linear
from study.claims_offline import (
    likelihoods_fall,
    margin_worsens,
    reference_margins,
    simpo_high,
    simpo_low,
    zero_margin,
)
from study.claims_reward import (
    coefficient_zero,
    entropy_bonus_tells,
    high_rate,
    kl_works,
    large_like_small,
    lower_rate,
    medium_fails,
    minent_medium,
    minent_small,
    not_eliminated,
    small_stable,
)

CLAIMS = (
    kl_works,
    high_rate,
    lower_rate,
    not_eliminated,
    small_stable,
    coefficient_zero,
    entropy_bonus_tells,
    medium_fails,
    large_like_small,
    kl_plateaus,
    maxent_kl_linear,
    kl_drift_bounded,
    maxent_drift_grows,
    clipping,
    minent_small,
    minent_medium,
    reference_margins,
    simpo_high,
    margin_worsens,
    simpo_low,
    likelihoods_fall,
    zero_margin,
)
