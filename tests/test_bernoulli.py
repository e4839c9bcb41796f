"""Bernoulli draws: exactly as defined, and as random as those of a trusted generator."""

import itertools
import math

import numpy as np
import pytest
import torch

from dropkey import bernoulli

SEEDS = [0, 1, 2, 2**31, 2**63 - 1, -1, -(2**63), 123456789]
ROWS, COLUMNS = 2048, 512


def drawn(seed, ratio, rows=ROWS, columns=COLUMNS, first_column=0, first_row=0):
    cpu = torch.device("cpu")
    return bernoulli.draw(
        bernoulli.as_seed(seed, cpu),
        bernoulli.as_threshold(ratio, cpu),
        rows,
        columns,
        first_column=first_column,
        first_row=first_row,
    )


# ---- the definition, in integers without limit


def mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def draw_by_definition(seed, ratio, row, column):
    keys = mix64((mix64(seed % 2**64) + row * 0x9E3779B97F4A7C15) % 2**64)
    c = column * 0x9E3779B1 % 2**32
    x = ((keys % 2**32 + c) % 2**32) * ((keys >> 32) ^ c) % 2**32
    return (x if x < 2**31 else x - 2**32) < min(round(ratio * 2**32), 2**32 - 1) - 2**31


@pytest.mark.parametrize("seed", SEEDS)
def test_every_draw_is_the_one_defined(seed):
    result = drawn(seed, 0.3, 7, 70)
    wanted = [[draw_by_definition(seed, 0.3, row, column) for column in range(70)] for row in range(7)]
    assert result.tolist() == wanted


def test_rows_far_down_are_those_defined():
    result = drawn(5, 0.3, 3_000_000, 2)
    for row in (2_999_999, 2_500_001, 1 << 19, (1 << 19) - 1):
        assert result[row].tolist() == [draw_by_definition(5, 0.3, row, column) for column in range(2)]


def test_splitmix64_gives_its_published_sequence():
    """The first outputs for state 1234567 (Vigna's splitmix64.c; the state is advanced before it is mixed)."""
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([(1234567 + step * golden + 2**63) % 2**64 - 2**63 for step in (1, 2, 3)])
    outputs = [value % 2**64 for value in bernoulli.mix64(states).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_draw_does_not_depend_on_how_many_are_drawn_with_it():
    whole = drawn(3, 0.3, 100, 90)
    assert torch.equal(drawn(3, 0.3, 60, 40), whole[:60, :40])
    assert torch.equal(drawn(3, 0.3, 60, 40, first_column=50), whole[:60, 50:])
    assert torch.equal(drawn(3, 0.3, 60, 40, first_row=40), whole[40:, :40])


def test_a_draw_does_not_depend_on_the_size_of_the_pieces(monkeypatch):
    whole = drawn(3, 0.3, 100, 90)
    monkeypatch.setattr(bernoulli, "CHUNK", 700)
    assert torch.equal(drawn(3, 0.3, 100, 90), whole)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_small_and_empty_shapes(shape):
    assert drawn(0, 0.3, *shape).shape == shape


# ---- how often


@pytest.mark.parametrize("ratio", [1e-4, 0.001, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95, 0.9999])
def test_rate(ratio):
    hits = sum(drawn(seed, ratio, 20_000, 400).sum().item() for seed in (1, 2))
    count = 2 * 20_000 * 400
    assert abs(hits - count * ratio) < 4 * math.sqrt(count * ratio * (1 - ratio))


def test_ratio_zero_never_hits():
    assert not drawn(0, 0.0).any()


def test_the_largest_ratio_below_one_almost_always_hits():
    assert drawn(0, math.nextafter(1.0, 0.0)).all()


def test_a_ratio_as_a_tensor_is_the_ratio():
    cpu = torch.device("cpu")
    for ratio in (0.0, 1e-9, 0.1, 0.3, math.nextafter(1.0, 0.0)):
        assert bernoulli.as_threshold(torch.tensor(ratio, dtype=torch.float64), cpu) == bernoulli.as_threshold(
            ratio, cpu
        )


def test_hits_at_a_small_ratio_are_hits_at_a_larger_one():
    """So a ramp of the ratio over training adds dropped keys under the same seed and exchanges none."""
    assert not (drawn(4, 0.1) & ~drawn(4, 0.3)).any()


# ---- how independently: the same battery for ours, for a trusted generator, and for hashes known to be bad


def deviations(bits, ratio):
    """Standard scores of what should be independent draws: rows x columns, centred. Each is N(0, 1) if they are."""
    x = (bits.astype(np.float64) - ratio) / math.sqrt(ratio * (1 - ratio))
    found = {"rate": x.mean() * math.sqrt(x.size)}

    def add(name, *factors):
        product = math.prod(factors)
        found[name] = product.mean() * math.sqrt(product.size)

    for lag in (1, 2, 3, 8, 64, 65, 128):
        add(f"columns {lag} apart", x[:, lag:], x[:, :-lag])
        add(f"rows {lag} apart", x[lag:], x[:-lag])
        add(f"diagonal {lag} apart", x[lag:, lag:], x[:-lag, :-lag])
    for a, b in ((1, 2), (1, 3), (64, 128)):
        add(f"three columns {a} {b}", x[:, b:], x[:, a : x.shape[1] - b + a], x[:, :-b])
        add(f"three rows {a} {b}", x[b:], x[a : len(x) - b + a], x[:-b])
    for down, across in itertools.product((1, 2, 64), (1, 2, 64)):
        corners = x[down:, across:], x[down:, :-across], x[:-down, across:], x[:-down, :-across]
        add(f"rectangle {down} {across}", *corners)
    add("four columns", x[:, 3:], x[:, 2:-1], x[:, 1:-2], x[:, :-3])
    for name, axis in (("spread over rows", 1), ("spread over columns", 0)):
        sums = x.sum(axis) / math.sqrt(x.shape[axis])  # each N(0, 1)
        fourth = 2 + ((1 - ratio) ** 3 + ratio**3 - 3 * ratio * (1 - ratio)) / (ratio * (1 - ratio)) / x.shape[axis]
        found[name] = (np.square(sums).mean() - 1) * math.sqrt(len(sums) / fourth)
    return found


def worst(bits, ratio):
    return max((abs(score), name) for name, score in deviations(bits, ratio).items())


RATIOS = pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.9])


