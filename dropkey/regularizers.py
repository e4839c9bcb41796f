"""What is dropped: for each regularizer a mask, and what the mask does to the attention weights.

A new regularizer is one line in `REGULARIZERS` (and a function that draws its mask, unless an existing one serves), plus its
name in `dropkey.config.schema.REGULARIZER_NAMES`. Shapes: B batch, H heads, Q queries, K keys, K = prefix + h * w.
Masks are boolean, True where something is dropped.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Callable, Optional, Union

import torch
from torch import Tensor

from dropkey.bernoulli import CACHED, as_ratio, as_seed, as_threshold, bernoulli

Grid = tuple[int, int]
Window = Optional[Union[int, str]]
AXES = ("sample", "head", "query", "key")
FULL = 0  # window="full" as a number


# ------------------------------------------------------------------------------------------------------- drawing


def independent(seed: Tensor, threshold: Tensor, shape: list[int], **_) -> Tensor:
    """One draw for each element: DropKey's and Dropout's mask."""
    return bernoulli(seed, threshold, math.prod(shape[:-1]), shape[-1]).view(shape)


def block(points: Tensor, grid: Grid, window: int) -> Tensor:
    """DropKey-Block: each seed point drops a square around itself."""
    return spread(spread(points, grid, window, down=True), grid, window, down=False)


def cross(points: Tensor, grid: Grid, window: int) -> Tensor:
    """DropKey-Cross: each seed point drops a piece of its row and of its column."""
    return spread(points, grid, window, down=True) | spread(points, grid, window, down=False)


def structured(
    seed: Tensor, threshold: Tensor, shape: list[int], *, is_block: bool, grid: Grid, num_prefix: int, window: int
) -> Tensor:
    """Seed points on the key grid, for each (sample, head, query), and what they drop around themselves.

    The probability of a seed point is such that the realised mean ratio on this very grid is the one asked for
    (DropBlock's formula counts inner points only and overshoots on small grids). Prefix tokens have no place on the
    grid; each is dropped by itself.
    """
    rows, cells = math.prod(shape[:-1]), grid[0] * grid[1]
    at = as_threshold(seed_probability(is_block, grid, window, as_ratio(threshold)), seed.device)
    mask = torch.empty(rows, shape[-1], dtype=torch.bool, device=seed.device)
    step = max(1, CACHED // cells) if seed.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, step):
        part = mask[first : first + step]
        points = bernoulli(seed, at, len(part), cells, first_row=first)
        part[:, num_prefix:] = (block if is_block else cross)(points, grid, window)
        part[:, :num_prefix] = bernoulli(seed, threshold, len(part), num_prefix, first_column=cells, first_row=first)
    return mask.view(shape)


def spread(points: Tensor, grid: Grid, window: int, *, down: bool) -> Tensor:
    """Every True of ... hw reaches (window - 1) / 2 cells both ways along its row, or `down` its column; with FULL
    the whole line.

    A shift goes over all grids at once as one long line, a few times faster than over rows of some 14 cells; what
    would leave its row or grid is masked before. What has reached r cells can be shifted by r + 1 without a gap, so a
    window of 7 takes two shifts and not three.
    """
    height, width = grid
    cell = torch.arange(height * width, device=points.device)
    place, size, stride = (cell // width, height, width) if down else (cell % width, width, 1)
    half = size - 1 if window == FULL else min(window // 2, size - 1)
    reach = 0
    while reach < half:
        step = min(reach + 1, half - reach)
        ahead, back = (points & stays for stays in (place + step < size, place >= step))
        points, by = points.clone(), step * stride
        points.view(-1)[by:] |= ahead.view(-1)[:-by]
        points.view(-1)[:-by] |= back.view(-1)[by:]
        reach += step
    return points


def seed_probability(is_block: bool, grid: Grid, window: int, ratio: Tensor) -> Tensor:
    """The seed probability g at which the mean of 1 - (1 - g)^n over the cells is `ratio`, n being the number of
    seed positions whose window covers the cell. To seven digits, without reading `ratio` on the host."""
    hazards, reached = hazard_table(is_block, grid, window, ratio.device, ratio.dtype)
    wanted = -torch.log1p(-ratio)
    above = torch.searchsorted(reached, wanted).clamp(1, len(reached) - 1)
    low, high = reached[above - 1], reached[above]
    hazard = torch.lerp(hazards[above - 1], hazards[above], (wanted - low) / (high - low))
    return -torch.expm1(-hazard)


@lru_cache(maxsize=None)
def hazard_table(is_block: bool, grid: Grid, window: int, device: torch.device, dtype: torch.dtype):
    """Seed hazards -log(1 - g), densest near 0, and for each the hazard -log(1 - ratio) that it brings about."""

    def reach(size: int) -> list[int]:
        half = size if window == FULL else window // 2
        return [min(i + half, size - 1) - max(i - half, 0) + 1 for i in range(size)]

    covers = Counter(r * c if is_block else r + c - 1 for r in reach(grid[0]) for c in reach(grid[1]))
    hazards = torch.linspace(0, 1, 8193, dtype=torch.float64) ** 3 * 23  # 1 - exp(-23) is beyond the largest ratio
    survive = sum(count * torch.exp(-n * hazards) for n, count in covers.items()) / (grid[0] * grid[1])
    return hazards.to(device, dtype), -torch.log(survive).to(device, dtype)


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


def scale(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """Ordinary Dropout: survivors times 1 / (1 - ratio)."""
    return weights * survivors(drop, weights.dtype).div_(1.0 - ratio)


def renormalise(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """DropKey from weights that are already softmaxed: masked, then divided by what survives.

    Equal, gradients included, to setting the dropped logits to -inf before the softmax (paper.md, equivalence;
    arXiv 2403.00812). A query whose keys are all dropped gets weights 0 and gradient 0.
    """
    kept = weights * survivors(drop, weights.dtype)
    return kept * share(kept).reciprocal()


def renormalise_detached(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """DropAttention (Zehui et al., 2019, arXiv 1907.11065): the divisor takes no gradient."""
    kept = weights * survivors(drop, weights.dtype)
    return kept * share(kept.detach()).reciprocal()


@dataclass(frozen=True)
class Regularizer:
    """`mask` draws what is dropped; `reweigh` applies it to softmaxed weights; `masks_logits` says that dropping is
    the same as -inf in the logits, so that any attention that takes a mask can do it; along the axes `shared` one
    draw is for all."""

    mask: Callable[..., Tensor]
    reweigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    masks_logits: bool
    shared: tuple[str, ...] = ()

    def shape(self, full: list[int]) -> list[int]:
        return [1 if axis in self.shared else size for axis, size in zip(AXES[-len(full) :], full, strict=True)]


REGULARIZERS = {
    "dropout": Regularizer(independent, scale, masks_logits=False),
    "dropkey": Regularizer(independent, renormalise, masks_logits=True),
    "dropkey_block": Regularizer(partial(structured, is_block=True), renormalise, masks_logits=True),
    "dropkey_cross": Regularizer(partial(structured, is_block=False), renormalise, masks_logits=True),
    "dropkey_column": Regularizer(independent, renormalise, masks_logits=True, shared=("query",)),
    "dropattention": Regularizer(independent, renormalise_detached, masks_logits=False),
}
STRUCTURED = ("dropkey_block", "dropkey_cross")  # the kinds that must know the grid of the keys


def check_window(regularizer: str, window: Window) -> None:
    """Raises ValueError if Block or Cross cannot have that window; the other kinds have none."""
    if regularizer not in STRUCTURED or (window == "full" and regularizer == "dropkey_cross"):
        return
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        also = ' or "full"' if regularizer == "dropkey_cross" else ""
        raise ValueError(f"{regularizer} takes an odd window in cells{also}, not {window}")


def draw(
    regularizer: str,
    shape: tuple[int, int, int, int],
    ratio: Union[float, Tensor],
    *,
    seed: Union[int, Tensor, None] = None,
    device: torch.device = "cpu",
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
) -> Tensor:
    """A mask of what `regularizer` drops.

    Args:
        shape: B H Q K.
        ratio: share of keys dropped, in [0, 1).
        seed: the mask is a function of it and of `shape`; without one it comes from `device`'s default generator.
        grid: height and width of the keys on the image (Block and Cross).
        num_prefix: keys before the grid, such as the class token (Block and Cross).
        window: cells across, odd; Cross also "full".
    Returns:
        Boolean, True where dropped, of `shape` or broadcastable to it (column: B H 1 K).
    Raises:
        ValueError: Block or Cross without a grid and window that fit the keys.
    """
    device = torch.device(device)
    return mask(regularizer, shape, as_threshold(ratio, device), as_seed(seed, device), grid, num_prefix, window)


def mask(
    regularizer: str,
    shape: tuple[int, int, int, int],
    threshold: Tensor,
    seed: Tensor,
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
) -> Tensor:
    """`draw`, with ratio and seed as the tensors that `bernoulli` takes."""
    where = [*grid, num_prefix, FULL if window == "full" else window] if regularizer in STRUCTURED and grid else []
    if regularizer in STRUCTURED:
        check_window(regularizer, window)
        if grid is None:
            raise ValueError(f"{regularizer} needs grid=(height, width) of the keys")
        if num_prefix + grid[0] * grid[1] != shape[-1]:
            raise ValueError(f"{shape[-1]} keys are not {num_prefix} prefix tokens and a grid of {grid[0]} x {grid[1]}")
    compute = mask_op if torch.compiler.is_compiling() else compute_mask
    return compute(seed, threshold, regularizer, list(shape), where)


def compute_mask(seed: Tensor, threshold: Tensor, regularizer: str, shape: list[int], where: list[int]) -> Tensor:
    places = {"grid": tuple(where[:2]), "num_prefix": where[2], "window": where[3]} if where else {}
    return REGULARIZERS[regularizer].mask(seed, threshold, REGULARIZERS[regularizer].shape(shape), **places)


# Opaque to compilers, which thereby draw the same mask as eager code.
mask_op = torch.library.custom_op(
    "dropkey::mask",
    compute_mask,
    mutates_args=(),
    schema="(Tensor seed, Tensor threshold, str regularizer, SymInt[] shape, SymInt[] where) -> Tensor",
)


@mask_op.register_fake
def _(seed, threshold, regularizer, shape, where):
    return torch.empty(REGULARIZERS[regularizer].shape(shape), dtype=torch.bool, device=seed.device)
