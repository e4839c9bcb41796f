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
    pooled_error,
    pooled_interval,
    random_effects,
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


def columns(random, k: int, n: int, tau: float) -> list[tuple[float, float, int]]:
    """k estimates, each over n seeds, of true effects around 1."""
    values = random.normal(0, 1, (k, n)) * np.linspace(0.5, 2, k)[:, None] + random.normal(1, tau, (k, 1))
    return [(one.mean(), one.std(ddof=1) / math.sqrt(n), n - 1) for one in values]


def test_the_test_of_one_common_effect_is_that_of_welch():
    values = np.random.default_rng(6).normal(0, 1, (4, 7)) * np.array([[1], [2], [3], [1]])
    found = random_effects([(one.mean(), one.std(ddof=1) / math.sqrt(7), 6) for one in values])
    assert found.q_p == pytest.approx(stats.f_oneway(*values, equal_var=False).pvalue)


def test_the_interval_over_columns_is_that_of_their_means():
    means = [0.1, 1.5, -0.6, 2.0]
    found = random_effects([(mean, 0.3, 14) for mean in means])
    theirs = stats.ttest_1samp(means, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(theirs))
    half = 3.1824 * np.std(means, ddof=1) * math.sqrt(1 + 1 / 4)
    assert found.predicted_high - found.mean == pytest.approx(half, rel=1e-4) == found.mean - found.predicted_low


def test_the_variance_between_columns_is_what_their_errors_leave():
    random = np.random.default_rng(7)
    found = random_effects(columns(random, 3000, 10, 0.5))
    assert found.tau == pytest.approx(0.5, abs=0.03)
    error = np.mean(np.linspace(0.5, 2, 3000) ** 2) / 10
    assert found.i_squared == pytest.approx(0.25 / (0.25 + error), abs=0.04)
    alike = random_effects([(1.0, 0.2, 9), (1.01, 0.2, 9), (0.99, 0.2, 9)])
    assert (alike.tau, alike.i_squared) == (0, 0) and alike.q_p > 0.99


def test_no_summary_over_columns():
    assert random_effects([]) is None and random_effects([(1.0, 0.2, 9)]) is None
    assert random_effects([(1.0, 0.2, 9)] * 3) is None  # no spread
    assert random_effects([(1.0, 0.2, 9), (1.2, 0.2, 9)]).predicted_low is None


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_intervals_over_columns_hold_their_level(tau):
    random = np.random.default_rng(8)
    found = [random_effects(columns(random, 3, 10, tau)) for _ in range(1000)]
    least = 0.95 - 2 * math.sqrt(0.05 * 0.95 / 1000)
    assert np.mean([one.low <= 1 <= one.high for one in found]) > least
    new = random.normal(1, tau, 1000)
    held = [one.predicted_low <= effect <= one.predicted_high for one, effect in zip(found, new, strict=True)]
    assert np.mean(held) > least


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
