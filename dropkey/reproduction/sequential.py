"""Decisions on planned claims: at one planned number of seeds, or at several looks with a budget of false findings.

A group-sequential design (Lan & DeMets 1983): by a look at n of N seeds, each side of a two-sided test may have spent
`2 - 2 Phi(z / sqrt(n / N))` of its alpha / 2, with z so that all is spent at N: as in O'Brien and Fleming's design,
nearly nothing early. Looking once, at N, is the special case of a fixed design.

The boundaries are exact for t-tests of normal values with few seeds, where those for known variances are too lax.
With sums S_n and sums of squares Q_n, `u_n = S_n / sqrt(Q_n)` is a function of t_n, and the next value x gives
`u_{n+1} = (u_n + w) / sqrt(1 + w^2)`, `w = x / sqrt(Q_n)`. Without an effect, all u up to n say nothing about Q_n
(Basu's theorem), so that `sqrt(n) w` has Student's t-distribution on n degrees of freedom whatever happened before:
u_n is a Markov chain, followed here on a grid of z, the normal quantile with the same p as t_n.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from dropkey.config.check import require
from dropkey.reproduction.statistics import Estimate, equivalence_p, estimate, holm

EDGES = np.linspace(0, 9, 301)  # of |z|
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2
LARGE = 60  # seeds, from where on the chain of z is taken as that of known variances
QUANTILES = np.linspace(0.5, 5.0, 37)  # of alpha / 2 from .6 to 6e-7: boundaries between them are interpolated


@lru_cache
def boundaries(looks: tuple[int, ...], alpha: float = 0.05) -> tuple[float, ...]:
    """At each look (a number of seeds), the p of a two-sided t-test at or below which a claim is decided.

    The chance that a claim without an effect is decided at any look is alpha (up to 0.6). One-sided tests at alpha
    have half the boundary of 2 alpha.
    """
    check_looks(looks)
    spent = 4 * ndtr(ndtri(alpha / 4) / np.sqrt(np.array(looks) / looks[-1]))
    levels, tails = [], 2 * ndtr(-EDGES)  # the chance to come to this look with |z| above each edge
    for i, spend in enumerate(np.diff(spent, prepend=0.0)):
        cut = np.interp(math.log(spend), np.log(np.maximum(tails, 1e-300))[::-1], EDGES[::-1])
        levels.append(max(spend, 2 * ndtr(-cut)) if i else spend)
        if i + 1 < len(looks):
            going_on = -np.diff(np.maximum(tails - spend, 0.0))
            tails = going_on @ transition(looks[i], looks[i + 1])
    return tuple(map(float, levels))


def check_looks(looks: Sequence[int]) -> None:
    """Raises ConfigError unless they are rising whole numbers from 3 on."""
    whole = isinstance(looks, (tuple, list)) and all(isinstance(look, int) for look in looks)
    rising = whole and all(a < b for a, b in itertools.pairwise(looks))
    require(
        rising and len(looks) > 0 and looks[0] >= 3,
        f"looks={looks} must be rising whole numbers of seeds from 3 on, such as [5, 10, 15]",
    )


@lru_cache
def transition(n: int, more: int) -> np.ndarray:
    """The chance (from, edge) that |z| is above each edge at `more` seeds, for |z| in the middle of a bin at n."""
    if n >= LARGE:
        old, new = math.sqrt(n / more) * MIDDLES[:, None], math.sqrt(1 - n / more)
        return ndtr((old - EDGES) / new) + ndtr((-old - EDGES) / new)
    if more > n + 1:
        middle = min(more - 1, LARGE)
        return -np.diff(transition(n, middle), axis=1) @ transition(middle, more)
    # u_{n+1} = sqrt(1 + u_n^2) sin(angle + atan(u_n)), where sqrt(n) tan(angle) has the t-distribution
    now, edge = chain(MIDDLES, n)[:, None], chain(EDGES, more)
    with np.errstate(invalid="ignore"):  # nan where the edge cannot be reached
        reached, turn = np.arcsin(edge / np.sqrt(1 + now**2)), np.arctan(now)
    # above the edge, below its negative; where reached + turn is beyond pi / 2, u falls again before the angle ends
    near, far = (math.sqrt(n) * np.tan(angle) for angle in (reached - turn, reached + turn))
    return np.nan_to_num(stdtr(n, -near) + np.copysign(stdtr(n, -np.abs(far)), far))


def chain(z: np.ndarray, n: int) -> np.ndarray:
    """|u_n| where the t-test on n values has the p of z."""
    t = -stdtrit(n - 1, ndtr(-z))
    return math.sqrt(n) * t / np.sqrt(n - 1 + t**2)


@lru_cache
def quantiles(looks: tuple[int, ...]) -> np.ndarray:
    """The boundaries as z (alpha, look) for the alphas of QUANTILES."""
    return -ndtri(np.array([boundaries(looks, float(2 * ndtr(-z))) for z in QUANTILES]) / 2)


def least_alphas(looks: tuple[int, ...], ps: np.ndarray) -> np.ndarray:
    """For p at the first looks (..., look): the smallest alpha at which each is at its look's boundary.

    Not below 6e-7. Above 0.6, which no design uses, a rough value.
    """
    ps = np.asarray(ps, dtype=np.float64)
    z, least = -ndtri(ps / 2), np.empty(ps.shape)
    for look, known in enumerate(quantiles(looks).T[: ps.shape[-1]]):
        least[..., look] = np.interp(z[..., look], np.append(0, known), np.append(0, QUANTILES))
    return 2 * ndtr(-least)


def sequential_p(
    looks: tuple[int, ...], ps: Sequence[Optional[float]], sides: int = 2
) -> tuple[Optional[float], Optional[int]]:
    """The smallest alpha at which a claim is decided at one of the looks so far, from the p of its test at each, and
    the index of that look.

    A p like that of a fixed design whenever one stops (Liu & Anderson 2008): Holm's correction takes it, and is then
    the group-sequential one (Ye et al. 2013). None where no look had a p. A one-sided p is half a two-sided one.
    """
    known = np.array([1.0 if p is None else p for p in ps])
    if all(p is None for p in ps):
        return None, None
    alphas = sides / 2 * least_alphas(looks, np.minimum(1, 2 / sides * known))
    return max(float(known.min()), float(alphas.min())), int(alphas.argmin())


@dataclass(frozen=True)
class Decision:
    """What is decided on a claim by the last look that is over.

    `sign` is that of the difference, 0 where none is decided; `within` says that equivalence is decided. Both may be:
    a difference smaller than the margin. `decided_at` is the look with the first of these decisions.

    `look` is the last look's number of planned seeds, None before the first; `estimate` is over the n of them that have
    a value, and its interval holds at all looks together (the ordinary one for a single look). `p` and `equivalence_p`
    are adjusted for looks and claims.
    """

    sign: int = 0
    within: bool = False
    look: Optional[int] = None
    estimate: Optional[Estimate] = None
    p: Optional[float] = None
    equivalence_p: Optional[float] = None
    decided_at: Optional[int] = None


def decide(
    claims: Sequence[dict[int, float]],
    seeds: Sequence[int],
    over: int,
    looks: tuple[int, ...],
    margin: Optional[float] = None,
    alpha: float = 0.05,
) -> list[Decision]:
    """A decision on each planned claim.

    `claims`: from seed -> the contrast in that seed, where it exists. `seeds`: all, in their planned order. `over`: how
    many leading seeds are over, done or not; a look counts once all its seeds are. Differences and, within a margin,
    equivalences are two families of tests, each with its own alpha and Holm correction. A decision stands, whatever
    later looks say: a claim that was higher stays higher.
    """
    check_looks(looks)
    require(len(seeds) >= looks[-1], f"{len(seeds)} seeds are planned, and looks={looks} need {looks[-1]}")
    reached = [n for n in looks if n <= over]
    if not reached:
        return [Decision()] * len(claims)
    samples = [[[claim[s] for s in seeds[:n] if s in claim] for n in reached] for claim in claims]
    found = [[estimate(values) for values in claim] for claim in samples]
    differ = family(looks, [[one and one.p for one in claim] for claim in found], 2, alpha)
    equal = [(None, None, None)] * len(claims)
    if margin is not None:
        equal = family(looks, [[equivalence_p(values, margin) for values in claim] for claim in samples], 1, alpha)
    level = 1 - boundaries(looks, alpha)[len(reached) - 1]
    decisions = []
    for claim, means, (p, at, k), (equal_p, equal_at, _) in zip(samples, found, differ, equal, strict=True):
        sign = 0 if at is None else int(np.sign(means[k].mean))
        first = min((look for look in (at, equal_at) if look is not None), default=None)
        within = equal_at is not None
        decisions.append(Decision(sign, within, reached[-1], estimate(claim[-1], level), p, equal_p, first))
    return decisions


def family(
    looks: tuple[int, ...], ps: list[list[Optional[float]]], sides: int, alpha: float
) -> list[tuple[Optional[float], Optional[int], Optional[int]]]:
    """From the p of each claim at each look: its adjusted p at the last one, the look that first had p <= alpha, and
    the index of the look whose test decided then: an earlier one, where another claim has passed its alpha on."""
    found = [(None, None, None)] * len(ps)
    for k, look in enumerate(looks[: max(map(len, ps), default=0)]):
        own = [sequential_p(looks, claim[: k + 1], sides) for claim in ps]
        adjusted = holm([p for p, _ in own])
        for i, (p, (_, best), (_, at, decisive)) in enumerate(zip(adjusted, own, found, strict=True)):
            now = at is None and p is not None and p <= alpha
            found[i] = (p, look, best) if now else (p, at, decisive)
    return found
