"""Bernoulli draws that are a pure function of (seed, row, column).

They are the same on every device, in every kernel and in any order of computation, so that forward, backward and
recomputation drop the same keys without storing a mask.

A row gets two 32-bit keys r1, r2 from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a generator that passes
BigCrush. Column n of the row draws (r1 + c)(r2 ^ c) modulo 2³² with c = n · 0x9E3779B1, four instructions, and compares
it with the threshold. `tests/test_bernoulli.py` compares rate and correlations with a trusted generator;
`dropkey/operator/kernels.py` computes the same on a GPU.
"""

from typing import Callable, Optional, Union

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed numbers, which is what torch multiplies
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
COLUMN = 0x9E3779B1 - (1 << 32)
CHUNK = 1 << 19  # draws at once on a CPU: their two 32-bit operands then stay in cache
# `draw` as one kernel, which gives None where the GPU cannot run it; set by `dropkey.operator.triton_ops`
cuda_draw: Optional[Callable[..., Optional[Tensor]]] = None


def new_seed(device: torch.device) -> Tensor:
    """A seed from the default generator of `device`, so that `torch.manual_seed` reproduces; never read on the host."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)


def as_seed(seed: Union[int, Tensor, None], device: torch.device) -> Tensor:
    if seed is None:
        return new_seed(device)
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    return torch.full((), seed, dtype=torch.int64, device=device)


def as_threshold(ratio: Union[float, Tensor], device: torch.device) -> Tensor:
    """The ratio in units of 2⁻³²: a tensor, so that another ratio neither recompiles nor breaks a CUDA graph."""
    if isinstance(ratio, Tensor):
        return (ratio.to(device, widest_float(device)) * 2**32).round().clamp(0, 2**32 - 1).long()
    return torch.full((), min(round(ratio * 2**32), 2**32 - 1), dtype=torch.int64, device=device)


def as_ratio(threshold: Tensor) -> Tensor:
    return threshold.to(widest_float(threshold.device)) / 2**32


def widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; the masks make torch's arithmetic shifts logical."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def row_keys(seed: Tensor, rows: Tensor) -> Tensor:
    """r1 and r2 of rows given by number (int64): int32, 2 × rows × 1."""
    states = mix64((rows * GOLDEN).add_(mix64(seed)))
    return states.view(torch.int32).view(-1, 2).t().contiguous().unsqueeze(-1)


def column_keys(columns: int, device: torch.device, first: int = 0) -> Tensor:
    """c of every column: int32."""
    return torch.arange(first, first + columns, dtype=torch.int32, device=device).mul_(COLUMN)


def signed_limit(threshold: Tensor) -> Tensor:
    """The threshold for draws that are read as signed 32-bit numbers."""
    return (threshold - (1 << 31)).to(torch.int32)


def draw_into(out: Tensor, rows: Tensor, columns: Tensor, limit: Tensor, scratch: Tensor) -> Tensor:
    """Draws into `out` (int32, rows × columns): 1 with probability threshold / 2³², else 0.

    Args:
        rows, columns: the `row_keys` and `column_keys` of this part of the table.
        limit: `signed_limit` of the threshold.
        scratch: int32 of the shape of `out`, overwritten.
    """
    torch.add(rows[0], columns, out=out)
    torch.bitwise_xor(rows[1], columns, out=scratch)
    return out.mul_(scratch).lt_(limit)


def draw(
    seed: Tensor, threshold: Tensor, rows: int, columns: int, *, first_column: int = 0, first_row: int = 0
) -> Tensor:
    """Boolean, rows × columns; True with probability threshold / 2³².

    Args:
        seed, threshold: int64 without dimensions, on the device of the result.
        first_column, first_row: the place of this part in the unlimited table of draws.
    """
    if cuda_draw is not None and seed.is_cuda and first_row == 0:
        drawn = cuda_draw(seed, threshold, rows, columns, first_column)
        if drawn is not None:
            return drawn
    result = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    if result.numel() == 0:
        return result
    numbers = torch.arange(first_row, first_row + rows, device=seed.device)
    of_rows, of_columns = row_keys(seed, numbers), column_keys(columns, seed.device, first_column)
    limit, step = signed_limit(threshold), max(1, CHUNK // columns) if seed.device.type == "cpu" else rows
    out, scratch = torch.empty(2, min(step, rows), columns, dtype=torch.int32, device=seed.device)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        keys = of_rows[:, start : start + count]
        result[start : start + count] = draw_into(out[:count], keys, of_columns, limit, scratch[:count])
    return result
