"""DropKey attention through the Triton kernels: the mask is drawn where it is used, memory is linear in the tokens.

Shapes: B batch, H heads, Q queries, K keys, D head width. Triton is imported at the first use;
`triton_unsupported_reason` tells where it is missing or cannot take the tensors.

Results are bitwise reproducible on the same device with the same tiling, which is why the tiling comes from a rule and
not from timing candidates at run time.
"""

import importlib.util
from typing import Optional

import torch
from torch import Tensor

from dropkey import bernoulli
from dropkey.operator.kernel_options import (
    bias_argument,
    ceil_div,
    constants,
    empty_tokens_first,
    launch_kernel,
    padded,
    rows_contiguous,
    tile_options,
)
from dropkey.operator.tiling import tiling_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # head width


# ------------------------------------------------------------------------------------------------ what is supported


@torch.compiler.assume_constant_result
def triton_missing() -> bool:
    return importlib.util.find_spec("triton") is None


@torch.compiler.assume_constant_result
def gpu_too_old() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether the kernels run on the CPU, because TRITON_INTERPRET=1 was set when Triton and they were imported."""
    import triton
    import triton.language

    from dropkey.operator import kernels

    return not any(isinstance(function, triton.JITFunction) for function in (triton.language.max, kernels.forward))


def triton_unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> Optional[str]:
    """Why the kernels cannot take these tensors, in one line, or None."""
    if triton_missing():
        return "needs triton, which is not installed"
    if gpu_too_old():
        return "needs a GPU of compute capability 8.0 or more"
    if not q.is_cuda and not interpreted():
        return f"takes tensors on a GPU, not on {q.device}"
    if q.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
    if q.dtype == torch.bfloat16 and interpreted():
        return "is wrong in bfloat16 under Triton's interpreter"
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return "takes q, k and v of one dtype on one device"
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return f"takes q as B H Q D, k and v as B H K D, not {', '.join(str(tuple(x.shape)) for x in (q, k, v))}"
    if not 0 < q.shape[3] <= WIDEST:
        return f"takes heads up to {WIDEST} wide, not {q.shape[3]}"
    return None


# ---------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("dropkey::triton_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    threshold: Optional[Tensor],
    scale: float,
    column: bool,
) -> tuple[Tensor, Tensor]:
    """Attention, B H Q D, and for backward the log2 of each query's sum of weights, B H Q."""
    from dropkey.operator import kernels

    q, k, v = rows_contiguous(q, k, v)
    (batch, heads, queries, _), keys, tile = q.shape, k.shape[2], tiling_of(q, k).forward
    out, lse = empty_tokens_first(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    raw_bias, bias_strides = bias_argument(bias)
    tensors = (q, k, v, raw_bias, seed, threshold, out, lse, scale)
    strides = (q.stride(), k.stride(), v.stride(), bias_strides, out.stride())
    options = {**constants(q, bias, seed, column), "RAGGED": keys % tile.columns != 0, **tile_options(tile)}
    programs = batch * heads * ceil_div(queries, tile.rows)
    launch_kernel(kernels.forward, programs, q, *tensors, *strides, heads, queries, keys, **options)
    return out, lse


@forward.register_fake
def _(q, k, v, bias, seed, threshold, scale, column):
    return empty_tokens_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def prepare(dout: Tensor, out: Tensor, seed: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """delta (B H Q) and, with a seed, the states of the mask's rows (B H Q): see the kernel."""
    from dropkey.operator import kernels_backward as kernels

    batch, heads, queries, width = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)
    states = None if seed is None else torch.empty_like(delta, dtype=torch.int64)
    rows = max(16, 8192 // padded(width))
    arguments = (out, dout, delta, seed, states, out.stride(), dout.stride(), heads, queries)
    programs = batch * heads * ceil_div(queries, rows)
    launch_kernel(kernels.prepare, programs, out, *arguments, WIDTH=padded(width), D=width, ROWS=rows)
    return delta, states


@torch.library.custom_op("dropkey::triton_backward", mutates_args=())
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    threshold: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    column: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from dropkey.operator import kernels_backward as kernels

    dout, q, k, v = rows_contiguous(dout, q, k, v)
    (batch, heads, queries, _), keys, tiling = q.shape, k.shape[2], tiling_of(q, k)
    delta, states = prepare(dout, out, None if column else seed)
    dq, dk, dv = empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)
    raw_bias, bias_strides = bias_argument(bias)
    before, sizes = (q, k, v, raw_bias, seed, threshold), (heads, queries, keys)
    strides = (q.stride(), k.stride(), v.stride(), bias_strides, dout.stride(), dq.stride())
    common = constants(q, bias, seed, column)
    alone = 0 < keys <= tiling.alone.columns
    tile = tiling.alone if alone else tiling.keys
    tensors = (*before, states, dout, lse, delta, dq, dk, dv, scale, *strides, dk.stride(), dv.stride(), *sizes)
    programs = batch * heads * ceil_div(keys, tile.columns)
    launch_kernel(kernels.backward_keys, programs, q, *tensors, **common, **tile_options(tile), ALONE=alone)
    if not alone:
        tile = tiling.queries
        options = {**common, **tile_options(tile), "RAGGED": keys % tile.columns != 0}
        programs = batch * heads * ceil_div(queries, tile.rows)
        tensors = (*before, dout, lse, delta, dq, scale, *strides, *sizes)
        launch_kernel(kernels.backward_queries, programs, q, *tensors, **options)
    return dq, dk, dv


@backward.register_fake
def _(dout, q, k, v, bias, seed, threshold, out, lse, scale, column):
    return empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)


