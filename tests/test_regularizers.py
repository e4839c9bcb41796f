"""What each regularizer drops, how much of it, how independently, and what the mask does to the weights."""

import math
from fractions import Fraction

import pytest
import torch

from dropkey import bernoulli, regularizers
from dropkey.config import schema
from dropkey.regularizers import FULL, REGULARIZERS, STRUCTURED, draw_mask, window_cells

UNSTRUCTURED = [regularizer for regularizer in REGULARIZERS if regularizer not in STRUCTURED]
WINDOWS = [("dropkey_block", 3), ("dropkey_block", 5), ("dropkey_block", 7)]
WINDOWS += [("dropkey_cross", 3), ("dropkey_cross", 5), ("dropkey_cross", 7), ("dropkey_cross", "full")]
WINDOWS += [("dropkey_block_column", 3), ("dropkey_cross_column", 5), ("dropkey_cross_column", "full")]
REGULARIZER_AND_WINDOW = [(regularizer, None) for regularizer in UNSTRUCTURED] + WINDOWS
GRIDS = [(4, 4), (8, 8), (14, 14), (6, 10)]
SHAPE = (64, 8, 12, 16)
SHARED = [regularizer for regularizer in REGULARIZERS if regularizer.endswith("_column")]  # one mask for all queries


def mask_of(regularizer, window, ratio, shape=SHAPE, grid=(4, 4), num_prefix=0):
    layout = {"grid": grid, "num_prefix": num_prefix, "window": window} if regularizer in STRUCTURED else {}
    return draw_mask(regularizer, shape, ratio, **layout)


def seed_probability(regularizer, grid, window, ratio):
    size = FULL if window == "full" else window
    ratio = torch.tensor(ratio, dtype=torch.float64)
    return regularizers.seed_probability(regularizer.startswith("dropkey_block"), grid, size, ratio).item()


def covers(regularizer, grid, window):
    """K x K, True where a seed at the row's cell drops the column's cell: straight from the definition."""
    height, width = grid
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    half = max(grid) if window == "full" else (window - 1) // 2
    if regularizer.startswith("dropkey_block"):
        return (down <= half) & (across <= half)
    return ((down == 0) & (across <= half)) | ((across == 0) & (down <= half))


def test_the_regularizers_are_those_of_the_config():
    assert {"none", *REGULARIZERS} == set(schema.REGULARIZER_NAMES)


# ---- how much is dropped


@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("regularizer", UNSTRUCTURED)
def test_realised_ratio(regularizer, ratio):
    mask = draw_mask(regularizer, (256, 12, 1 if regularizer in SHARED else 20, 65), ratio)
    error = math.sqrt(ratio * (1 - ratio) / mask.numel())
    assert abs(mask.double().mean().item() - ratio) < 4 * error


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("regularizer", "window"), WINDOWS)
def test_realised_ratio_of_structured_regularizers_is_within_one_percent(regularizer, window, grid):
    keys = grid[0] * grid[1]
    rows = 4_000_000 // keys
    shape = (rows // 16, 16, 1, keys) if regularizer in SHARED else (16, 16, rows // 256, keys)
    mask = mask_of(regularizer, window, 0.3, shape, grid)
    assert mask.double().mean().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 9)], ids=str)
@pytest.mark.parametrize(("regularizer", "window"), WINDOWS)
def test_expected_ratio_of_structured_regularizers_is_the_asked_one(regularizer, window, grid, ratio):
    seeds_that_reach = covers(regularizer, grid, window).sum(0).double()
    g = seed_probability(regularizer, grid, window, ratio)
    assert (1 - (1 - g) ** seeds_that_reach).mean().item() == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("ratio", [1e-9, 1e-4, 0.99, 0.9999])
@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_seed_probabilities_reach_from_zero_to_one(regularizer, ratio):
    seeds_that_reach = covers(regularizer, (8, 8), 3).sum(0).double()
    g = seed_probability(regularizer, (8, 8), 3, ratio)
    realised = -torch.expm1(seeds_that_reach * math.log1p(-g)).mean().item()
    assert realised == pytest.approx(ratio, rel=1e-4)
    assert 1 - realised == pytest.approx(1 - ratio, rel=1e-4)


