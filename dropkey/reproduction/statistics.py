"""Statistics over seeds: the t-test of a claim, its interval, equivalence, Holm's correction, pooled errors.

A claim is tested on one number per seed, its contrast in that seed: DropKey minus Dropout, or a mean of rows minus a
mean of rows. The t-test on these numbers decides, with Holm's correction over the planned claims. The sign-flip test
stands beside it: it needs no normal distribution.

Seeds vary initialisation, order of the data, augmentation and masks. All runs share the test samples; only
`sampling_error` says something about other samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import stats
from scipy.special import fdtrc, stdtrit

LEVEL = 0.95
EXACT_FLIPS = 20  # seeds; 2^20 sums take some 20 ms
SAMPLED_FLIPS = 100_000


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds. `deviation` is the sample standard deviation (n - 1), `low` and `high` are the ends of the
    t-interval of the mean, `p` is the two-sided p of the t-test that the mean is 0.

    Interval and p are None where nothing can be decided: below 3 seeds, and without spread.
    """

    n: int
    mean: float
    deviation: Optional[float] = None  # None for a single seed
    low: Optional[float] = None
    high: Optional[float] = None
    p: Optional[float] = None


@dataclass(frozen=True)
class Difference(Estimate):
    """The same for a contrast. `flip_p` is its two-sided sign-flip p, `least_flip_p` the smallest that n can reach."""

    flip_p: Optional[float] = None
    least_flip_p: Optional[float] = None


def estimate(values: Sequence[float], level: float = LEVEL) -> Optional[Estimate]:
    """None without values. `level` is that of the interval."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    deviation = float(np.std(values, ddof=1))
    if deviation <= 1e-12 * max(map(abs, values)):  # equal values, up to rounding
        return Estimate(n, mean, 0.0)
    if n == 2:
        return Estimate(n, mean, deviation)
    return Estimate(n, mean, deviation, *t_interval(mean, deviation / math.sqrt(n), n - 1, level))


def t_interval(mean: float, error: float, df: float, level: float = LEVEL) -> tuple[float, float, float]:
    """Ends of the interval of a mean with this standard error, and the two-sided p that the true mean is 0."""
    half = stats.t.isf((1 - level) / 2, df) * error
    return float(mean - half), float(mean + half), float(2 * stats.t.sf(abs(mean) / error, df))


def contrast(values: dict[int, float]) -> Optional[Difference]:
    """From seed -> the contrast in that seed; None without seeds."""
    numbers = [values[seed] for seed in sorted(values)]
    found = estimate(numbers)
    return found and Difference(**vars(found), flip_p=sign_flip_p(numbers), least_flip_p=least_p(len(numbers)))


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Optional[Difference]:
    """Ours minus theirs, from seed -> value of each, over the seeds that both have; None without such seeds."""
    return contrast({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})


def sign_flip_p(values: Sequence[float]) -> float:
    """The share of all 2^n choices of signs whose sum is at least as far from 0 as the observed one. Two-sided.

    Valid if, without an effect, x is as likely as -x. Exact up to 20 values; from 100,000 sampled choices above, the
    observed one among them.
    """
    size, total = np.abs(np.asarray(values, dtype=np.float64)), abs(math.fsum(values))
    tie = 1e-9 * max(1.0, float(size.sum()))  # sums in another order differ by rounding
    if len(size) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for value in size:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= total - tie))
    random, sums = np.random.default_rng(0), np.zeros(SAMPLED_FLIPS)
    for value in size:
        sums += np.where(random.integers(2, size=SAMPLED_FLIPS), value, -value)
    return float(np.sum(np.abs(sums) >= total - tie) + 1) / (SAMPLED_FLIPS + 1)


def least_p(n: int) -> float:
    """The smallest sign-flip p of n values: only the observed signs and their opposites give so large a sum."""
    return min(1.0, 2.0 / 2**n) if n <= EXACT_FLIPS else 1 / (SAMPLED_FLIPS + 1)


def holm(ps: Sequence[Optional[float]]) -> list[Optional[float]]:
    """Holm's step-down adjustment (1979): with adjusted p <= 0.05, the chance of any false finding is at most 5 %.

    None is a planned test that could not be made. It stays None, and the others pay for it all the same.
    """
    tested = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    adjusted, running = [None] * len(ps), 0.0
    for rank, index in enumerate(tested):
        running = max(running, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = running
    return adjusted


def equivalence_p(values: Sequence[float], margin: float) -> Optional[float]:
    """The p of two one-sided t-tests (Schuirmann 1987): small where the true mean lies within -margin and margin.

    None where nothing can be decided: below 3 values, and without spread.
    """
    found = estimate(values)
    if found is None or found.p is None:
        return None
    return float(stats.t.sf((margin - abs(found.mean)) * math.sqrt(found.n) / found.deviation, found.n - 1))


# ------------------------------------------------------------------------------------------- more than one contrast


@dataclass(frozen=True)
class PooledError:
    """One error for all rows of a table. `deviation` is the standard deviation of one run within its row and seed, on
    `df` degrees of freedom; `seed_share` is the share of a run's variance that belongs to its seed, which pairing
    removes: 0 where the estimate is negative."""

    deviation: float
    df: int
    seed_share: float


def pooled_error(rows: dict[str, dict[int, float]]) -> Optional[PooledError]:
    """From row -> seed -> value: value = row + seed + error, on the seeds that all rows have.

    Takes the rows to be equally noisy. None below 2 rows or 2 common seeds, and without spread.
    """
    seeds = sorted(set.intersection(*(set(values) for values in rows.values()))) if rows else []
    if len(rows) < 2 or len(seeds) < 2:
        return None
    _, by_seed, error = mean_squares(np.array([[values[seed] for seed in seeds] for values in rows.values()]))
    if error == 0:
        return None
    of_seed = max(0.0, (by_seed - error) / len(rows))
    return PooledError(math.sqrt(error), (len(rows) - 1) * (len(seeds) - 1), of_seed / (of_seed + error))


def pooled_interval(
    mean: float, weights_squared_sum: float, n: int, pooled: PooledError, level: float = LEVEL
) -> tuple[float, float, float]:
    """Low, high and two-sided p of a contrast of rows over n seeds, such as 2 for the difference of two rows.

    The weights of the rows must add up to 0, or the seeds' own variance would be missing.
    """
    return t_interval(mean, pooled.deviation * math.sqrt(weights_squared_sum / n), pooled.df, level)


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Of rows, columns and residuals in a two-way layout (R, C) with one value per place."""
    rows, columns = values.shape
    of_rows, of_columns = values.mean(axis=1), values.mean(axis=0)
    residuals = values - of_rows[:, None] - of_columns + values.mean()
    residual = float(np.sum(residuals**2) / ((rows - 1) * (columns - 1)))
    if residual <= 1e-24 * float(np.max(values**2)):  # rounding
        residual = 0.0
    return columns * float(np.var(of_rows, ddof=1)), rows * float(np.var(of_columns, ddof=1)), residual


