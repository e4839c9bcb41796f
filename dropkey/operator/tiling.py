"""Which tiles the Triton kernels take: by rule, not by timing candidates at run time. Another tiling adds in another
order, so a run resumed on a busier machine would give other results."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Queries by keys that a program holds at once, its warps, and the depth of its pipeline of loads."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiling:
    """The tile of each kernel. Where all keys fit into the columns of `alone`, one kernel does the whole backward pass;
    otherwise `keys` computes dk and dv, `queries` dq. A bias with gradient takes the tile of `queries`."""

    forward: Tile
    keys: Tile
    queries: Tile
    alone: Tile


NEVER = Tile(16, 0, 4, 1)  # as `alone`: backward in two kernels
HOPPER = 232448  # bytes of shared memory for a program on a Hopper GPU
ROOMY = 160 * 1024  # bytes of shared memory of data-centre GPUs since 2020; others have less


def tiling_for(queries: int, keys: int, width: int, dtype: torch.dtype, shared_memory: int = HOPPER) -> Tiling:
    """The tiling for so many queries and keys on a GPU with so many bytes of shared memory for a program.

    Compiled for Hopper in bfloat16, these are the tiles with the fewest instructions per logit among those that spill
    (almost) no registers, up to a width of 128. `scripts/benchmark.py tune` measures `CANDIDATES` on a GPU.
    """
    roomy = shared_memory >= ROOMY
    if dtype == torch.float32:
        return full_precision(width)
    if width <= 64:
        alone = Tile(64, 128, 8, 2) if keys > 64 else Tile(64, 64, 4, 2)
        if keys > 128:
            alone = Tile(32, 256, 8, 2) if roomy else NEVER
        forward = Tile(128, 64, 4, 3) if queries > 128 else Tile(64, 64, 4, 3)
        return Tiling(forward, Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), alone)
    if width <= 128 and roomy:
        forward = Tile(128, 64, 8, 3) if queries > 128 else Tile(64, 64, 4, 3)
        return Tiling(forward, Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2))
    if width <= 128:
        return Tiling(Tile(64, 32, 4, 3), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), NEVER)
    return Tiling(Tile(64, 32, 4, 1), Tile(32, 64, 8, 1), Tile(64, 32, 4, 1), NEVER)


def full_precision(width: int) -> Tiling:
    """For float32, whose tiles take twice the space and use no tensor cores unless rounded to tf32."""
    if width <= 64:
        return Tiling(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), NEVER)
    if width <= 128:
        return Tiling(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), NEVER)
    return Tiling(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), NEVER)


# To be measured: tiles for each kernel on its own, with heads up to 128 wide, in half precision.
CANDIDATES = {
    "forward": [
        *(Tile(*size, 4, stages) for size, stages in product([(64, 32), (64, 64), (64, 128), (128, 64)], (2, 3))),
        *(Tile(*size, 8, stages) for size, stages in product([(128, 32), (128, 64), (128, 128)], (2, 3))),
    ],
    "keys": [
        *(Tile(*size, 4, stages) for size, stages in product([(32, 64), (64, 64), (32, 128)], (1, 2, 3))),
        *(Tile(*size, 8, stages) for size, stages in product([(32, 128), (64, 128)], (1, 2, 3))),
    ],
    "queries": [
        *(Tile(*size, 4, stages) for size, stages in product([(64, 32), (64, 64), (128, 64)], (1, 2, 3))),
        *(Tile(*size, 8, stages) for size, stages in product([(128, 32), (128, 64)], (1, 2, 3))),
    ],
    "alone": [
        NEVER,
        *(Tile(*size, 4, stages) for size, stages in product([(32, 64), (64, 64), (32, 128)], (1, 2))),
        *(Tile(*size, 8, stages) for size, stages in product([(32, 128), (64, 128), (32, 256), (64, 256)], (1, 2))),
    ],
}

forced: Optional[Tiling] = None


@contextmanager
def using(tiling: Tiling):
    """Within, `tiling` is used instead of `tiling_for`, for measuring and for tests: in all threads, because autograd
    calls backward from threads of its own."""
    global forced
    before, forced = forced, tiling
    try:
        yield
    finally:
        forced = before


def tiling_of(q: Tensor, k: Tensor) -> Tiling:
    return forced or tiling_for(q.shape[2], k.shape[2], q.shape[3], q.dtype, shared_memory(q.device))


@lru_cache(maxsize=None)
def shared_memory(device: torch.device) -> int:
    """Bytes for a program. The interpreter, on a CPU, uses the tiles of a large GPU."""
    if device.type != "cuda":
        return HOPPER
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)  # not on AMD
