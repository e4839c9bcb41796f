"""Statistics over a few seeds, against known quantiles, simulation and counting."""

import dataclasses
import itertools
import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dropkey.reproduction import statistics
from dropkey.reproduction.statistics import AGREES, DISAGREES, UNDECIDED

T_975 = (None, 12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646)  # Student's t by degrees of freedom
VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=8)


@given(VALUES)
def test_mean_deviation_and_interval_follow_their_formulas(values):
    found = statistics.estimate(values)
    deviation = np.std(values, ddof=1)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.deviation == pytest.approx(deviation, abs=1e-9)
    if deviation > 1e-6:
        half = T_975[len(values) - 1] * deviation / math.sqrt(len(values))
        assert found.high - found.low == pytest.approx(2 * half, rel=1e-3)
        assert (found.low + found.high) / 2 == pytest.approx(found.mean, abs=1e-6)


def test_the_deviation_is_the_samples_not_the_populations():
    assert statistics.estimate([1.0, 2.0, 3.0]).deviation == 1.0  # 0.82 with n in place of n - 1


def test_one_seed_has_no_interval_and_none_has_no_estimate():
    assert statistics.estimate([3.0]).low is None
    assert statistics.estimate([]) is None
    assert statistics.difference({0: 1.0}, {1: 1.0}) is None


def counted(pairs) -> float:
    """The sign-flip p by writing out all signs."""
    signs = itertools.product((1, -1), repeat=len(pairs))
    sums = [abs(math.fsum(map(operator.mul, one, pairs))) for one in signs]
    return sum(total >= abs(math.fsum(pairs)) - 1e-9 for total in sums) / len(sums)


@given(st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=9))
def test_the_sign_flip_p_counts_all_signs(pairs):
    assert statistics.sign_flip_p(pairs) == pytest.approx(counted(pairs))


def test_the_sign_flip_p_is_that_of_scipy():
    pairs = [0.4, 0.1, 0.3, -0.05, 0.2, 0.25]
    theirs = stats.permutation_test((np.array(pairs),), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert statistics.sign_flip_p(pairs) == pytest.approx(theirs)


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_that_n_seeds_can_reach(n, least):
    assert statistics.least_p(n) == least
    assert statistics.sign_flip_p([float(2**i) for i in range(n)]) == least


def test_pairs_are_made_by_seed_and_what_has_no_partner_is_left_out():
    found = statistics.difference({0: 1.0, 1: 5.0, 7: 9.0}, {1: 2.0, 0: 0.0, 3: 4.0})
    assert (found.n, found.mean) == (2, 2.0)


def test_pairing_takes_out_what_seeds_have_in_common():
    theirs = {0: 10.0, 1: 50.0, 2: 90.0}
    ours = {seed: value + 1 + 0.01 * seed for seed, value in theirs.items()}
    found = statistics.difference(ours, theirs)
    assert found.low > 0.9 and found.t_p < 0.001


@given(VALUES)
def test_the_t_test_has_p_below_five_percent_where_its_interval_excludes_zero(values):
    found = statistics.estimate(values)
    if found.deviation > 1e-6 and abs(found.low) > 1e-6 and abs(found.high) > 1e-6:
        assert (found.t_p < 0.05) == (found.low > 0 or found.high < 0)


def test_the_t_test_is_two_sided():
    pairs = np.array([-1.0, 0.0, 0.0, 0.0, 1.0])
    error = pairs.std(ddof=1) / math.sqrt(5)
    for sign in (1, -1):
        assert statistics.estimate((pairs + sign * 2.7764 * error).tolist()).t_p == pytest.approx(0.05, abs=1e-5)


def test_equal_values_have_no_deviation_and_certainty():
    assert statistics.estimate([0.3, 0.1 + 0.2]).deviation == 0
    assert statistics.estimate([2.0, 2.0, 2.0]).t_p == 0 and statistics.estimate([0.0, 0.0]).t_p == 1


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p(ps):
    adjusted = statistics.holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def verdict(pairs, adjusted, higher_is_better=True):
    found = statistics.difference(dict(enumerate(pairs)), dict.fromkeys(range(len(pairs)), 0.0))
    return statistics.verdict(dataclasses.replace(found, adjusted=adjusted), higher_is_better)


def test_verdicts():
    up, down = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9]
    assert verdict(up, 0.01) == AGREES and verdict(down, 0.01) == DISAGREES
    assert verdict(up, 0.01, higher_is_better=False) == DISAGREES
    assert verdict(down, 0.01, higher_is_better=False) == AGREES
    assert verdict(up, 0.05) == AGREES and verdict(up, 0.051) == UNDECIDED
    assert verdict([1.0], None) == UNDECIDED and statistics.verdict(None, True) == UNDECIDED


def test_under_the_null_five_percent_of_intervals_miss():
    """Coverage, by simulation: 95 % within two standard errors of the simulation."""
    draws = np.random.default_rng(0).normal(size=(1500, 4))
    missed = np.mean([not found.low <= 0 <= found.high for found in map(statistics.estimate, draws.tolist())])
    assert missed == pytest.approx(0.05, abs=2 * math.sqrt(0.05 * 0.95 / 1500))
