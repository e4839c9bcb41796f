"""Statistics over a few seeds: means, t-intervals, paired differences, sign-flip tests, Holm's correction.

Intervals and tests are over seeds: initialisation, order of the data, augmentation and masks. All runs share the test
samples, so nothing here is a statement about other test samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import stats

LEVEL = 0.95
AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "cannot tell yet"


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds. `deviation` is the sample standard deviation (n - 1), `low` and `high` are the ends of the
    95 % t-interval of the mean, `t_p` is the two-sided p of the t-test that the mean is 0; None for a single seed."""

    n: int
    mean: float
    deviation: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    t_p: Optional[float] = None


@dataclass(frozen=True)
class Difference(Estimate):
    """The same for differences between pairs that share a seed. `p` is the exact two-sided sign-flip p, `least_p` the
    smallest p that n pairs can reach, `adjusted` a p after Holm's correction over a family of tests."""

    p: Optional[float] = None
    least_p: Optional[float] = None
    adjusted: Optional[float] = None


def estimate(values: Sequence[float]) -> Optional[Estimate]:
    """None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    deviation = float(np.std(values, ddof=1))
    if deviation <= 1e-12 * abs(mean):  # equal values, up to rounding: scipy would divide by 0
        return Estimate(n, mean, 0.0, mean, mean, float(mean == 0))
    test = stats.ttest_1samp(values, 0)
    return Estimate(n, mean, deviation, *map(float, test.confidence_interval(LEVEL)), float(test.pvalue))


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Optional[Difference]:
    """Ours minus theirs, from seed -> value of each, over the seeds that both have; None without such seeds."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    found = estimate(pairs)
    return found and Difference(**vars(found), p=sign_flip_p(pairs), least_p=least_p(len(pairs)))


def sign_flip_p(pairs: Sequence[float]) -> float:
    """The share of all 2^n sign choices for the differences whose sum is at least as far from 0 as the observed one.

    Exact if, without an effect, a difference is as likely to be -x as x. Two-sided.
    """
    sums = np.zeros(1)
    for value in np.abs(np.asarray(pairs, dtype=np.float64)):
        sums = np.concatenate([sums + value, sums - value])
    tie = 1e-9 * max(1.0, float(np.abs(sums).max()))  # sums in another order differ by rounding
    return float(np.mean(np.abs(sums) >= abs(math.fsum(pairs)) - tie))


def least_p(n: int) -> float:
    """The smallest sign-flip p of n pairs: only the observed signs and their opposites give so large a sum."""
    return min(1.0, 2.0 / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): with adjusted p <= 0.05, the chance of any false finding is below 5 %."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted


def verdict(found: Optional[Difference], higher_is_better: bool) -> str:
    """On the claim that the first row of a difference is the better one; `adjusted` is from its t-test."""
    if found is None or found.adjusted is None or found.adjusted > 1 - LEVEL:
        return UNDECIDED
    return AGREES if (found.mean > 0) == higher_is_better else DISAGREES