@dataclass(frozen=True)
class SamplingError:
    """Standard errors of one mean: for other seeds on these samples, for other samples with these seeds, for both."""

    seeds: float
    samples: float
    both: float


def sampling_error(differences: np.ndarray) -> Optional[SamplingError]:
    """From per-sample differences (seeds, samples), such as correct minus correct in -1, 0, 1; in their unit.

    Seeds and samples are crossed random effects. Each of the two simple errors holds the residual variance once, so
    that their sum would hold it twice: `both` takes it out, and is at least the larger of the two. None below 2 seeds
    or 2 samples.
    """
    values = np.asarray(differences, dtype=np.float64)
    if min(values.shape) < 2:
        return None
    seeds, samples, residual = mean_squares(values)
    both = max(seeds, samples, seeds + samples - residual)
    return SamplingError(*(math.sqrt(square / values.size) for square in (seeds, samples, both)))


@dataclass(frozen=True)
class Summary:
    """One effect over several columns (models, data sets), which may truly differ.

    `low` and `high` hold the mean over columns like these, of which the table has a few. `tau` is the standard
    deviation of the true effects between columns, 0 where the estimate of its square is negative; `equal_p` is the p of
    the F-test that all columns of the table have the same effect.
    """

    mean: float
    low: float
    high: float
    tau: float
    equal_p: float


def over_columns(values: np.ndarray) -> Optional[Summary]:
    """From the contrasts of one claim (seeds, columns); None below 2 seeds or 2 columns, and without spread.

    Columns share seeds, and may share training data, so that their errors are correlated. Columns and seeds are
    therefore crossed random effects: value = mean + column + seed + error. The mean's variance is (columns + seeds -
    error) / size in mean squares; `columns` and `seeds - error` each take the t of their own degrees of freedom
    (Banerjee 1960), and the interval is not narrower than that of the seeds' means. In
    benchmarks/results/simulated-tables.md it holds the true mean in 95.2 to 99.8 % of tables, the most with 2 columns
    of equal effects. Satterthwaite's degrees of freedom for the sum hold it in as few as 88 %, as few columns may agree
    by chance. The F-test finds a difference of equal columns in 4.5 to 6.0 % of tables.
    """
    if min(values.shape) < 2:
        return None
    n, k = values.shape
    seeds, columns, error = mean_squares(values)
    if error == 0:
        return None
    t_columns, t_seeds = stdtrit([k - 1, n - 1], (1 + LEVEL) / 2)
    square = max(t_seeds**2 * seeds, t_columns**2 * columns + t_seeds**2 * max(0.0, seeds - error))
    mean, half = float(values.mean()), math.sqrt(square / values.size)
    equal_p = float(fdtrc(k - 1, (n - 1) * (k - 1), columns / error))
    return Summary(mean, mean - half, mean + half, math.sqrt(max(0.0, columns - error) / n), equal_p)
