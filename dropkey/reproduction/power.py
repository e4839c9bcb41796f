"""How many seeds a claim needs: power of the t-test and of the equivalence test, before anything has run.

`deviation` is that of the contrast between seeds, in the unit of `effect` and `margin`. Under Holm's correction over m
claims, alpha / m is what each of them is sure of.
"""

import math
from collections.abc import Callable
from typing import Optional

import numpy as np
from scipy import optimize, stats

MOST = 10_000


def difference_power(n: int, effect: float, deviation: float, alpha: float = 0.05, two_sided: bool = True) -> float:
    """The chance that the t-test on n seeds finds a true difference of `effect` (p <= alpha)."""
    if n < 2:
        return 0.0
    shift, df = abs(effect) / deviation * math.sqrt(n), n - 1
    if not two_sided:
        return float(stats.nct.sf(stats.t.isf(alpha, df), df, shift))
    least = stats.t.isf(alpha / 2, df)
    wrong_sign = np.nan_to_num(stats.nct.cdf(-least, df, shift))  # scipy gives nan where it is below 1e-15
    return float(stats.nct.sf(least, df, shift) + wrong_sign)


def seeds_needed(
    effect: float, deviation: float, alpha: float = 0.05, power: float = 0.8, most: int = MOST
) -> Optional[int]:
    """The fewest seeds with this power; None where `most` do not reach it."""
    return fewest(lambda n: difference_power(n, effect, deviation, alpha), power, most)


def detectable(n: int, deviation: float, alpha: float = 0.05, power: float = 0.8) -> Optional[float]:
    """The smallest true difference that n seeds find with this power; None below 3 seeds, which decide nothing."""
    if n < 3:
        return None
    most = 1.0
    while difference_power(n, most, 1.0, alpha) < power:
        most *= 2
    return deviation * optimize.brentq(lambda effect: difference_power(n, effect, 1.0, alpha) - power, 0.0, most)


def equivalence_power(n: int, margin: float, deviation: float, alpha: float = 0.05) -> float:
    """The chance that n seeds show a true difference of 0 to lie within the margin (two one-sided t-tests).

    Both tests reject where |mean| <= margin - t s / sqrt(n): the normal probability of that, integrated over the
    distribution of s.
    """
    if n < 2:
        return 0.0
    df, t, scaled = n - 1, stats.t.isf(alpha, n - 1), margin * math.sqrt(n) / deviation
    end = min(scaled / t, stats.chi.isf(1e-15, df) / math.sqrt(df))  # of s / deviation
    nodes, weights = np.polynomial.legendre.leggauss(200)
    s = end * (nodes + 1) / 2
    density = stats.chi.pdf(s * math.sqrt(df), df) * math.sqrt(df)
    return min(1.0, float(end / 2 * weights @ (density * (2 * stats.norm.cdf(scaled - t * s) - 1))))


def equivalence_seeds(
    margin: float, deviation: float, alpha: float = 0.05, power: float = 0.8, most: int = MOST
) -> Optional[int]:
    """The fewest seeds with this power; None where `most` do not reach it."""
    return fewest(lambda n: equivalence_power(n, margin, deviation, alpha), power, most)


def fewest(power_of: Callable[[int], float], power: float, most: int) -> Optional[int]:
    """The fewest of 3 to `most` seeds with at least this power, by bisection: more seeds never have less."""
    if power_of(most) < power:
        return None
    low, high = 2, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high
