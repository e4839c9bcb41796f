"""Statistics over seeds, against known quantiles, scipy, simulation and counting."""

import itertools
import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dropkey.reproduction import statistics
from dropkey.reproduction.statistics import (
    contrast,
    difference,
    equivalence_p,
    estimate,
    holm,
    over_columns,
    pooled_error,
    pooled_interval,
    sampling_error,
    sign_flip_p,
)

T_975 = (None, 12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)  # Student's t by degrees of freedom
VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=8)


@given(VALUES)
def test_mean_deviation_and_interval_follow_their_formulas(values):
    found = estimate(values)
    deviation = np.std(values, ddof=1)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.deviation == pytest.approx(deviation, abs=1e-9)
    if deviation > 1e-6 and found.n > 2:
        half = T_975[len(values) - 1] * deviation / math.sqrt(len(values))
        assert found.high - found.low == pytest.approx(2 * half, rel=1e-3)
        assert (found.low + found.high) / 2 == pytest.approx(found.mean, abs=1e-6)


def test_the_deviation_is_the_samples_not_the_populations():
    assert estimate([1.0, 2.0, 3.0]).deviation == 1.0  # 0.82 with n in place of n - 1


def test_the_interval_has_the_level_asked_for():
    values = [0.3, 1.2, -0.4, 0.9]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert (estimate(values, 0.8).low, estimate(values, 0.8).high) == pytest.approx(tuple(theirs))


@pytest.mark.parametrize(
    "values", [[3.0], [1.0, 1.0], [1.0, 1.2], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [0.3, 0.1 + 0.2] * 2]
)
def test_fewer_than_three_seeds_and_no_spread_decide_nothing(values):
    found = contrast(dict(enumerate(values)))
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.mean == pytest.approx(values[0], abs=0.2)
    assert equivalence_p(values, 5.0) is None


def test_no_seeds_have_no_estimate():
    assert estimate([]) is None and contrast({}) is None and equivalence_p([], 1.0) is None
    assert difference({0: 1.0}, {1: 1.0}) is None


def counted(pairs) -> float:
    """The sign-flip p by writing out all signs."""
    signs = itertools.product((1, -1), repeat=len(pairs))
    sums = [abs(math.fsum(map(operator.mul, one, pairs))) for one in signs]
    return sum(total >= abs(math.fsum(pairs)) - 1e-9 for total in sums) / len(sums)


@given(st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=9))
def test_the_sign_flip_p_counts_all_signs(pairs):
    assert sign_flip_p(pairs) == pytest.approx(counted(pairs))


def test_the_sign_flip_p_is_that_of_scipy():
    pairs = [0.4, 0.1, 0.3, -0.05, 0.2, 0.25]
    theirs = stats.permutation_test((np.array(pairs),), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(pairs) == pytest.approx(theirs)


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_that_n_seeds_can_reach(n, least):
    assert statistics.least_p(n) == least
    assert sign_flip_p([float(2**i) for i in range(n)]) == least


def test_twenty_seeds_flip_exactly_and_more_are_sampled():
    values = np.random.default_rng(0).normal(0.5, 1, 21)
    exact = np.array([0.0])
    for value in values[:20]:
        exact = np.concatenate([exact + value, exact - value])
    assert sign_flip_p(values[:20]) == pytest.approx(np.mean(np.abs(exact) >= abs(values[:20].sum()) - 1e-9))
    all_signs = (np.abs(np.concatenate([exact + values[20], exact - values[20]])) >= abs(values.sum()) - 1e-9).mean()
    sampled = sign_flip_p(values)
    assert sampled == pytest.approx(all_signs, abs=4 * math.sqrt(all_signs / 1e5)) and sampled != all_signs
    assert sampled == sign_flip_p(values)  # and the same each time


def test_a_sampled_sign_flip_p_is_never_zero():
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / 100_001) == statistics.least_p(40)


def test_pairs_are_made_by_seed_and_what_has_no_partner_is_left_out():
    found = difference({0: 1.0, 1: 5.0, 7: 9.0}, {1: 2.0, 0: 0.0, 3: 4.0})
    assert (found.n, found.mean) == (2, 2.0)


def test_pairing_takes_out_what_seeds_have_in_common():
    theirs = {0: 10.0, 1: 50.0, 2: 90.0}
    ours = {seed: value + 1 + 0.01 * seed for seed, value in theirs.items()}
    found = difference(ours, theirs)
    assert found.low > 0.9 and found.p < 0.001


