"""Power and seeds needed, against simulated tests."""

import math

import numpy as np
import pytest
from scipy import stats

from dropkey.reproduction import power


def test_seeds_needed_for_the_measured_deviation():
    """As computed before for 1.19 points: one claim, and the first of 4 under Holm."""
    assert [power.seeds_needed(effect, 1.19) for effect in (0.5, 1.0, 2.0)] == [47, 14, 6]
    assert [power.seeds_needed(effect, 1.19, 0.05 / 4) for effect in (0.5, 1.0, 2.0)] == [67, 19, 8]
    assert power.seeds_needed(0.01, 1.19) is None and power.seeds_needed(100.0, 1.19) == 3


@pytest.mark.parametrize("two_sided", [True, False])
def test_power_is_that_of_simulated_tests(two_sided):
    values = np.random.default_rng(1).normal(1, 1.19, (20_000, 8))
    found = stats.ttest_1samp(values, 0, axis=1, alternative="two-sided" if two_sided else "greater").pvalue <= 0.05
    expected = power.difference_power(8, 1.0, 1.19, two_sided=two_sided)
    assert found.mean() == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 20_000))
    assert power.difference_power(8, -1.0, 1.19, two_sided=two_sided) == expected


def test_power_without_an_effect_is_alpha_and_with_a_huge_one_is_certain():
    assert power.difference_power(6, 0.0, 1.0, 0.02) == pytest.approx(0.02)
    assert power.difference_power(1000, 5.0, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [3, 5, 15, 200])
def test_the_detectable_difference_has_the_power_asked_for(n):
    least = power.detectable(n, 1.19, 0.0125, 0.9)
    assert power.difference_power(n, least, 1.19, 0.0125) == pytest.approx(0.9)
    assert power.detectable(2, 1.19) is None


@pytest.mark.parametrize(("n", "margin"), [(4, 1.5), (8, 1.0), (20, 1.0), (20, 0.5)])
def test_power_of_equivalence_is_that_of_simulated_tests(n, margin):
    values = np.random.default_rng(2).normal(0, 1.19, (20_000, n))
    low = stats.ttest_1samp(values, -margin, axis=1, alternative="greater").pvalue
    high = stats.ttest_1samp(values, margin, axis=1, alternative="less").pvalue
    expected = power.equivalence_power(n, margin, 1.19)
    assert np.mean(np.maximum(low, high) <= 0.05) == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 20_000))


def test_seeds_needed_for_equivalence_are_the_fewest():
    n = power.equivalence_seeds(1.0, 1.19)
    assert power.equivalence_power(n, 1.0, 1.19) >= 0.8 > power.equivalence_power(n - 1, 1.0, 1.19)
    assert power.equivalence_seeds(0.01, 1.19) is None