@pytest.mark.parametrize(("seed", "ratio"), [(0, 0.05), (1, 0.1), (77, 0.3), (-5, 0.5), (0, 0.9), (1, 0.3), (77, 0.05)])
def test_draws_are_independent(seed, ratio):
    score, name = worst(drawn(seed, ratio).numpy(), ratio)
    assert score < 4.5, name


@RATIOS
def test_a_trusted_generator_passes_too(ratio):
    score, name = worst(np.random.Generator(np.random.PCG64(0)).random((ROWS, COLUMNS)) < ratio, ratio)
    assert score < 4.5, name


def test_seeds_are_independent():
    """Consecutive seeds, which is what people give."""
    bits = np.stack([drawn(seed, 0.3, 16, 64).numpy().ravel() for seed in range(ROWS)])
    score, name = worst(bits, 0.3)
    assert score < 4.5, name


@pytest.mark.parametrize("axis", [0, 1], ids=["samples", "heads"])
@pytest.mark.parametrize("heads", [3, 6, 12])
def test_heads_and_samples_are_independent(heads, axis):
    """Row (b * H + h) * Q + m: as many rows apart as heads of 197 queries are."""
    bits = drawn(9, 0.3, 8 * heads * 197, 197).numpy().reshape(8, heads, 197 * 197)
    x = (np.moveaxis(bits, axis, 0) - 0.3) / math.sqrt(0.3 * 0.7)
    for product in (x[1:] * x[:-1], x[2:] * x[1:-1] * x[:-2]):
        assert abs(product.mean() * math.sqrt(product.size)) < 4.5


BAD = {
    "r1 ^ c": lambda r1, r2, c: r1 ^ c,
    "r1 + c": lambda r1, r2, c: r1 + c,
    "raw columns": lambda r1, r2, c: (r1 + c // 0x9E3779B1) * (r2 ^ c // 0x9E3779B1),
    "r1 c + r2": lambda r1, r2, c: r1 * c + r2,
}


@pytest.mark.parametrize("name", BAD)
def test_hashes_known_to_be_bad_do_not_pass(name):
    r1, r2 = bernoulli.row_keys(torch.tensor(1), torch.arange(ROWS)).numpy().astype(np.int64).astype(np.uint64) % 2**32
    c = np.arange(COLUMNS, dtype=np.uint64) * 0x9E3779B1
    if name != "raw columns":
        c %= 2**32
    bits = BAD[name](r1, r2, c) % 2**32 < 0.3 * 2**32
    assert worst(bits, 0.3)[0] > 6