@given(VALUES)
def test_the_t_test_has_p_below_five_percent_where_its_interval_excludes_zero(values):
    found = estimate(values)
    if found.p is not None and found.deviation > 1e-6 and abs(found.low) > 1e-6 and abs(found.high) > 1e-6:
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_the_t_test_is_two_sided():
    pairs = np.array([-1.0, 0.0, 0.0, 0.0, 1.0])
    error = pairs.std(ddof=1) / math.sqrt(5)
    for sign in (1, -1):
        assert estimate((pairs + sign * 2.7764 * error).tolist()).p == pytest.approx(0.05, abs=1e-5)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_planned_test_that_could_not_be_made_counts_for_holm():
    assert holm([0.01, None, 0.03]) == pytest.approx([0.03, None, 0.06])
    assert holm([None, None]) == [None, None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p(ps):
    adjusted = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_under_the_null_five_percent_of_intervals_miss():
    """Coverage, by simulation: 95 % within two standard errors of the simulation."""
    draws = np.random.default_rng(0).normal(size=(1500, 4))
    missed = np.mean([not found.low <= 0 <= found.high for found in map(estimate, draws.tolist())])
    assert missed == pytest.approx(0.05, abs=2 * math.sqrt(0.05 * 0.95 / 1500))


# ------------------------------------------------------------------------------------------------- equivalence


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=8), st.floats(0.1, 3))
def test_equivalence_is_the_larger_of_two_one_sided_tests(values, margin):
    if np.std(values) > 1e-3:
        low = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        high = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert equivalence_p(values, margin) == pytest.approx(max(low, high))


# ------------------------------------------------------------------------------------------- more than one contrast


def simulated_rows(random, rows: int, seeds: int, of_seed: float, error: float) -> dict[str, dict[int, float]]:
    values = random.normal(0, error, (rows, seeds)) + random.normal(0, of_seed, seeds) + 10 * np.arange(rows)[:, None]
    return {str(row): dict(enumerate(one.tolist())) for row, one in enumerate(values)}


def test_the_pooled_error_of_two_rows_is_that_of_their_differences():
    rows = simulated_rows(np.random.default_rng(3), 2, 8, 1.0, 1.0)
    pooled, paired = pooled_error(rows), difference(rows["1"], rows["0"])
    assert pooled.df == 7
    assert pooled.deviation * math.sqrt(2) == pytest.approx(paired.deviation)
    assert pooled_interval(paired.mean, 2, 8, pooled) == pytest.approx((paired.low, paired.high, paired.p))


def test_the_pooled_error_is_that_of_a_linear_model():
    """Least squares on rows and seeds as indicators; a seed that a row lacks is left out."""
    rows = simulated_rows(np.random.default_rng(4), 4, 6, 1.0, 0.5)
    values = np.array([[one[seed] for seed in range(5)] for one in rows.values()])
    del rows["2"][5]
    design = np.array([[*np.eye(4)[row], *np.eye(5)[seed]] for row in range(4) for seed in range(5)])
    squares = np.sum((values.ravel() - design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]) ** 2)
    assert pooled_error(rows).df == 12
    assert pooled_error(rows).deviation == pytest.approx(math.sqrt(squares / 12))


@pytest.mark.parametrize(("of_seed", "share"), [(2.0, 0.8), (1.0, 0.5), (0.0, 0.0)])
def test_the_share_of_the_seed_is_found(of_seed, share):
    found = pooled_error(simulated_rows(np.random.default_rng(5), 4, 3000, of_seed, 1.0))
    assert found.seed_share == pytest.approx(share, abs=0.03)
    assert found.deviation == pytest.approx(1.0, abs=0.03)


def test_no_pooled_error():
    assert pooled_error({}) is None and pooled_error({"a": {0: 1.0, 1: 2.0}}) is None
    assert pooled_error({"a": {0: 1.0, 1: 2.0}, "b": {1: 1.0, 2: 2.0}}) is None
    assert pooled_error({"a": {0: 1.1, 1: 2.3}, "b": {0: 2.1, 1: 3.3}}) is None  # no spread


def columns(random, n: int, k: int, tau: float, shared: float) -> np.ndarray:
    """Contrasts (seed, column) around 1; errors of a seed are correlated, and unlike in size."""
    errors = math.sqrt(shared) * random.standard_normal((n, 1)) + math.sqrt(1 - shared) * random.standard_normal((n, k))
    return random.normal(1, tau, k) + np.linspace(0.6, 1.2, k) * errors


