"""Arguments and compile-time options of the Triton kernels. Shapes: B batch, H heads, N tokens, D head width."""

from typing import Optional

import torch
from torch import Tensor

from dropkey.operator.tiling import Tile


def padded(width: int) -> int:
    """The next power of two that a matrix product can take."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Of float32 matrix products: torch's setting (`torch.set_float32_matmul_precision`)."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 or dtype != torch.float32 else "ieee"


def constants(q: Tensor, bias: Optional[Tensor], seed: Optional[Tensor], column: bool) -> dict:
    """Compile-time constants of a call, apart from the tile."""
    bias_kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1  # NO_BIAS, BOOLEAN, ADDITIVE in kernels.py
    drop, width = seed is not None, q.shape[3]
    return {
        **{"DROP": drop, "COLUMN": drop and column, "BIAS": bias_kind},
        **{"PRECISION": precision(q.dtype), "WIDTH": padded(width), "D": width},
    }


def tile_options(tile: Tile) -> dict:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}


def launch_kernel(kernel, programs: int, near: Tensor, *arguments, **options) -> None:
    """Runs so many programs on the device of `near`; in CUDA a launch of none would be an error."""
    if programs:
        with torch.cuda.device_of(near):
            kernel[(programs,)](*arguments, **options)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies where the last dimension is strided; all other strides are kept."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def bias_argument(bias: Optional[Tensor]) -> tuple[Optional[Tensor], tuple[int, ...]]:
    """The bias as bytes or floats, and its strides: 0 where it is broadcast."""
    if bias is None:
        return None, (0, 0, 0, 0)
    strides = tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return bias.view(torch.uint8) if bias.dtype == torch.bool else bias, strides


def empty_tokens_first(x: Tensor) -> Tensor:
    """Empty, of the shape of x (B H N D), but B N H D in memory, which the layer around attention reshapes for free."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)