# For a mean ratio of 0.3, by bisection over the number of seed positions that reach each cell.
@pytest.mark.parametrize(
    ("regularizer", "grid", "published"),
    [
        ("dropkey_block", (14, 14), {3: ".0430", 5: ".0171", 7: ".00953"}),
        ("dropkey_cross", (14, 14), {3: ".0730", 5: ".0430", 7: ".0312"}),
        ("dropkey_block", (8, 8), {3: ".0465", 5: ".0198", 7: ".0119"}),
        ("dropkey_cross", (8, 8), {3: ".0764", 5: ".0466", 7: ".0352"}),
    ],
)
def test_seed_probabilities_are_the_published_ones(regularizer, grid, published):
    for window, digits in published.items():
        assert f"{seed_probability(regularizer, grid, window, 0.3):.{len(digits) - 1}f}" == f"0{digits}"


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_a_window_of_one_cell_drops_single_keys(regularizer):
    assert seed_probability(regularizer, (8, 8), 1, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize(("regularizer", "window"), WINDOWS)
def test_prefix_tokens_are_dropped_with_the_ratio_like_the_grid(regularizer, window, num_prefix):
    rows = (3840, 16, 1) if regularizer in SHARED else (64, 16, 60)
    mask = mask_of(regularizer, window, 0.3, (*rows, num_prefix + 60), (6, 10), num_prefix).double()
    assert mask[..., :num_prefix].mean().item() == pytest.approx(0.3, rel=0.02)
    assert mask[..., num_prefix:].mean().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_each_prefix_token_is_dropped_by_itself(regularizer):
    mask = mask_of(regularizer, 3, 0.3, (960, 16, 4, 18), (4, 4), 2).double().flatten(0, 2)
    correlation = torch.corrcoef(mask.T)[:2]  # of the prefix tokens with every key
    correlation[0, 0] = correlation[1, 1] = 0
    assert correlation.abs().max() < 5 / math.sqrt(len(mask))


# ---- which keys are dropped together


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(4, 4), (6, 10), (1, 9)], ids=str)
@pytest.mark.parametrize(("regularizer", "window"), [*WINDOWS, ("dropkey_block", 1), ("dropkey_cross", 99)])
def test_masks_are_windows_around_the_seeds(monkeypatch, regularizer, window, grid, num_prefix):
    queries = 1 if regularizer in SHARED else 5
    seeds, prefix = torch.rand(2, 3, queries, *grid) < 0.06, torch.rand(2, 3, queries, num_prefix) < 0.3

    def given(seed, threshold, rows, columns, first_column=0, first_row=0):
        return prefix.view(rows, -1) if first_column else seeds.view(rows, columns)

    monkeypatch.setattr(bernoulli, "draw", given)
    keys = grid[0] * grid[1]
    mask = mask_of(regularizer, window, 0.3, (2, 3, 5, num_prefix + keys), grid, num_prefix)
    dilated = seeds.flatten(-2).double() @ covers(regularizer, grid, window).double() > 0
    assert torch.equal(mask, torch.cat([prefix, dilated], dim=-1))


@pytest.mark.parametrize(("regularizer", "window"), WINDOWS)
def test_masks_do_not_depend_on_the_size_of_the_pieces(monkeypatch, regularizer, window):
    whole = draw_mask(regularizer, SHAPE, 0.3, seed=3, grid=(3, 5), num_prefix=1, window=window)
    monkeypatch.setattr(bernoulli, "CHUNK", 700)
    assert torch.equal(draw_mask(regularizer, SHAPE, 0.3, seed=3, grid=(3, 5), num_prefix=1, window=window), whole)


@pytest.mark.parametrize("regularizer", SHARED)
def test_column_shares_one_draw_over_queries(regularizer):
    assert mask_of(regularizer, 3, 0.3).shape == (64, 8, 1, 16)


@pytest.mark.parametrize("regularizer", SHARED)
def test_a_shared_mask_is_that_of_a_single_query(regularizer):
    layout = {"grid": (4, 4), "window": 3} if regularizer in STRUCTURED else {}
    alone = draw_mask(regularizer.removesuffix("_column"), (64, 8, 1, 16), 0.3, seed=4, **layout)
    assert torch.equal(draw_mask(regularizer, SHAPE, 0.3, seed=4, **layout), alone)


@pytest.mark.parametrize("regularizer", [regularizer for regularizer in REGULARIZERS if regularizer not in SHARED])
def test_other_regularizers_draw_for_every_query(regularizer):
    assert mask_of(regularizer, 3 if regularizer in STRUCTURED else None, 0.3).shape == SHAPE


@pytest.mark.parametrize(("regularizer", "window"), REGULARIZER_AND_WINDOW)
def test_masks_are_boolean(regularizer, window):
    assert mask_of(regularizer, window, 0.3).dtype == torch.bool


AXES = ("sample", "head", "query", "key")
DEPENDENT = {regularizer: {"key"} for regularizer in STRUCTURED}  # by definition, as are the queries that share a mask


