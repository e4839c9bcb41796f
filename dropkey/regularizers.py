"""What is dropped: for each regularizer how its mask is drawn, and what the mask does to the attention weights.

A new regularizer is one line in `REGULARIZERS` (and a function that draws its mask, unless an existing one serves) and
its name in `dropkey.config.schema.REGULARIZER_NAMES`. Shapes: B batch, H heads, Q queries, K keys = prefix tokens +
height · width of the grid. Masks are boolean, True where something is dropped.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Callable, Optional, Union

import torch
from torch import Tensor

from dropkey import bernoulli
from dropkey.bernoulli import as_ratio, as_seed, as_threshold

Grid = tuple[int, int]
Window = Optional[Union[int, float, str]]
AXES = ("sample", "head", "query", "key")
FULL = 0  # window="full" as a number


# ------------------------------------------------------------------------------------------------------- drawing


def independent_mask(seed: Tensor, threshold: Tensor, shape: list[int], **_) -> Tensor:
    """One draw for each element: the mask of DropKey and of Dropout."""
    return bernoulli.draw(seed, threshold, math.prod(shape[:-1]), shape[-1]).view(shape)


def dilate_block(points: Tensor, grid: Grid, window: int) -> Tensor:
    """DropKey-Block: each seed point drops a square around itself."""
    return dilate(dilate(points, grid, window, vertical=True), grid, window, vertical=False)


def dilate_cross(points: Tensor, grid: Grid, window: int) -> Tensor:
    """DropKey-Cross: each seed point drops a part of its row and of its column."""
    return dilate(points, grid, window, vertical=True) | dilate(points, grid, window, vertical=False)


def structured_mask(
    seed: Tensor, threshold: Tensor, shape: list[int], *, is_block: bool, grid: Grid, num_prefix: int, window: int
) -> Tensor:
    """Seed points on the grid of keys for each (sample, head, query), and what they drop around themselves.

    The probability of a seed point is solved so that the mean ratio on this grid is the requested one (DropBlock's
    formula counts inner points only and drops too much on small grids). Prefix tokens have no place on the grid; each
    is dropped independently.
    """
    rows, cells = math.prod(shape[:-1]), grid[0] * grid[1]
    point = as_threshold(seed_probability(is_block, grid, window, as_ratio(threshold)), seed.device)
    mask = torch.empty(rows, shape[-1], dtype=torch.bool, device=seed.device)
    step = max(1, bernoulli.CHUNK // cells) if seed.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, step):
        part = mask[first : first + step]
        points = bernoulli.draw(seed, point, len(part), cells, first_row=first)
        part[:, num_prefix:] = (dilate_block if is_block else dilate_cross)(points, grid, window)
        prefix = bernoulli.draw(seed, threshold, len(part), num_prefix, first_column=cells, first_row=first)
        part[:, :num_prefix] = prefix
    return mask.view(shape)


block_mask = partial(structured_mask, is_block=True)
cross_mask = partial(structured_mask, is_block=False)


def dilate(points: Tensor, grid: Grid, window: int, *, vertical: bool) -> Tensor:
    """Extends every True of `points` (..., height · width) by window // 2 cells in both directions of its row, or of
    its column if `vertical`; with FULL to the whole line.

    All grids are shifted at once as one long vector, a few times faster than row by row; what would cross the border of
    a row or grid is masked before. What reaches r cells can be shifted by r + 1 without a gap, so a window of 7 takes
    two shifts instead of three.
    """
    height, width = grid
    cell = torch.arange(height * width, device=points.device)
    place, size, stride = (cell // width, height, width) if vertical else (cell % width, width, 1)
    half = size - 1 if window == FULL else min(window // 2, size - 1)
    reach = 0
    while reach < half:
        step = min(reach + 1, half - reach)
        ahead, back = points & (place + step < size), points & (place >= step)
        points, shift = points.clone(), step * stride
        points.view(-1)[shift:] |= ahead.view(-1)[:-shift]
        points.view(-1)[:-shift] |= back.view(-1)[shift:]
        reach += step
    return points


def seed_probability(is_block: bool, grid: Grid, window: int, ratio: Tensor) -> Tensor:
    """The probability g of a seed point at which the mean of 1 - (1 - g)^n over the cells is `ratio`, n being the
    number of positions whose window covers the cell. Seven digits, without reading `ratio` on the host."""
    hazards, reached = hazard_table(is_block, grid, window, ratio.device, ratio.dtype)
    wanted = -torch.log1p(-ratio)
    above = torch.searchsorted(reached, wanted).clamp(1, len(reached) - 1)
    low, high = reached[above - 1], reached[above]
    hazard = torch.lerp(hazards[above - 1], hazards[above], (wanted - low) / (high - low))
    return -torch.expm1(-hazard)


@lru_cache(maxsize=None)
def hazard_table(is_block: bool, grid: Grid, window: int, device: torch.device, dtype: torch.dtype):
    """Hazards -log(1 - g) of seed points, densest near 0, and for each the hazard -log(1 - ratio) that results."""

    def positions(size: int) -> list[int]:
        half = size if window == FULL else window // 2
        return [min(i + half, size - 1) - max(i - half, 0) + 1 for i in range(size)]

    covers = Counter(r * c if is_block else r + c - 1 for r in positions(grid[0]) for c in positions(grid[1]))
    hazards = torch.linspace(0, 1, 8193, dtype=torch.float64) ** 3 * 23  # 1 - exp(-23) is beyond the largest ratio
    survive = sum(count * torch.exp(-n * hazards) for n, count in covers.items()) / (grid[0] * grid[1])
    return hazards.to(device, dtype), -torch.log(survive).to(device, dtype)


# ---------------------------------------------------------------------------------------- what the mask then does


def keep_factor(drop: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where kept, 0 where dropped: multiplying costs half of `masked_fill`, forward and backward."""
    return (~drop).to(dtype)


