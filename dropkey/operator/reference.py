"""The paper's two lines (mask the logits, then softmax) made safe. This is the specification of every other way.

Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from typing import Optional

import torch
from torch import Tensor

from dropkey import regularizers


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    drop: Tensor,
    *,
    regularizer: str,
    ratio: float,
    scale: float,
    bias: Optional[Tensor],
) -> Tensor:
    """Regularized attention given the mask `drop` (True = dropped, broadcastable to B H Q K).

    The paper adds -1e12 to dropped logits. -inf is the same without depending on the dtype (-1e12 overflows to NaN
    in fp16), except for a query that loses all its keys: it attends to nothing here (output 0, gradient 0), to
    everything alike there.
    """
    kind = regularizers.KINDS[regularizer]
    logits = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    if kind.on_logits:
        logits = logits.masked_fill(drop, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)  # no NaN to leak into gradients
    if not kind.on_logits:
        full = weights.to(torch.promote_types(weights.dtype, torch.float32))  # a sum of half weights is 1 % off
        weights = kind.reweigh(full, drop, ratio)
    return weights.to(v.dtype) @ v
