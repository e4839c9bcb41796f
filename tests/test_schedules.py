"""The drop ratio over depth: end points, straight lines, mirror images and refusals."""

from itertools import pairwise

import pytest

from dropkey.config import schema
from dropkey.schedules import ratios

DEPTHS = pytest.mark.parametrize("layers", [1, 2, 3, 12, 14, 24])


@DEPTHS
def test_constant_gives_every_layer_the_peak(layers):
    assert ratios("constant", 0.3, 0.1, layers) == [0.3] * layers


@DEPTHS
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_decreasing_is_the_formula_of_the_docstring(layers, end):
    wanted = [0.3 + (end - 0.3) * layer / max(layers - 1, 1) for layer in range(layers)]
    assert ratios("decreasing", 0.3, end, layers) == pytest.approx(wanted, abs=1e-15)


@DEPTHS
@pytest.mark.parametrize("end", [0.0, 0.05, 0.3])
def test_increasing_is_the_mirror_image_of_decreasing(layers, end):
    assert ratios("increasing", 0.3, end, layers) == ratios("decreasing", 0.3, end, layers)[::-1]


@pytest.mark.parametrize("layers", [2, 12, 14, 24])
@pytest.mark.parametrize("peak", [0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_end_points_are_exact(layers, peak, end):
    falling = ratios("decreasing", peak, end, layers)
    assert (falling[0], falling[-1]) == (peak, end)


@pytest.mark.parametrize("schedule", ["decreasing", "increasing"])
def test_steps_between_layers_are_equal(schedule):
    values = ratios(schedule, 0.3, 0.02, 19)
    steps = [after - before for before, after in pairwise(values)]
    assert steps == pytest.approx([steps[0]] * 18, abs=1e-15)


@pytest.mark.parametrize("schedule", ["decreasing", "increasing"])
def test_a_ramp_to_zero_has_half_the_mean_of_a_constant(schedule):
    assert sum(ratios(schedule, 0.3, 0.0, 14)) == pytest.approx(sum(ratios("constant", 0.3, 0.0, 14)) / 2)


@pytest.mark.parametrize("schedule", schema.SCHEDULES)
def test_a_single_layer_takes_the_peak(schedule):
    assert ratios(schedule, 0.3, 0.0, 1) == [0.3]


@pytest.mark.parametrize("schedule", schema.SCHEDULES)
@pytest.mark.parametrize("peak", [0.0, 0.999])
def test_every_ratio_is_a_probability_below_one(schedule, peak):
    assert all(0 <= ratio < 1 for ratio in ratios(schedule, peak, 0.0, 24))


@pytest.mark.parametrize("schedule", schema.SCHEDULES)
@pytest.mark.parametrize(("peak", "end"), [(1.0, 0.0), (-0.1, 0.0), (0.3, 1.0), (0.3, -0.1), (float("nan"), 0.0)])
def test_ratios_outside_zero_to_one_are_refused(schedule, peak, end):
    with pytest.raises(ValueError, match="ratios lie in"):
        ratios(schedule, peak, end, 12)


@pytest.mark.parametrize("layers", [1, 12])
def test_an_unknown_schedule_is_refused_with_the_known_ones(layers):
    with pytest.raises(ValueError, match="no schedule 'cosine'; choose from constant, decreasing, increasing"):
        ratios("cosine", 0.3, 0.0, layers)
