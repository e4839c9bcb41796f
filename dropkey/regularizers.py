"""What is dropped: for each kind a mask, and what the mask does to the attention weights.

A new regularizer is one function that draws its mask (or none, if an existing one serves) and one line in `KINDS`,
plus its name in `dropkey.config.schema.KINDS`. Shapes: B batch, H heads, Q queries, K keys, K = prefix + h * w.
Masks are boolean, True where something is dropped.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Optional, Union

import torch
from torch import Tensor

Grid = tuple[int, int]
Window = Optional[Union[int, str]]


# ------------------------------------------------------------------------------------------------------- drawing


def bernoulli(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """True with probability p, independently.

    On a CPU p is rounded to a multiple of 1/65536 (but never to 0 or 1): four 16-bit numbers from each 64-bit draw
    are three times faster than `torch.rand`.
    """
    if torch.device(device).type != "cpu":
        return torch.rand(shape, device=device) < p
    count = math.prod(shape)
    threshold = min(max(round(p * 65536), 1), 65535) - 32768
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,))  # `random_` cannot be compiled
    return (words.view(torch.int16) < threshold)[:count].view(shape)


def independent(shape, ratio: float, device, **_) -> Tensor:
    """One draw for each (sample, head, query, key): DropKey's and Dropout's mask."""
    return bernoulli(shape, ratio, device)


def column(shape, ratio: float, device, **_) -> Tensor:
    """One draw for each (sample, head, key), shared by all queries: B H 1 K."""
    batch, heads, _, keys = shape
    return bernoulli((batch, heads, 1, keys), ratio, device)


def structured(shape, ratio: float, device, *, kind: str, grid: Grid, num_prefix: int, window: Window) -> Tensor:
    """DropKey-Block and DropKey-Cross: seed points on the key grid, each dropping a window around itself.

    Seeds are drawn for each (sample, head, query). Their probability is solved so that the realised mean ratio on
    this very grid is `ratio` (DropBlock's formula counts inner seeds only and overshoots on small grids). Prefix
    tokens have no place on the grid; each is dropped by itself with the same ratio.
    """
    height, width = grid
    if num_prefix + height * width != shape[-1]:
        raise ValueError(f"{shape[-1]} keys are not {num_prefix} prefix tokens and a grid of {height} x {width}")
    (known,) = {ratio}  # for torch.compile: elements of a set are constants, never symbols
    probability = seed_probability(kind, grid, window, known)
    seeds = bernoulli((*shape[:-1], height, width), probability, device)
    dropped = spread(seeds, window, -1)
    dropped = spread(dropped, window, -2) if kind == "dropkey_block" else dropped | spread(seeds, window, -2)
    dropped = dropped.flatten(-2)
    if num_prefix:
        dropped = torch.cat([bernoulli((*shape[:-1], num_prefix), ratio, device), dropped], dim=-1)
    return dropped


def spread(seeds: Tensor, window: Window, dim: int) -> Tensor:
    """Every True reaches (window - 1) / 2 cells both ways along `dim`; with window="full" the whole line."""
    size = seeds.shape[dim]
    if window == "full":
        return seeds.any(dim, keepdim=True).expand_as(seeds)
    reached = seeds.clone()
    for step in range(1, min(window // 2, size - 1) + 1):
        reached.narrow(dim, step, size - step).logical_or_(seeds.narrow(dim, 0, size - step))
        reached.narrow(dim, 0, size - step).logical_or_(seeds.narrow(dim, step, size - step))
    return reached


@torch.compiler.assume_constant_result  # solved when compiling; tracing it would take minutes
def seed_probability(kind: str, grid: Grid, window: Window, ratio: float) -> float:
    """The seed probability g at which the mean of 1 - (1 - g)^n over the cells is `ratio`, n being the number of
    seed positions whose window covers the cell."""
    return solve_seed_probability(kind, grid, window, ratio)


@lru_cache(maxsize=None)
def solve_seed_probability(kind: str, grid: Grid, window: Window, ratio: float) -> float:
    def reach(size: int) -> list[int]:
        half = size if window == "full" else window // 2
        return [min(i + half, size - 1) - max(i - half, 0) + 1 for i in range(size)]

    block = kind == "dropkey_block"
    covers = Counter(r * c if block else r + c - 1 for r in reach(grid[0]) for c in reach(grid[1]))
    cells = grid[0] * grid[1]

    def mean(g: float) -> float:
        return sum(count * -math.expm1(n * math.log1p(-g)) for n, count in covers.items()) / cells

    low, high = 0.0, ratio  # a window of one cell needs g = ratio, larger windows less
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < ratio else (low, middle)
    return high


# ---------------------------------------------------------------------------------------- what the mask then does


def survivors(drop: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where kept, 0 where dropped: multiplying costs half of `masked_fill`, forward and backward."""
    return (~drop).to(dtype)


def share(kept: Tensor) -> Tensor:
    """The sum over keys to divide by; 1 for a query that lost all its keys, whose weights and gradients stay 0.

    Less than 1e-18 counts as all lost: the gradient of 1 / total would overflow, and infinity times 0 is NaN.
    """
    total = kept.sum(-1, keepdim=True)
    return total.masked_fill(total < 1e-18, 1.0)


def scale(weights: Tensor, drop: Tensor, ratio: float) -> Tensor:
    """Ordinary Dropout: survivors times 1 / (1 - ratio)."""
    return weights * survivors(drop, weights.dtype).div_(1.0 - ratio)


def renormalise(weights: Tensor, drop: Tensor, ratio: float) -> Tensor:
    """DropKey from weights that are already softmaxed: masked, then divided by what survives.

    Equal, gradients included, to setting the dropped logits to -inf before the softmax (paper.md, equivalence;
    arXiv 2403.00812). A query whose keys are all dropped gets weights 0 and gradient 0.
    """
    kept = weights * survivors(drop, weights.dtype)
    return kept * share(kept).reciprocal()


def renormalise_detached(weights: Tensor, drop: Tensor, ratio: float) -> Tensor:
    """DropAttention (Zehui et al., 2019, arXiv 1907.11065): the divisor takes no gradient."""
    kept = weights * survivors(drop, weights.dtype)
    return kept * share(kept.detach()).reciprocal()


@dataclass(frozen=True)
class Kind:
    """`mask` draws what is dropped; `reweigh` applies it to softmaxed weights; `on_logits` says that dropping is
    the same as -inf in the logits, so that any attention that takes a mask can do it."""

    mask: Callable[..., Tensor]
    reweigh: Callable[[Tensor, Tensor, float], Tensor]
    on_logits: bool


KINDS = {
    "dropout": Kind(independent, scale, on_logits=False),
    "dropkey": Kind(independent, renormalise, on_logits=True),
    "dropkey_block": Kind(structured, renormalise, on_logits=True),
    "dropkey_cross": Kind(structured, renormalise, on_logits=True),
    "dropkey_column": Kind(column, renormalise, on_logits=True),
    "dropattention": Kind(independent, renormalise_detached, on_logits=False),
}
STRUCTURED = ("dropkey_block", "dropkey_cross")  # the kinds that must know the grid of the keys


def check_window(kind: str, window: Window) -> None:
    """Raises ValueError if Block or Cross cannot have that window; the other kinds have none."""
    if kind not in STRUCTURED or (window == "full" and kind == "dropkey_cross"):
        return
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        also = ' or "full"' if kind == "dropkey_cross" else ""
        raise ValueError(f"{kind} takes an odd window in cells{also}, not {window}")


def draw(
    kind: str,
    shape: tuple[int, int, int, int],
    ratio: float,
    *,
    device: torch.device = "cpu",
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
) -> Tensor:
    """A mask of what `kind` drops, from the default generator of `device`.

    Args:
        shape: B H Q K.
        ratio: share of keys dropped, in (0, 1).
        grid: height and width of the keys on the image (Block and Cross).
        num_prefix: keys before the grid, such as the class token (Block and Cross).
        window: cells across, odd; Cross also "full".
    Returns:
        Boolean, True where dropped, of `shape` or broadcastable to it (column: B H 1 K).
    Raises:
        ValueError: Block or Cross without a grid and window that fit the keys.
    """
    if kind not in STRUCTURED:
        return KINDS[kind].mask(shape, ratio, device)
    check_window(kind, window)
    if grid is None:
        raise ValueError(f"{kind} needs grid=(height, width) of the keys")
    return structured(shape, ratio, device, kind=kind, grid=tuple(grid), num_prefix=num_prefix, window=window)