@pytest.mark.parametrize(
    ("regularizer", "window", "axis"),
    [
        (regularizer, window, axis)
        for regularizer, window in REGULARIZER_AND_WINDOW
        for axis in AXES
        if axis not in DEPENDENT.get(regularizer, ()) and (axis != "query" or regularizer not in SHARED)
    ],
)
def test_draws_are_independent(regularizer, window, axis):
    """Same key, next sample (head, query), or next key: both are dropped as often as chance has it."""
    dim = AXES.index(axis)
    mask = mask_of(regularizer, window, 0.3, (96, 16, 1 if regularizer in SHARED else 24, 16)).double()
    centred = mask - mask.mean((0, 1, 2), keepdim=True)  # per key: on the border of a grid fewer seeds reach
    for lag in (1, 2, 4):
        product = centred * centred.roll(lag, dim)
        per_row = product.mean(-1).flatten()  # keys of a row are not independent under Block and Cross
        assert abs(per_row.mean().item()) < 4.5 * per_row.std().item() / math.sqrt(len(per_row))


@pytest.mark.parametrize(("regularizer", "window"), REGULARIZER_AND_WINDOW)
def test_consecutive_draws_differ(regularizer, window):
    assert not torch.equal(mask_of(regularizer, window, 0.3), mask_of(regularizer, window, 0.3))


@pytest.mark.parametrize(("regularizer", "window"), REGULARIZER_AND_WINDOW)
def test_the_same_seed_draws_the_same_mask(regularizer, window):
    first = mask_of(regularizer, window, 0.3)
    torch.manual_seed(0)
    assert torch.equal(mask_of(regularizer, window, 0.3), first)


# ---- windows relative to the grid


@pytest.mark.parametrize("side", [*range(3, 40), 100])
def test_a_share_of_the_grid_is_the_nearest_odd_number_of_cells_and_the_larger_of_two(side):
    for hundredth in range(1, 100):
        exact = Fraction(hundredth, 100) * side
        nearest = min(range(1, side + 3, 2), key=lambda cells: (abs(cells - exact), -cells))
        if nearest > 1:
            assert window_cells(hundredth / 100, (side, side + 4)) == nearest <= side


@pytest.mark.parametrize(
    ("window", "grid", "cells"),
    [
        *((0.4, (14, 14), 5), (0.4, (8, 8), 3), (0.5, (8, 8), 5), (0.5, (4, 4), 3), (0.58, (100, 100), 59)),
        *(
            (0.625, (14, 14), 9),
            (0.625, (8, 8), 5),
            (0.4, (8, 14), 3),
            (0.4, (14, 8), 3),
            (0.99, (3, 3), 3),
            (5, (4, 4), 5),
            ("full", (4, 4), FULL),
        ),
    ],
    ids=str,
)
def test_cells_of_a_window(window, grid, cells):
    assert window_cells(window, grid) == cells


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_a_relative_window_draws_the_mask_of_its_cells(regularizer):
    relative, cells = (
        draw_mask(regularizer, (2, 3, 7, 1 + 48), 0.3, seed=3, grid=(6, 8), num_prefix=1, window=window)
        for window in (0.8, 5)
    )
    assert torch.equal(relative, cells)


@pytest.mark.parametrize(("window", "grid"), [(0.4, (4, 4)), (0.2, (9, 30)), (0.9, (1, 16)), (0.9, (2, 8))], ids=str)
@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_a_share_that_is_a_single_cell_is_refused_because_it_is_plain_dropkey(regularizer, window, grid):
    message = f"window={window} of a grid of {grid[0]} x {grid[1]} is a single cell.* such as window=3"
    with pytest.raises(ValueError, match=message):
        draw_mask(regularizer, (1, 1, 2, grid[0] * grid[1]), 0.3, grid=grid, window=window)


# ---- from mask to weights


def softmaxed(shape=(2, 3, 5, 16), dtype=torch.float64):
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    return logits, logits.softmax(-1)


def test_dropout_scales_survivors_by_one_over_the_kept_share():
    _, weights = softmaxed()
    drop = torch.rand(weights.shape) < 0.3
    wanted = torch.where(drop, 0, weights / 0.7)
    torch.testing.assert_close(REGULARIZERS["dropout"].reweigh(weights, drop, 0.3), wanted, rtol=1e-14, atol=0)


def test_dropout_keeps_the_expectation():
    weights = torch.full((400, 16, 16, 16), 1 / 16)
    dropped = REGULARIZERS["dropout"].reweigh(weights, draw_mask("dropout", weights.shape, 0.3), 0.3)
    assert dropped.mean().item() == pytest.approx(1 / 16, rel=5e-3)


RENORMALISING = [regularizer for regularizer in REGULARIZERS if regularizer != "dropout"]


