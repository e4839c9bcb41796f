"""The paper's two lines (mask the logits, then softmax) in a numerically stable form: the specification that all other
implementations are tested against. Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from typing import Optional

import torch
from torch import Tensor

from dropkey.regularizers import Regularizer


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drop: Tensor,
    *,
    rule: Regularizer,
    ratio: Tensor,
    scale: float,
    bias: Optional[Tensor],
) -> Tensor:
    """Regularized attention given the mask `drop` (True = dropped, broadcastable to B H Q K).

    The paper adds -1e12 to dropped logits. -inf is the same without depending on the dtype (-1e12 overflows to NaN
    in fp16), except for a query that loses all its keys: here it attends to nothing (output 0, gradient 0), there to
    all keys equally.
    """
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if rule.masks_logits:
        logits = logits.masked_fill(drop, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    full = torch.promote_types(logits.dtype, torch.float32)  # sums of half weights are 1 % off, gradients overflow
    weights = logits.masked_fill(empty, 0.0).softmax(-1, dtype=full)
    weights = weights.masked_fill(empty, 0.0)  # a row of zeros, without a NaN that would reach the gradients
    if not rule.masks_logits:
        weights = rule.reweigh(weights, drop, ratio)
    return weights.to(v.dtype) @ v
