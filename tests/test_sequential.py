"""Looks and decisions: against published boundaries, exact levels, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from dropkey.errors import ConfigError
from dropkey.reproduction import sequential
from dropkey.reproduction.sequential import Decision, boundaries, check_looks, decide, sequential_p
from dropkey.reproduction.statistics import estimate, holm

EACH, FOUR, SEEDS = tuple(range(5, 21)), (5, 10, 15, 20), range(100, 120)


def p_at(values: np.ndarray, looks) -> np.ndarray:
    """(sample, look): two-sided p of the t-test on the first values of each sample (sample, value)."""
    return np.stack([stats.ttest_1samp(values[:, :n], 0, axis=1).pvalue for n in looks], axis=1)


def claim(*values: float) -> dict[int, float]:
    return dict(zip(SEEDS, values, strict=False))


def spread(mean: float, n: int = 20, deviation: float = 1.0) -> dict[int, float]:
    """Values around a mean, the same on both sides of it."""
    return claim(*(mean + deviation * (-1) ** i for i in range(n)))


# ------------------------------------------------------------------------------------------------- boundaries


def test_boundaries_for_many_seeds_are_those_of_lan_and_demets():
    """Five equal looks, two-sided 5 %, spent as by O'Brien and Fleming: the published z."""
    found = stats.norm.isf(np.array(boundaries((2000, 4000, 6000, 8000, 10000), 0.05)) / 2)
    assert found == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=2e-3)


@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_a_single_look_is_the_fixed_design(alpha):
    assert boundaries((15,), alpha) == pytest.approx((alpha,))
    assert sequential_p((15,), [0.02])[0] == pytest.approx(0.02)
    assert sequential_p((15,), [0.93], sides=1)[0] == pytest.approx(0.93)


@pytest.mark.parametrize(("looks", "alpha"), [(EACH, 0.05), (FOUR, 0.05), ((3, 4, 5), 0.05), (EACH, 0.3), (FOUR, 0.3)])
def test_alpha_is_spent_as_planned_at_every_look(looks, alpha):
    """With t-tests of normal values: within 3 standard errors of 60,000 simulated claims."""
    values = np.random.default_rng(1).standard_normal((60_000, looks[-1]))
    stopped = np.logical_or.accumulate(p_at(values, looks) <= boundaries(looks, alpha), axis=1).mean(axis=0)
    spent = 4 * stats.norm.sf(stats.norm.isf(alpha / 4) / np.sqrt(np.array(looks) / looks[-1]))
    assert np.all(np.abs(stopped - spent) <= 3 * np.sqrt(spent / len(values)) + 2 / len(values))


def test_boundaries_for_known_variances_would_find_too_much():
    """Why the chain of t is followed: they are too lax for few seeds."""
    known = boundaries(tuple(1000 * n for n in EACH), 0.05)
    assert all(ours < theirs for ours, theirs in zip(boundaries(EACH, 0.05)[1:], known[1:], strict=True))
    values = np.random.default_rng(1).standard_normal((60_000, 20))
    assert np.mean((p_at(values, EACH) <= known).any(axis=1)) > 0.053


@pytest.fixture
def fresh():
    """Nothing computed before or left after."""
    for cached in (boundaries, sequential.transition):
        cached.cache_clear()
    yield
    for cached in (boundaries, sequential.transition):
        cached.cache_clear()


def test_both_ways_to_follow_the_chain_agree_where_they_meet(fresh, monkeypatch):
    looks = (60, 65, 70)
    simple = boundaries(looks, 0.05)
    boundaries.cache_clear(), sequential.transition.cache_clear()
    monkeypatch.setattr(sequential, "LARGE", 100)
    assert simple == pytest.approx(boundaries(looks, 0.05), rel=0.02)


@pytest.mark.parametrize("looks", [EACH, FOUR, (3, 20), (10, 60)])
def test_a_larger_alpha_never_has_a_stricter_boundary(looks):
    """Or p-values over looks, and Holm's correction of them, would mean nothing."""
    levels = np.array([boundaries(looks, alpha) for alpha in np.geomspace(1e-5, 0.5, 12)])
    assert np.all(np.diff(levels, axis=0) > 0)


