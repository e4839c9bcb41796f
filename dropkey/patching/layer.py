"""`Regularize`: the module that holds what is dropped at one attention layer, and does it."""

from typing import Optional

import torch
from torch import Tensor, nn

from dropkey import regularizers
from dropkey.operator import attention
from dropkey.patching.sites import key_grid
from dropkey.regularizers import Grid, Window


class Regularize(nn.Module):
    """Stands where a module's `attn_drop` was: identity in evaluation, the regularizer on weights in training."""

    p = 0.0  # what fused attention layers read as their dropout probability

    def __init__(self, kind: str, window: Window, impl: str, site: str, grid: Optional[Grid], num_prefix: int):
        super().__init__()
        self.kind, self.ratio, self.window, self.impl = kind, 0.0, window, impl
        self.site, self.grid, self.num_prefix = site, grid, num_prefix
        self.always = False  # on in evaluation too, for Monte Carlo

    @property
    def active(self) -> bool:
        return self.ratio > 0 and (self.training or self.always)

    def where_keys_lie(self, keys: int) -> dict:
        """Arguments `grid`, `num_prefix` and `window` of `regularizers.draw` for a layer with so many keys."""
        if self.kind not in regularizers.STRUCTURED:
            return {}
        if self.site == "outlook":  # the keys are a k x k neighbourhood
            grid, prefix = key_grid(keys, None, 0)
        else:
            grid, prefix = key_grid(keys, self.grid, self.num_prefix)
        return {"grid": grid, "num_prefix": prefix, "window": self.window}

    def forward(self, weights: Tensor) -> Tensor:
        """weights: ... Q K, each row a distribution over keys."""
        if not self.active:
            return weights
        rows = weights.flatten(1, -3) if weights.dim() > 4 else weights  # outlook attention: B H N K K
        where = self.where_keys_lie(rows.shape[-1])
        drop = regularizers.draw(self.kind, tuple(rows.shape), self.ratio, device=rows.device, **where)
        # fp32 at least, because a sum of bf16 weights is off by up to 1 % and would scale the output
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        kept = regularizers.KINDS[self.kind].reweigh(rows, drop, self.ratio)
        return kept.to(weights.dtype).view_as(weights)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], scale: Optional[float]) -> Tensor:
        return attention(
            q,
            k,
            v,
            regularizer=self.kind,
            ratio=self.ratio,
            impl=self.impl,
            scale=scale,
            bias=bias,
            **self.where_keys_lie(k.shape[-2]),
        )

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"{self.kind}, ratio={self.ratio:.4g}{window}, site={self.site}"
