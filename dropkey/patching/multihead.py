"""What nn.MultiheadAttention computes, with regularized attention. Shapes: L queries, S keys, B batch, E embedding,
H heads, D head width."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey.patching.layer import AttentionRegularizer


def multi_head_attention(
    layer: AttentionRegularizer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Optional[Tensor],
    in_proj_bias: Optional[Tensor],
    bias_k: Optional[Tensor],
    bias_v: Optional[Tensor],
    add_zero_attn: bool,
    dropout_p: float,  # replaced by the regularizer
    out_proj_weight: Tensor,
    out_proj_bias: Optional[Tensor],
    *,
    key_padding_mask: Optional[Tensor] = None,
    need_weights: bool = True,
    attn_mask: Optional[Tensor] = None,
    q_proj_weight: Optional[Tensor] = None,
    k_proj_weight: Optional[Tensor] = None,
    v_proj_weight: Optional[Tensor] = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **_,
) -> tuple[Tensor, Optional[Tensor]]:
    """As `torch.nn.functional.multi_head_attention_forward`, with the same arguments: L B E (or L E), and the weights
    after regularization, B L S or B H L S.

    Raises:
        ValueError: is_causal without attn_mask.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True is only a hint: give attn_mask too")
    if single := query.dim() == 2:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    projections = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
    q, k, v = project((query, key, value), projections, in_proj_bias, bias_k, bias_v, num_heads)
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    bias = merge_masks(attn_mask, key_padding_mask, num_heads, k.shape[-2], q.dtype)
    weights = None
    if need_weights:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = layer((logits if bias is None else logits + bias).softmax(-1))
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = layer.attention(q, k, v, bias, None)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if single:
        out, weights = out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def project(inputs, projections, in_proj_bias, bias_k, bias_v, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three L B E to three B H L D, with the learned key and value appended."""
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (F.linear(*each) for each in zip(inputs, projections, biases, strict=True))
    if bias_k is not None:
        k, v = (torch.cat([x, b.expand(-1, x.shape[1], -1)]) for x, b in ((k, bias_k), (v, bias_v)))
    return tuple(x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))


def merge_masks(
    attn_mask: Optional[Tensor], padding: Optional[Tensor], heads: int, keys: int, dtype: torch.dtype
) -> Optional[Tensor]:
    """One additive mask, broadcastable to B H L S, from `attn_mask` (L S, or BH L S) and `padding` (B S)."""
    bias = None
    if attn_mask is not None:
        bias = as_additive(attn_mask, keys, dtype)
        bias = bias.unflatten(0, (-1, heads)) if bias.dim() == 3 else bias
    if padding is not None:
        padding = as_additive(padding.reshape(-1, 1, 1, padding.shape[-1]), keys, dtype)
        bias = padding if bias is None else bias + padding
    return bias


def as_additive(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Boolean masks (True: forbidden) as 0 and -inf; padded with 0 for keys that were appended."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return F.pad(mask, (0, keys - mask.shape[-1]))