@pytest.mark.parametrize("looks", [(), (2, 5), (5, 5), (10, 5), (3.5,), (5, 10.0), ("5", "10"), "5", 5, None])
def test_looks_that_cannot_be(looks):
    for function in (check_looks, boundaries, lambda looks: decide([], SEEDS, 0, looks)):
        with pytest.raises(ConfigError, match=r"^looks=.* must be rising whole numbers"):
            function(looks)


# ------------------------------------------------------------------------------------------------- p over looks


@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.0125, 0.001])
def test_a_p_at_its_boundary_is_alpha(alpha):
    for look, level in enumerate(boundaries(EACH, alpha)):
        p, best = sequential_p(EACH, [1.0] * look + [level])
        assert p == pytest.approx(alpha, rel=0.01) and best == look
        half = level / 2
        assert sequential_p(EACH, [1.0] * look + [half], sides=1)[0] == pytest.approx(alpha / 2, rel=0.01)


def test_a_p_over_looks_never_rises_and_is_never_below_the_least():
    ps = [0.5, 0.003, 0.2, 0.04]
    found, best = zip(*(sequential_p(FOUR, ps[: k + 1]) for k in range(4)), strict=True)
    assert list(found) == sorted(found, reverse=True) and found[1] > 0.003 and best == (0, 1, 1, 3)
    assert sequential_p(FOUR, [None, None]) == (None, None)
    assert sequential_p(FOUR, [None, 0.003]) == (found[1], 1)


# ------------------------------------------------------------------------------------------------- decisions


def test_nothing_is_decided_before_the_first_look():
    assert decide([spread(9.0)], SEEDS, 14, (15,)) == [Decision()]
    assert decide([spread(9.0)], SEEDS, 15, (15,))[0].sign == 1


def test_the_fixed_design_is_the_t_test_on_the_planned_seeds_with_holm():
    random = np.random.default_rng(3)
    claims = [claim(*(mean + random.standard_normal(20)).tolist()) for mean in (0.0, 0.6, -1.5)]
    found = decide(claims, SEEDS, 20, (15,))
    own = [estimate(list(one.values())[:15]) for one in claims]
    assert [one.p for one in found] == pytest.approx(holm([one.p for one in own]))
    assert [one.sign for one in found] == [0, 1, -1]
    for one, theirs in zip(found, own, strict=True):
        assert (one.look, one.estimate.n, one.estimate.mean) == (15, 15, theirs.mean)
        assert (one.estimate.low, one.estimate.high) == pytest.approx((theirs.low, theirs.high))


def test_a_seed_without_a_value_leaves_its_place_empty():
    lost = {seed: value for seed, value in spread(9.0).items() if seed not in (101, 103)}
    found = decide([lost], SEEDS, 7, FOUR)[0]
    assert (found.look, found.estimate.n) == (5, 3)  # and no later seed comes in


def test_seeds_enter_in_their_planned_order():
    values = {**spread(9.0, 15), 7: -100.0}
    assert decide([values], [7, *SEEDS], 15, (15,))[0].estimate.mean < 3


def test_a_planned_claim_without_values_counts_for_the_others():
    one = claim(*np.random.default_rng(0).normal(0.6, 1, 15))
    alone, beside = decide([one], SEEDS, 15, (15,))[0], decide([one, {}, {}], SEEDS, 15, (15,))[0]
    assert beside.p == pytest.approx(3 * alone.p)
    assert decide([{}], SEEDS, 15, (15,))[0] == Decision(look=15)


@pytest.mark.parametrize("same", [claim(1.0, 1.0), claim(*[0.3] * 20), claim(*[0.0] * 20)])
def test_no_spread_decides_nothing(same):
    found = decide([same], SEEDS, 20, (20,), margin=1.0)[0]
    assert found == Decision(look=20, estimate=found.estimate)


def test_a_decision_stands_whatever_comes_later():
    values = claim(*(5.0 + 0.1 * (-1) ** i for i in range(10)), *(-50.0 + i for i in range(10)))
    early, late = (decide([values], SEEDS, over, FOUR)[0] for over in (10, 20))
    assert (early.sign, early.decided_at) == (1, 5)
    assert (late.sign, late.decided_at, late.look) == (1, 5, 20)
    assert late.estimate.mean < 0 and late.p <= early.p


