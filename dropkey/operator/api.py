"""`attention`: the one public operator. Shapes: B batch, H heads, Q queries, K keys, D head width."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from dropkey import regularizers
from dropkey.operator.reference import reference
from dropkey.operator.sdpa import sdpa
from dropkey.regularizers import Grid, Window

IMPLS = ("reference", "sdpa")


def choose(impl: str, regularizer: str) -> str:
    """The implementation that `impl` stands for; `auto` is decided here and nowhere else.

    Raises:
        ValueError: an implementation that does not exist, or cannot do this regularizer.
    """
    on_logits = regularizers.KINDS[regularizer].on_logits
    if impl == "auto":
        return "sdpa" if on_logits else "reference"
    if impl not in IMPLS:
        raise ValueError(f"no impl '{impl}'; there are auto, {', '.join(IMPLS)}")
    if impl == "sdpa" and not on_logits:
        raise ValueError(f"impl=sdpa masks logits, and {regularizer} acts on weights after the softmax; take reference")
    return impl


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    regularizer: str = "dropkey",
    ratio: float,
    impl: str = "auto",
    scale: Optional[float] = None,
    bias: Optional[Tensor] = None,
    grid: Optional[Grid] = None,
    num_prefix: int = 0,
    window: Window = None,
    training: bool = True,
) -> Tensor:
    """softmax(scale * q kᵀ + bias) v with attention regularized.

    Args:
        q: B H Q D.
        k, v: B H K D.
        regularizer: none, dropout, dropkey, dropkey_block, dropkey_cross, dropkey_column or dropattention.
        ratio: drop probability in [0, 1). 0, `none` and training=False are plain attention, bit for bit.
        impl: auto, or one of IMPLS: the same semantics and the same distribution, another way to compute it.
        scale: of the logits; D ** -0.5 unless given.
        bias: added to the logits, or boolean with True where a query may look; broadcastable to B H Q K.
        grid, num_prefix, window: of the keys, see `dropkey.regularizers.draw`.
    Returns:
        B H Q D. A query that lost all its keys gives 0.
    Raises:
        ValueError: a ratio outside [0, 1), an unknown regularizer or impl, a pair of them that does not exist.
    Source: DropKey (Li et al., CVPR 2023), algorithm 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} lies outside [0, 1)")
    if regularizer != "none" and regularizer not in regularizers.KINDS:
        raise ValueError(f"no regularizer '{regularizer}'; there are none, {', '.join(regularizers.KINDS)}")
    if regularizer != "none":
        impl = choose(impl, regularizer)
    if regularizer == "none" or ratio == 0 or not training:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = (*q.shape[:-1], k.shape[-2])
    drop = regularizers.draw(
        regularizer, shape, ratio, device=q.device, grid=grid, num_prefix=num_prefix, window=window
    )
    if impl == "sdpa":
        return sdpa(q, k, v, drop, scale=scale, bias=bias)
    return reference(q, k, v, drop, regularizer=regularizer, ratio=ratio, scale=scale, bias=bias)
