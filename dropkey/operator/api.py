"""`attention`: the one public operator. Shapes: B batch, H heads, Q queries, K keys, D head width."""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey import regularizers
from dropkey.bernoulli import as_ratio, as_seed, as_threshold
from dropkey.operator.cpu import cpu_attention
from dropkey.operator.reference import reference_attention
from dropkey.operator.sdpa import sdpa_attention
from dropkey.operator.triton_ops import triton_attention, triton_unsupported_reason
from dropkey.regularizers import Grid, Window

IMPLS = ("reference", "cpu", "triton", "sdpa")
IN_KERNEL = ("dropkey", "dropkey_column")  # masks that the Triton kernels draw themselves
LONG = 384  # keys: beyond, torch's flash attention with a mask is faster than `cpu` in float32 (scripts/benchmark.py)


def unsupported_reason(impl: str, regularizer: str, *tensors: Tensor) -> Optional[str]:
    """Why `impl` cannot compute this for the given q, k and v (without them: for any), or None."""
    if impl == "reference":
        return None
    if not regularizers.REGULARIZERS[regularizer].masks_logits:
        return f"masks logits, but {regularizer} acts on weights after the softmax; use impl=reference"
    if impl == "triton" and regularizer not in IN_KERNEL:
        return f"draws {' and '.join(IN_KERNEL)} only; use impl=sdpa"
    if impl == "cpu" and tensors and tensors[0].device.type != "cpu":
        return f"takes tensors on the CPU, not on {tensors[0].device}; use impl=triton or impl=sdpa"
    return triton_unsupported_reason(*tensors) if impl == "triton" and tensors else None


def select_impl(impl: str, regularizer: str, *tensors: Tensor) -> str:
    """The implementation that `impl` stands for, given q, k and v. `auto` is decided here and nowhere else. All
    implementations draw the same mask from the same seed, so the choice changes only speed, memory and rounding.

    Raises:
        ValueError: an implementation that does not exist, or cannot compute this.
    """
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"no impl '{impl}'; choose from auto, {', '.join(IMPLS)}")
    if impl != "auto":
        if reason := unsupported_reason(impl, regularizer, *tensors):
            raise ValueError(f"impl={impl} {reason}")
        return impl
    q, k, _ = tensors
    order = ["triton", "sdpa", "reference"]
    if q.device.type == "cpu":
        torch_is_faster = q.dtype.itemsize > 2 and k.shape[-2] > LONG
        order = ["sdpa", "reference"] if torch_is_faster else ["cpu", "sdpa", "reference"]
    return next(name for name in order if unsupported_reason(name, regularizer, *tensors) is None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    regularizer: str = "dropkey",
    ratio: Union[float, Tensor],
    impl: str = "auto",
    scale: Optional[float] = None,
    bias: Optional[Tensor] = None,
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
    seed: Union[int, Tensor, None] = None,
    training: bool = True,
) -> Tensor:
    """softmax(scale * q kᵀ + bias) v with attention regularized.

    Args:
        q: B H Q D.
        k, v: B H K D.
        regularizer: none, or a key of `dropkey.regularizers.REGULARIZERS`: dropkey, dropkey_block, dropout ...
        ratio: drop probability in [0, 1). 0, `none` and training=False are plain attention, bitwise identical. A tensor
            without dimensions is never read on the host: unlike a number it may change without recompiling, or
            within a CUDA graph.
        impl: auto, or one of IMPLS: the same mask from the same seed, computed in another way.
        scale: of the logits; D ** -0.5 by default.
        bias: added to the logits, or boolean with True where a query may attend; broadcastable to B H Q K.
        grid, num_prefix, window: of the keys, see `dropkey.regularizers.draw_mask`.
        seed: an integer of 64 bits, as a number or a tensor. The result is a pure function of it and the other
            arguments. By default it comes from the default generator of the device. Give one where a generator is
            not replayed, as by `torch.utils.checkpoint` with preserve_rng_state=False.
    Returns:
        B H Q D. A query that lost all its keys gives 0.
    Raises:
        ValueError: a ratio outside [0, 1), an unknown regularizer or impl, an impl that cannot compute the regularizer.
    Source: DropKey (Li et al., CVPR 2023), algorithm 1.
    """
    regularizers.check_name(regularizer)
    constant = not isinstance(ratio, Tensor)
    if constant and not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} lies outside [0, 1)")
    if impl != "auto" and regularizer != "none":
        select_impl(impl, regularizer, q, k, v)  # also where nothing is dropped, so that a mistake shows at once
    if regularizer == "none" or (constant and ratio == 0) or not training:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    layout = {"grid": grid, "num_prefix": num_prefix, "window": window}
    threshold, seed = as_threshold(ratio, q.device), as_seed(seed, q.device)
    return seeded_attention(q, k, v, regularizer, threshold, seed, impl=impl, scale=scale, bias=bias, **layout)


def seeded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regularizer: str,
    threshold: Tensor,
    seed: Tensor,
    *,
    impl: str,
    scale: Optional[float],
    bias: Optional[Tensor],
    **layout,
) -> Tensor:
    """`attention`, with ratio and seed as the tensors that `dropkey.bernoulli` takes."""
    if torch.is_autocast_enabled(q.device.type):  # as scaled_dot_product_attention does
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    impl = select_impl(impl, regularizer, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "triton":
        column = regularizer == "dropkey_column"
        return triton_attention(q, k, v, seed, threshold, scale=scale, bias=bias, column=column)
    drop = None
    if impl != "cpu" or regularizer != "dropkey":  # that one draws while it computes
        drop = regularizers.seeded_mask(regularizer, (*q.shape[:-1], k.shape[-2]), threshold, seed, **layout)
    if impl == "cpu":
        return cpu_attention(q, k, v, seed=seed, threshold=threshold, drop=drop, scale=scale, bias=bias)
    if impl == "sdpa":
        return sdpa_attention(q, k, v, drop, scale=scale, bias=bias)
    rule, ratio = regularizers.REGULARIZERS[regularizer], as_ratio(threshold)
    return reference_attention(q, k, v, drop, rule=rule, ratio=ratio, scale=scale, bias=bias)
