"""What a handful of seeds can say: means, intervals, paired differences, exact tests, Holm's correction.

Intervals and tests are over seeds: initialisation, order of the data, augmentation and masks. The test images are the
same in every run, so nothing here speaks of other test images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds; `deviation` is the sample standard deviation (n - 1), None for a single seed. `low` and
    `high` are the ends of the 95 % t-interval of the mean."""

    n: int
    mean: float
    deviation: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None


@dataclass(frozen=True)
class Difference(Estimate):
    """Of pairs that share a seed. `p` is the exact two-sided sign-flip p, `least_p` the smallest that n pairs can
    reach, `adjusted` Holm's over a family of tests, `t_p` the two-sided p of the paired t-test."""

    p: Optional[float] = None
    least_p: Optional[float] = None
    t_p: Optional[float] = None
    adjusted: Optional[float] = None


def estimate(values: Sequence[float]) -> Optional[Estimate]:
    """None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * deviation / math.sqrt(n)
    return Estimate(n, mean, deviation, mean - half, mean + half)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Optional[Difference]:
    """Of two rows, seed -> value, over the seeds that both have; None without such seeds."""
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    found = estimate(pairs)
    if found is None:
        return None
    return Difference(
        **vars(found),
        p=sign_flip_p(pairs),
        least_p=least_p(len(pairs)),
        t_p=t_test_p(found),
    )


def sign_flip_p(pairs: Sequence[float]) -> float:
    """The share of all 2^n ways to choose the signs of the differences whose sum is as far from 0 as the one seen, or
    farther. Exact where, without an effect, a difference is as likely to be -x as x; two-sided."""
    sums = np.zeros(1)
    for value in np.abs(np.asarray(pairs, dtype=np.float64)):
        sums = np.concatenate([sums + value, sums - value])
    seen = abs(math.fsum(pairs))
    tie = 1e-9 * max(1.0, float(np.abs(sums).max()))  # sums in another order differ in their last bits
    return float(np.mean(np.abs(sums) >= seen - tie))


def least_p(n: int) -> float:
    """The smallest sign-flip p of n pairs: only the signs as seen and their opposites lie as far out."""
    return min(1.0, 2.0 / 2**n)


def t_test_p(found: Estimate) -> Optional[float]:
    """Two-sided p of the t-test that the mean is 0; None for a single value."""
    if found.n < 2:
        return None
    if found.deviation == 0:
        return 1.0 if found.mean == 0 else 0.0
    t = found.mean / (found.deviation / math.sqrt(found.n))
    return float(2 * stdtr(found.n - 1, -abs(t)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): adjusted p <= 0.05 keeps the chance of any false finding in the family
    below 5 %."""
    adjusted, running = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted


AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "cannot tell yet"


def verdict(found: Optional[Difference]) -> str:
    """On a claim that the difference is positive; `adjusted` must hold its t-test's p, adjusted over all claims."""
    if found is None or found.adjusted is None or found.adjusted > 1 - LEVEL:
        return UNDECIDED
    return AGREES if found.mean > 0 else DISAGREES