@torch.library.custom_op("dropkey::triton_backward_bias", mutates_args=())
def backward_bias(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    seed: Optional[Tensor],
    threshold: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    column: bool,
) -> Tensor:
    """The gradient of an additive bias, contiguous.

    One program for each tile of the bias adds up all samples, heads, queries and keys that share it. That repeats two
    matrix products, but needs no atomic additions and no B·H·Q·K in memory. It is slow for a bias with few entries
    (1·1·1·1 is one program).
    """
    from dropkey.operator import kernels_backward as kernels

    dout, q, k, v = rows_contiguous(dout, q, k, v)
    (batch, heads, queries, _), keys, tile = q.shape, k.shape[2], tiling_of(q, k).queries
    delta, _ = prepare(dout, out, None)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    down, across = ceil_div(bias.shape[2], tile.rows), ceil_div(bias.shape[3], tile.columns)
    tensors = (q, k, v, bias, seed, threshold, dout, lse, delta, dbias, scale)
    strides = (q.stride(), k.stride(), v.stride(), bias_argument(bias)[1], dout.stride(), tuple(bias.shape))
    each = {"EACH_M": bias.shape[2] == queries, "EACH_N": bias.shape[3] == keys}
    options = {**constants(q, bias, seed, column), **tile_options(tile), **each}
    programs = bias.shape[0] * bias.shape[1] * down * across
    launch_kernel(kernels.backward_bias, programs, q, *tensors, *strides, batch, heads, queries, keys, **options)
    return dbias


@backward_bias.register_fake
def _(dout, q, k, v, bias, seed, threshold, out, lse, scale, column):
    return torch.empty_like(bias, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.column = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def gradients(ctx, dout, _):
    saved = (dout, *ctx.saved_tensors, ctx.scale, ctx.column)
    dq = dk = dv = dbias = None
    if any(ctx.needs_input_grad[:3]):
        dq, dk, dv = backward(*saved)
    if ctx.needs_input_grad[3]:
        dbias = backward_bias(*saved)
    return dq, dk, dv, dbias, None, None, None, None


forward.register_autograd(gradients, setup_context=setup_context)


@torch.library.custom_op("dropkey::triton_bernoulli", mutates_args=())
def draw(seed: Tensor, threshold: Tensor, rows: int, columns: int, first_column: int = 0) -> Tensor:
    """`dropkey.bernoulli.draw` in one kernel: boolean, rows × columns, True with probability threshold / 2³²."""
    from dropkey.operator import kernels

    result = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    tile = {"ROWS": 16, "COLUMNS": 256} if columns > 64 else {"ROWS": 64, "COLUMNS": 64}
    programs = ceil_div(rows, tile["ROWS"]) * ceil_div(columns, tile["COLUMNS"])
    sizes = (rows, columns, first_column)
    launch_kernel(kernels.draw, programs, seed, seed, threshold, result.view(torch.uint8), *sizes, **tile)
    return result


@draw.register_fake
def _(seed, threshold, rows, columns, first_column=0):
    return torch.empty(rows, columns, dtype=torch.bool, device=seed.device)


def draw_if_possible(seed: Tensor, threshold: Tensor, rows: int, columns: int, first_column: int) -> Optional[Tensor]:
    """`draw`, or None on a GPU that is too old for it."""
    return None if gpu_too_old() else draw(seed, threshold, rows, columns, first_column)


if not triton_missing():  # CUDA is not asked here: who has asked it cannot fork processes that compute on it
    bernoulli.cuda_draw = draw_if_possible


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Optional[Tensor],
    threshold: Optional[Tensor],
    *,
    scale: float,
    bias: Optional[Tensor] = None,
    column: bool = False,
) -> Tensor:
    """softmax(scale * q kᵀ + bias) v without the keys dropped, whose logits are -inf.

    Args:
        q: B H Q D.
        k, v: B H K D.
        seed: of `dropkey.bernoulli`, int64 without dimensions, on the device; query m has row (b * H + h) * Q + m. None
            drops nothing.
        threshold: int64 without dimensions, on the device: the ratio in units of 2⁻³².
        bias: added to the logits, or boolean with True where a query may attend; broadcastable to B H Q K.
        column: one draw for each (sample, head, key), of row b * H + h, shared by all queries.
    Returns:
        B H Q D, in memory B Q H D. A query without keys gives 0 and takes gradient 0.
    Raises:
        ValueError: tensors that `triton_unsupported_reason` names.
    """
    reason = triton_unsupported_reason(q, k, v)
    if reason:
        raise ValueError(f"the Triton kernels: {reason}")
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
    if scale <= 0:  # -inf times 0 is NaN, and the greatest logit would be the least
        q, scale = q * scale, 1.0
    return forward(q, k, v, bias, seed, threshold, scale, column)[0]
