"""DropKey through torch's scaled_dot_product_attention, with the dropped keys as an additive mask."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# -inf is all exponent bits and the sign; as an integer that is the smallest value plus the mantissa's range.
# Multiplying the mask's 0 and 1 by it costs a tenth of `masked_fill`, whose branches a random mask mispredicts.
MINUS_INF = {
    torch.float32: (torch.int32, -(1 << 23)),
    torch.bfloat16: (torch.int16, -(1 << 7)),
    torch.float16: (torch.int16, -(1 << 10)),
    torch.float64: (torch.int64, -(1 << 52)),
}


def minus_inf_where(drop: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where dropped, 0 elsewhere."""
    integer, minus_inf = MINUS_INF[dtype]
    return drop.to(integer).mul_(minus_inf).view(dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, drop: Tensor, *, scale: float, bias: Optional[Tensor]) -> Tensor:
    """Attention without the keys in `drop`; a query that lost all its keys gives 0. Only for regularizers whose
    `masks_logits` is true."""
    mask = minus_inf_where(drop, q.dtype)
    if bias is not None:
        mask = mask.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else mask + bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