def divisor(kept: Tensor) -> Tensor:
    """The sum over keys; 1 for a query that lost all its keys, whose weights and gradients stay 0.

    A sum below 1e-18 counts as all lost: the gradient of its reciprocal would overflow, and infinity times 0 is NaN.
    """
    total = kept.sum(-1, keepdim=True)
    return total.masked_fill(total < 1e-18, 1.0)


def rescale(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """Ordinary Dropout: kept weights times 1 / (1 - ratio)."""
    return weights * keep_factor(drop, weights.dtype).div_(1.0 - ratio)


def renormalise(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """DropKey on weights that are already softmaxed: masked, then divided by the sum of what is kept.

    Equal, gradients included, to setting the dropped logits to -inf before the softmax (docs/paper.md, "Equivalence").
    A query whose keys are all dropped gets weights 0 and gradient 0.
    """
    kept = weights * keep_factor(drop, weights.dtype)
    return kept * divisor(kept).reciprocal()


def renormalise_detached(weights: Tensor, drop: Tensor, ratio: Tensor) -> Tensor:
    """DropAttention (Zehui et al., 2019, arXiv 1907.11065): no gradient flows through the divisor."""
    kept = weights * keep_factor(drop, weights.dtype)
    return kept * divisor(kept.detach()).reciprocal()


@dataclass(frozen=True)
class Regularizer:
    """How a regularizer drops.

    Attributes:
        mask: (seed, threshold, shape, **grid) -> mask.
        reweigh: applies the mask to softmaxed weights: (weights, mask, ratio) -> weights.
        masks_logits: whether dropping equals -inf in the logits, so that any attention that takes a mask can do it.
        shared: axes along which one draw holds for all.
    """

    mask: Callable[..., Tensor]
    reweigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    masks_logits: bool
    shared: tuple[str, ...] = ()

    def mask_shape(self, full: list[int]) -> list[int]:
        return [1 if axis in self.shared else size for axis, size in zip(AXES[-len(full) :], full, strict=True)]


REGULARIZERS = {
    "dropout": Regularizer(independent_mask, rescale, masks_logits=False),
    "dropkey": Regularizer(independent_mask, renormalise, masks_logits=True),
    "dropkey_block": Regularizer(block_mask, renormalise, masks_logits=True),
    "dropkey_cross": Regularizer(cross_mask, renormalise, masks_logits=True),
    "dropkey_column": Regularizer(independent_mask, renormalise, masks_logits=True, shared=("query",)),
    "dropkey_block_column": Regularizer(block_mask, renormalise, masks_logits=True, shared=("query",)),
    "dropkey_cross_column": Regularizer(cross_mask, renormalise, masks_logits=True, shared=("query",)),
    "dropattention": Regularizer(independent_mask, renormalise_detached, masks_logits=False),
}
# These must know the grid of the keys.
STRUCTURED = ("dropkey_block", "dropkey_cross", "dropkey_block_column", "dropkey_cross_column")


def check_name(regularizer: str) -> None:
    """Raises ValueError for a regularizer that does not exist."""
    if regularizer != "none" and regularizer not in REGULARIZERS:
        raise ValueError(f"no regularizer '{regularizer}'; choose from none, {', '.join(REGULARIZERS)}")


def check_window(regularizer: str, window: Window) -> None:
    """Raises ValueError for a window that DropKey-Block or DropKey-Cross cannot have; the others have none."""
    is_cross = regularizer.startswith("dropkey_cross")
    if regularizer not in STRUCTURED or (window == "full" and is_cross):
        return
    is_odd = isinstance(window, int) and window > 0 and window % 2 == 1
    if not is_odd and not (isinstance(window, float) and 0 < window < 1):
        also = ', or "full"' if is_cross else ""
        raise ValueError(f"{regularizer} takes an odd window in cells, a share of the grid below 1{also}, not {window}")


def window_cells(window: Window, grid: Grid) -> int:
    """Cells across of a window on `grid`; FULL for "full".

    A share of the grid's shorter side becomes the nearest odd number of cells; in the middle between two, the larger:
    0.5 of 8 cells are 5.

    Raises:
        ValueError: a share that is a single cell, because plain DropKey would run under another name.
    """
    if not isinstance(window, float):
        return FULL if window == "full" else window
    cells = 2 * int(round(window * min(grid), 6) // 2) + 1  # rounded, because 0.58 * 100 is 57.99...
    if cells == 1:
        raise ValueError(
            f"window={window:g} of a grid of {grid[0]} x {grid[1]} is a single cell, which is plain DropKey: "
            "take a larger share, or a number of cells such as window=3"
        )
    return cells


def draw_mask(
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
        window: cells across, odd; or a float in (0, 1), the share of the grid's shorter side, see `window_cells`; Cross
            also "full".
    Returns:
        Boolean, True where dropped, of `shape` or broadcastable to it (with `column` in the name: B H 1 K).
    Raises:
        ValueError: Block or Cross without a grid and window that fit the keys.
    """
    device = torch.device(device)
    return seeded_mask(regularizer, shape, as_threshold(ratio, device), as_seed(seed, device), grid, num_prefix, window)


def seeded_mask(
    regularizer: str,
    shape: tuple[int, int, int, int],
    threshold: Tensor,
    seed: Tensor,
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
) -> Tensor:
    """`draw_mask`, with ratio and seed as the tensors that `bernoulli.draw` takes."""
    layout = []
    if regularizer in STRUCTURED:
        check_window(regularizer, window)
        if grid is None:
            raise ValueError(f"{regularizer} needs grid=(height, width) of the keys")
        if num_prefix + grid[0] * grid[1] != shape[-1]:
            raise ValueError(f"{shape[-1]} keys are not {num_prefix} prefix tokens and a grid of {grid[0]} x {grid[1]}")
        layout = [*grid, num_prefix, window_cells(window, grid)]
    compute = mask_op if torch.compiler.is_compiling() else compute_mask
    return compute(seed, threshold, regularizer, list(shape), layout)


def compute_mask(seed: Tensor, threshold: Tensor, regularizer: str, shape: list[int], layout: list[int]) -> Tensor:
    rule = REGULARIZERS[regularizer]
    options = {"grid": tuple(layout[:2]), "num_prefix": layout[2], "window": layout[3]} if layout else {}
    return rule.mask(seed, threshold, rule.mask_shape(shape), **options)


# Opaque to compilers, which thereby draw the same mask as eager code.
mask_op = torch.library.custom_op(
    "dropkey::mask",
    compute_mask,
    mutates_args=(),
    schema="(Tensor seed, Tensor threshold, str regularizer, SymInt[] shape, SymInt[] layout) -> Tensor",
)


@mask_op.register_fake
def _(seed, threshold, regularizer, shape, layout):
    return torch.empty(REGULARIZERS[regularizer].mask_shape(shape), dtype=torch.bool, device=seed.device)
