"""`AttentionRegularizer`: the module that knows what is dropped at one attention layer, and drops it."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dropkey import regularizers
from dropkey.bernoulli import as_ratio, as_seed, as_threshold, new_seed
from dropkey.operator.api import seeded_attention
from dropkey.patching.find import key_grid
from dropkey.regularizers import Grid, Window

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What `apply` was asked for, with the schedule of the latest `set_ratio`."""

    schedule: str
    end: float
    scope: str
    layers: tuple[str, ...]
    softmax: tuple[str, ...]
    modules: tuple[str, ...]


class AttentionRegularizer(nn.Module):
    """Replaces a module's `attn_drop`: identity in evaluation, the regularizer on weights in training."""

    p = 0.0  # what fused attention layers read as their dropout probability

    def __init__(self, regularizer: str, window: Window, impl: str, kind: str, grid: Optional[Grid], num_prefix: int):
        super().__init__()
        self.regularizer, self.window, self.impl = regularizer, window, impl
        self.kind, self.grid, self.num_prefix = kind, grid, num_prefix
        self.grid_seen: Optional[Grid] = None  # on which the keys of the latest call lay, for `shown_window`
        self.always = False  # active in evaluation too, for Monte Carlo
        self.request: Optional[Request] = None  # of `apply`, with the two below, for `set_ratio` and `report`
        self.mechanism, self.block = "", ("", 0)
        self.replaced: tuple[nn.Module, ...] = ()  # the module's own dropout; in a tuple, so that it is no submodule
        # Tensors, because compiled code and CUDA graphs read new values from the same place; no buffers, because
        # `to_empty` would lose their values and the state_dict is to stay that of the unpatched model.
        self.threshold, self.mask_seed = as_threshold(0.0, CPU), as_seed(0, CPU)
        self.ratio, self.seed = 0.0, None

    @property
    def ratio(self) -> float:
        return self._ratio

    @ratio.setter
    def ratio(self, ratio: float) -> None:
        """Reaches a compiled model too, which guards on whether anything drops, not on how much."""
        self._ratio, self.drops = ratio, ratio > 0
        self.threshold.copy_(as_threshold(ratio, self.threshold.device))

    @property
    def seed(self) -> Optional[int]:
        """Of the masks (64 bits). None: each call takes one from the default generator of the device."""
        return self._seed

    @seed.setter
    def seed(self, seed: Optional[int]) -> None:
        """Reaches a compiled model too, which guards on whether there is a seed, not on which."""
        self._seed, self.has_seed = seed, seed is not None
        self.mask_seed.fill_(seed or 0)

    @property
    def active(self) -> bool:
        return self.drops and (self.training or self.always)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        moved = fn(self.threshold)
        device = self.threshold.device if moved.is_meta else moved.device
        self.threshold, self.mask_seed = as_threshold(self._ratio, device), as_seed(self._seed or 0, device)
        return self

    def key_layout(self, keys: int) -> dict:
        """Arguments `grid`, `num_prefix` and `window` of `regularizers.seeded_mask` for so many keys."""
        if self.regularizer not in regularizers.STRUCTURED:
            return {}
        if self.kind == "outlook":  # the keys are a k x k neighbourhood
            grid, prefix = key_grid(keys, None, 0)
        else:
            grid, prefix = key_grid(keys, self.grid, self.num_prefix)
        if not torch.compiler.is_compiling():  # compiled code would be made again for what is only shown
            self.grid_seen = grid
        return {"grid": grid, "num_prefix": prefix, "window": self.window}

    def shown_window(self) -> str:
        """The window for people to read: a share in cells too, as soon as a call has shown the grid."""
        if not isinstance(self.window, float):
            return str(self.window)
        if self.grid_seen is None:
            return f"{self.window:g} of the grid"
        cells = regularizers.window_cells(self.window, self.grid_seen)
        return f"{self.window:g} of {self.grid_seen[0]} x {self.grid_seen[1]} = {cells} cells"

    def forward(self, weights: Tensor) -> Tensor:
        """weights: ... Q K, each row a distribution over keys."""
        if not self.active:
            return weights
        rows = weights.flatten(1, -3) if weights.dim() > 4 else weights  # outlook attention: B H N K K
        threshold, seed = self.threshold_and_seed(rows.device)
        layout = self.key_layout(rows.shape[-1])
        drop = regularizers.seeded_mask(self.regularizer, tuple(rows.shape), threshold, seed, **layout)
        # fp32 at least, because a sum of bf16 weights is off by up to 1 % and would scale the output
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        kept = regularizers.REGULARIZERS[self.regularizer].reweigh(rows, drop, as_ratio(threshold))
        return kept.to(weights.dtype).view_as(weights)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], scale: Optional[float]) -> Tensor:
        """Regularized attention of B H Q D, B H K D, B H K D, as `dropkey.attention`."""
        layout = self.key_layout(k.shape[-2])
        threshold, seed = self.threshold_and_seed(q.device)
        return seeded_attention(
            q, k, v, self.regularizer, threshold, seed, impl=self.impl, scale=scale, bias=bias, **layout
        )

    def threshold_and_seed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For one call. The seed is a copy: a later `seed_masks` must not change what the backward pass reads."""
        if self.threshold.device != device:  # a model made on the meta device, or split over devices
            self.threshold, self.mask_seed = self.threshold.to(device), self.mask_seed.to(device)
        return self.threshold, self.mask_seed.clone() if self.has_seed else new_seed(device)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.shown_window()}"
        return f"{self.regularizer}, ratio={self.ratio:.4g}{window}, layer={self.kind}"