def test_a_sequential_design_decides_a_large_difference_early_and_none_never():
    found = decide([spread(3.0), spread(0.0)], SEEDS, 20, EACH)
    assert found[0].sign == 1 and found[0].decided_at < 12
    assert found[1].sign == 0 and found[1].decided_at is None


def test_a_rejected_claim_passes_its_alpha_on():
    """Beside a clear claim, the other has all of alpha, as under Holm; beside an unclear one, half."""
    one = claim(*np.random.default_rng(0).normal(0.6, 1, 20))
    alone = decide([one], SEEDS, 20, FOUR)[0].p
    assert decide([one, spread(9.0)], SEEDS, 20, FOUR)[0].p == pytest.approx(alone)
    assert decide([one, spread(0.0)], SEEDS, 20, FOUR)[0].p == pytest.approx(2 * alone)


def test_the_sign_is_that_of_the_look_whose_test_decided():
    """A claim is above 0 at the first look, where Holm keeps it back, and below at the second, where it comes free."""
    turning = {**spread(1.15, 10), **dict.fromkeys(SEEDS[10:15], -4.0)}
    early, late = (decide([turning, spread(1.1, 15)], SEEDS, over, (10, 15)) for over in (10, 15))
    assert [one.sign for one in early] == [0, 0] and [one.sign for one in late] == [1, 1]
    assert late[0].decided_at == 15 and late[0].estimate.mean < 0


@pytest.mark.parametrize(
    ("mean", "margin", "sign", "within"),
    [
        (0.0, 1.0, 0, True),
        (0.0, None, 0, False),
        (0.0, 0.2, 0, False),
        (0.7, 1.5, 1, True),
        (-0.7, 1.5, -1, True),
        (2.0, 1.5, 1, False),
    ],
)
def test_decisions_with_a_margin(mean, margin, sign, within):
    for looks in ((20,), EACH):
        found = decide([spread(mean)], SEEDS, 20, looks, margin)[0]
        assert (found.sign, found.within) == (sign, within)
        assert (found.decided_at is None) == (sign == 0 and not within)


def test_equivalence_is_the_two_one_sided_tests_at_alpha():
    values = np.random.default_rng(5).normal(0.2, 1, 15)
    found = decide([claim(*values)], SEEDS, 15, (15,), margin=0.9)[0]
    low = stats.ttest_1samp(values, -0.9, alternative="greater").pvalue
    high = stats.ttest_1samp(values, 0.9, alternative="less").pvalue
    assert found.equivalence_p == pytest.approx(max(low, high))


def test_intervals_over_looks_hold_at_all_looks_together():
    """In 95 % of 1,000 claims the truth is in every interval of theirs, within 2 standard errors."""
    values = np.random.default_rng(6).standard_normal((1000, 20))
    levels = boundaries(FOUR, 0.05)
    ever = np.zeros(len(values), bool)
    for i, sample in enumerate(values.tolist()):
        for n, level in zip(FOUR, levels, strict=True):
            found = estimate(sample[:n], 1 - level)
            ever[i] |= not found.low <= 0 <= found.high
    assert ever.mean() == pytest.approx(0.05, abs=2 * math.sqrt(0.05 * 0.95 / 1000))
    last = decide([claim(*values[0])], SEEDS, 10, FOUR)[0].estimate
    assert (last.low, last.high) == pytest.approx(
        (estimate(values[0, :10], 1 - levels[1]).low, estimate(values[0, :10], 1 - levels[1]).high)
    )


@pytest.mark.parametrize(("looks", "most"), [((15,), 0.05), (FOUR, 0.05)])
def test_four_claims_with_one_baseline_have_at_most_five_percent_false_findings(looks, most):
    """`decide` itself on 400 tables without any effect; benchmarks/simulate_tables.py has 10,000 and more designs."""
    random, wrong = np.random.default_rng(7), 0
    for _ in range(400):
        rows = random.standard_normal((5, 20))
        table = [claim(*(row - rows[0]).tolist()) for row in rows[1:]]
        wrong += any(one.sign for one in decide(table, SEEDS, 20, looks))
    assert wrong / 400 <= most + 2 * math.sqrt(most * (1 - most) / 400)


def test_fewer_seeds_than_looks_need():
    with pytest.raises(ConfigError, match="20 seeds are planned"):
        decide([], SEEDS, 0, (25,))
