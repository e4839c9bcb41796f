"""Ways to drop keys, and what they are compared with: each takes q, k and v of shape B H N D."""

import functools
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import dropkey
from dropkey import bernoulli
from dropkey.operator.triton_ops import triton_attention

RATIO = 0.1
PLAIN = "scaled_dot_product_attention"


def two_lines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Algorithm 1 of the paper as printed."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mask = torch.full_like(logits, RATIO)
    logits = logits + torch.bernoulli(mask) * -1e12
    return logits.softmax(-1) @ v


def boolean_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.rand(*q.shape[:-1], k.shape[-2], device=q.device) >= RATIO
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def attention_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not DropKey, but what DropKey replaces."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=RATIO)


def ones_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout, divided by the result for a column of ones."""
    joined = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8), value=1.0), dropout_p=RATIO)
    out, total = joined[..., :-8], joined[..., -1:]
    return out / total.masked_fill(total == 0, 1.0)


def flex(q: Tensor, k: Tensor, v: Tensor, seed: Optional[Tensor] = None) -> Tensor:
    """FlexAttention with the same Bernoulli draws in its score_mod."""
    keys = flex_row_keys(q, seed)
    return compiled_flex()(q, k, v, score_mod=flex_score_mod(keys, q.shape[1], q.shape[2]))


def flex_row_keys(q: Tensor, seed: Optional[Tensor]) -> Tensor:
    rows = torch.arange(q.shape[:-1].numel(), device=q.device)
    return bernoulli.row_keys(bernoulli.as_seed(seed, q.device), rows)[..., 0]


def flex_score_mod(keys: Tensor, heads: int, queries: int) -> Callable:
    limit = bernoulli.signed_limit(bernoulli.as_threshold(RATIO, keys.device))

    def drop(score, b, h, m, n):
        row = (b * heads + h) * queries + m
        # in int64 first: with int32 arithmetic alone the forward pass is right, but dq and dk are wrong
        column = (n.to(torch.int64) * (bernoulli.COLUMN % 2**32)).to(torch.int32)
        return torch.where((keys[0, row] + column) * (keys[1, row] ^ column) < limit, -float("inf"), score)

    return drop


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def nothing_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The Triton kernels without DropKey."""
    return triton_attention(q, k, v, None, None, scale=q.shape[-1] ** -0.5)


def ways_for(q: Tensor) -> dict[str, Callable]:
    own = functools.partial(dropkey.attention, ratio=RATIO)
    impl = "triton" if q.is_cuda else "cpu"
    ways = {
        PLAIN: F.scaled_dot_product_attention,
        f"DropKey, impl={impl}": functools.partial(own, impl=impl),
        "DropKey, impl=sdpa (additive mask)": functools.partial(own, impl="sdpa"),
        "DropKey, boolean mask": boolean_mask,
        "DropKey, the paper's two lines": two_lines,
        "DropKey, dropout and a ones column": ones_column,
        "attention dropout": attention_dropout,
    }
    if q.is_cuda:
        ways |= {"DropKey, FlexAttention": flex, "impl=triton, nothing dropped": nothing_dropped}
    return ways