@pytest.mark.parametrize("regularizer", RENORMALISING)
def test_rows_sum_to_one_or_to_zero_where_all_keys_are_dropped(regularizer):
    _, weights = softmaxed()
    drop = torch.rand(weights.shape) < 0.7
    drop[0, 0, 0], drop[1, 2, 4] = True, True
    rows = REGULARIZERS[regularizer].reweigh(weights, drop, 0.7).sum(-1)
    torch.testing.assert_close(rows, (~drop.all(-1)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "regularizer", [regularizer for regularizer in REGULARIZERS if REGULARIZERS[regularizer].masks_logits]
)
def test_renormalised_weights_are_the_softmax_of_masked_logits(regularizer):
    logits, weights = softmaxed()
    drop = torch.rand(weights.shape) < 0.3
    drop[..., 0] = False  # no query loses all keys
    towards = torch.randn(weights.shape, dtype=torch.float64)
    ours = REGULARIZERS[regularizer].reweigh(weights, drop, 0.3)
    wanted = logits.masked_fill(drop, -torch.inf).softmax(-1)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    ours, wanted = (torch.autograd.grad((out * towards).sum(), logits)[0] for out in (ours, wanted))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_dropattention_takes_no_gradient_through_its_divisor():
    _, weights = softmaxed()
    weights = weights.detach().requires_grad_()
    drop = torch.rand(weights.shape) < 0.3
    towards = torch.randn(weights.shape, dtype=torch.float64)
    out = REGULARIZERS["dropattention"].reweigh(weights, drop, 0.3)
    gradient = torch.autograd.grad((out * towards).sum(), weights)[0]
    kept = torch.where(drop, 0, weights.detach())
    torch.testing.assert_close(gradient, torch.where(drop, 0, towards / kept.sum(-1, keepdim=True)))


def test_dropkey_takes_the_gradient_through_its_divisor():
    _, weights = softmaxed()
    weights = weights.detach().requires_grad_()
    drop = torch.rand(weights.shape) < 0.3
    towards = torch.randn(weights.shape, dtype=torch.float64)
    out = REGULARIZERS["dropkey"].reweigh(weights, drop, 0.3)
    gradient = torch.autograd.grad((out * towards).sum(), weights)[0]
    mean = (out.detach() * towards).sum(-1, keepdim=True)
    total = torch.where(drop, 0, weights.detach()).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, torch.where(drop, 0, (towards - mean) / total))


@pytest.mark.parametrize("gap", [20, 40, 43, 60, 80, 95, 104, 200])
@pytest.mark.parametrize("regularizer", RENORMALISING)
def test_gradients_are_finite_when_next_to_nothing_survives(regularizer, gap):
    """One key holds all but exp(-gap) of the attention, and is dropped."""
    logits = torch.randn(1, 1, 50, 9)
    logits[..., 0] += gap
    logits.requires_grad_()
    drop = torch.zeros(1, 1, 50, 9, dtype=torch.bool)
    drop[..., 0] = True
    out = REGULARIZERS[regularizer].reweigh(logits.softmax(-1), drop, 0.3)
    (100 * out * torch.randn_like(out)).sum().backward()
    assert out.isfinite().all()
    assert logits.grad.isfinite().all()


# ---- refusals


@pytest.mark.parametrize("regularizer", STRUCTURED)
@pytest.mark.parametrize(("grid", "num_prefix"), [((4, 4), 1), ((3, 5), 0), ((4, 5), 0)])
def test_a_grid_that_does_not_hold_the_keys_is_refused(regularizer, grid, num_prefix):
    with pytest.raises(ValueError, match="16 keys are not"):
        draw_mask(regularizer, SHAPE, 0.3, grid=grid, num_prefix=num_prefix, window=3)


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_structured_regularizers_need_a_grid(regularizer):
    with pytest.raises(ValueError, match=f"{regularizer} needs grid"):
        draw_mask(regularizer, SHAPE, 0.3, window=3)


@pytest.mark.parametrize("regularizer", STRUCTURED)
@pytest.mark.parametrize("window", [None, 0, -3, 4, 2.5, 1.0, 0.0, -0.4, math.nan, "wide"])
def test_a_window_that_is_no_odd_number_of_cells_is_refused(regularizer, window):
    with pytest.raises(ValueError, match=f"{regularizer} takes an odd window"):
        draw_mask(regularizer, SHAPE, 0.3, grid=(4, 4), window=window)


@pytest.mark.parametrize("regularizer", ["dropkey_block", "dropkey_block_column"])
def test_block_has_no_full_window(regularizer):
    with pytest.raises(ValueError, match=f"{regularizer} takes an odd window"):
        draw_mask(regularizer, SHAPE, 0.3, grid=(4, 4), window="full")