def test_the_test_of_equal_columns_compares_linear_models():
    """Least squares on seeds and columns against seeds alone."""
    values = columns(np.random.default_rng(7), 6, 4, 0.5, 0.3)
    seeds, both = (
        np.repeat(np.eye(6), 4, axis=0),
        np.hstack([np.repeat(np.eye(6), 4, axis=0), np.tile(np.eye(4), (6, 1))]),
    )
    small, large = (
        np.sum((values.ravel() - x @ np.linalg.lstsq(x, values.ravel(), rcond=None)[0]) ** 2) for x in (both, seeds)
    )
    found = over_columns(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.equal_p == pytest.approx(stats.f.sf((large - small) / 3 / (small / 15), 3, 15))


def test_the_variance_between_columns_is_what_their_errors_leave():
    random = np.random.default_rng(8)
    assert over_columns(columns(random, 10, 3000, 0.5, 0.4)).tau == pytest.approx(0.5, abs=0.03)
    alike = random.standard_normal((5, 3))
    found = over_columns(alike - alike.mean(axis=0))
    assert found.tau == 0 and found.equal_p == pytest.approx(1)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 6), (5, 5), (15, 2)])
def test_the_interval_over_columns_is_not_narrower_than_that_of_their_means_or_of_the_seeds(n, k):
    random = np.random.default_rng(9)
    for tau, shared in itertools.product((0.0, 1.0), (0.0, 0.9)):
        values = columns(random, n, k, tau, shared)
        found = over_columns(values)
        for axis in (0, 1):
            theirs = stats.ttest_1samp(values.mean(axis=axis), 0).confidence_interval()
            assert found.low <= theirs.low + 1e-12 and found.high >= theirs.high - 1e-12


def test_with_many_columns_and_seeds_the_interval_is_that_of_the_known_variance():
    found = over_columns(columns(np.random.default_rng(11), 600, 400, 0.5, 0.4))
    truth = 0.25 / 400 + 0.4 * 0.9**2 / 600  # 0.9: mean deviation of the columns; their own errors add nothing here
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(truth), rel=0.05)


@pytest.mark.parametrize("shared", [0.0, 0.6])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_intervals_over_columns_hold_their_level_whether_or_not_columns_share_errors(tau, shared):
    """Within 2 standard errors of 1,000 tables. Columns taken as independent: 85 % at correlation 0.6."""
    random = np.random.default_rng(10)
    found = [over_columns(columns(random, 15, 3, tau, shared)) for _ in range(1000)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) > 0.95 - 2 * math.sqrt(0.05 * 0.95 / 1000)
    if tau == 0:
        wrong = np.mean([one.equal_p <= 0.05 for one in found])
        assert wrong == pytest.approx(0.055, abs=0.005 + 2 * math.sqrt(0.05 * 0.95 / 1000))


def test_no_summary_over_columns():
    values = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, 5.5]])
    assert over_columns(values) is not None
    assert over_columns(values[:1]) is None and over_columns(values[:, :1]) is None
    assert over_columns(np.empty((0, 3))) is None and over_columns(np.empty(0)) is None
    assert over_columns(np.array([[1.1, 2.3], [2.1, 3.3], [0.1, 1.3]])) is None  # no spread


def test_the_sampling_error_is_that_of_repeated_studies():
    """Means over new seeds, new images and both; squared errors have no bias, within 5 %."""
    random, seeds, images = np.random.default_rng(9), 8, 30
    found, means = [], []
    for _ in range(3000):
        values = (
            random.normal(0, 0.1, (seeds, 1)) + random.normal(0, 0.3, images) + random.normal(0, 0.6, (seeds, images))
        )
        means.append(values.mean())
        found.append(sampling_error(values))
    truth = 0.1**2 / seeds + 0.3**2 / images + 0.6**2 / (seeds * images)
    assert np.var(means) == pytest.approx(truth, rel=0.08)
    assert np.mean([one.both**2 for one in found]) == pytest.approx(truth, rel=0.05)


def test_the_simple_sampling_errors_are_those_of_means():
    values = np.random.default_rng(10).integers(-1, 2, (5, 40))
    found = sampling_error(values)
    assert found.seeds == pytest.approx(stats.sem(values.mean(axis=1)))
    assert found.samples == pytest.approx(stats.sem(values.mean(axis=0)))
    assert found.both >= max(found.seeds, found.samples)
    assert sampling_error(values[:1]) is None
