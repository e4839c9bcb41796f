"""Coin flips that are a pure function of (seed, row, column): the same on every device, in every kernel, in every
order of computation, so that forward, backward and recomputation drop the same keys without storing a mask.

A row gets two 32-bit keys r1, r2 from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a generator that passes
BigCrush; within the row, column n flips by (r1 + c)(r2 ^ c) modulo 2³², with c = n · 0x9E3779B1. That is four
instructions per flip; `tests/test_flips.py` holds its rate and its correlations against a trusted generator.
`dropkey/operator/kernels.py` computes the same on a GPU.
"""

from typing import Callable, Optional, Union

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed numbers, which is what torch multiplies
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
COLUMN = 0x9E3779B1 - (1 << 32)
on_gpu: Optional[Callable[..., Tensor]] = (
    None  # the same in one kernel, where `dropkey.operator.triton_attention` has it
)
CACHED = 1 << 19  # flips at once on a CPU: their two 32-bit operands then stay in cache


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
        wide = torch.float32 if device.type == "mps" else torch.float64
        return (ratio.to(device, wide) * 2**32).round().clamp(0, 2**32 - 1).long()
    return torch.full((), min(round(ratio * 2**32), 2**32 - 1), dtype=torch.int64, device=device)


def as_ratio(threshold: Tensor) -> Tensor:
    wide = torch.float32 if threshold.device.type == "mps" else torch.float64
    return threshold.to(wide) / 2**32


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; the masks make torch's arithmetic shifts logical."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def row_keys(seed: Tensor, rows: Tensor) -> Tensor:
    """r1 and r2 of the rows of those numbers (int64): int32, 2 × rows × 1."""
    states = mix64((rows * GOLDEN).add_(mix64(seed)))
    return states.view(torch.int32).view(-1, 2).t().contiguous().unsqueeze(-1)


def column_keys(columns: int, device: torch.device, first: int = 0) -> Tensor:
    """c of every column: int32."""
    return torch.arange(first, first + columns, dtype=torch.int32, device=device).mul_(COLUMN)


def as_limit(threshold: Tensor) -> Tensor:
    """What a signed 32-bit number must stay below to be a hit."""
    return (threshold - (1 << 31)).to(torch.int32)


def fill(out: Tensor, keys: Tensor, columns: Tensor, limit: Tensor, spare: Tensor) -> Tensor:
    """Flips into `out` (int32, rows × columns): 1 with probability threshold / 2³², else 0.

    Args:
        keys: 2 × rows × 1, the `row_keys` of these rows.
        columns: the `column_keys`.
        limit: `as_limit` of the threshold.
        spare: int32 of the shape of `out`, overwritten.
    """
    torch.add(keys[0], columns, out=out)
    torch.bitwise_xor(keys[1], columns, out=spare)
    return out.mul_(spare).lt_(limit)


def bernoulli(
    seed: Tensor, threshold: Tensor, rows: int, columns: int, *, first_column: int = 0, first_row: int = 0
) -> Tensor:
    """Boolean, rows × columns; True with probability threshold / 2³².

    Args:
        seed, threshold: int64 without dimensions, on the device of the result.
        first_column, first_row: where the part of the endless table of flips begins.
    """
    if on_gpu is not None and seed.is_cuda and first_row == 0:
        return on_gpu(seed, threshold, rows, columns, first_column)
    result = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    if result.numel() == 0:
        return result
    numbers = torch.arange(first_row, first_row + rows, device=seed.device)
    keys, limit = row_keys(seed, numbers), as_limit(threshold)
    names = column_keys(columns, seed.device, first_column)
    step = max(1, CACHED // columns) if seed.device.type == "cpu" else rows
    out = torch.empty(min(step, rows), columns, dtype=torch.int32, device=seed.device)
    spare = torch.empty_like(out)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        part = slice(0, end - start)
        result[start:end] = fill(out[part], keys[:, start:end], names, limit, spare[part])
    return result
