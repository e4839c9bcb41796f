"""What a Triton kernel is launched with. Shapes: B batch, H heads, N tokens, D head width."""

from typing import Optional

import torch
from torch import Tensor

from dropkey.operator.tiling import Tile


def padded(width: int) -> int:
    """The next power of two that a matrix product can take."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: torch's setting (`torch.set_float32_matmul_precision` and its kin)."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def constants(q: Tensor, bias: Optional[Tensor], seed: Optional[Tensor], column: bool) -> dict:
    """What the kernels of this call are specialised to, besides the tile."""
    kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1  # NO_BIAS, BOOLEAN, ADDITIVE in kernels.py
    drop, width = seed is not None, q.shape[3]
    return {
        **{"DROP": drop, "COLUMN": drop and column, "BIAS": kind},
        **{"PRECISION": precision(q.dtype), "WIDTH": padded(width), "D": width},
    }


def shape_of(tile: Tile) -> dict:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}


def launch(kernel, programs: int, near: Tensor, *arguments, **options) -> None:
    """Runs that many programs on the device of `near`; a launch of none is an error in CUDA."""
    if programs:
        with torch.cuda.device_of(near):
            kernel[(programs,)](*arguments, **options)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All other strides are as they come."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def readable(bias: Optional[Tensor]) -> tuple[Optional[Tensor], tuple[int, ...]]:
    """The bias as bytes or floats, and strides that stand still where it is broadcast."""
    if bias is None:
        return None, (0, 0, 0, 0)
    strides = tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return bias.view(torch.uint8) if bias.dtype == torch.bool else bias, strides


def tokens_first(x: Tensor) -> Tensor:
    """Empty, of the shape of x, B H N D, but B N H D in memory: what the layer around attention reshapes for free."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)
