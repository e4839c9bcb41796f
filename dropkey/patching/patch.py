"""Replaces attention layers by regularized ones. No parameter and no key of the state_dict is added, and in evaluation
the output is bitwise identical to that of the unpatched module. There are three mechanisms:

- "fused": the module's class becomes a subclass whose training forward passes calls of `scaled_dot_product_attention`
  and `multi_head_attention_forward` to the operator;
- "weights": its `attn_drop` becomes an `AttentionRegularizer`, which masks and renormalises softmaxed weights; exact
  for any attention that runs softmax, then `attn_drop` (windows and relative biases included);
- "softmax": a subclass as above, which masks and renormalises the result of softmax over the last dimension.

A module's own dropout of attention weights is replaced.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from dropkey import regularizers, schedules
from dropkey.operator import select_impl
from dropkey.patching.find import KIND_OF_CLASS, AttentionModule, find_attention_modules, original_class
from dropkey.patching.layer import AttentionRegularizer
from dropkey.patching.mechanisms import RegularizedAttention, regularized_class
from dropkey.regularizers import Grid, Window
from dropkey.seeds import derive_seed

NOT_FOUND = (
    ": no module holds its dropout of weights as `attn_drop`, calls scaled_dot_product_attention in forward or is "
    "nn.MultiheadAttention; a class that calls softmax can be named in dropkey.patching.find.SOFTMAX_CLASSES"
)


@dataclass
class RegularizedLayer:
    """One regularized attention layer, as reported."""

    name: str
    kind: str  # self, class, cross, outlook, token
    ratio: float
    mechanism: str  # fused, weights or softmax
    module: AttentionRegularizer = field(repr=False, compare=False)

    def __str__(self) -> str:
        has_window = self.module.window is not None and self.ratio > 0
        window = f"  window {self.module.shown_window()}" if has_window else ""
        name = self.name or "(the model)"
        return f"{name:<36} {self.kind:<8} {self.mechanism:<8} ratio {self.ratio:.4f}{window}"


@dataclass
class Report:
    """What `apply` did. As text it shows a window relative to the grid in cells after the first forward pass, when each
    layer knows its grid."""

    regularizer: str
    schedule: str
    impl: str  # of the operator, at fused layers
    layers: list[RegularizedLayer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __str__(self) -> str:
        if self.regularizer == "none":
            return "no regularizer: attention is unchanged"
        impl = f", impl {self.impl}" if any(layer.mechanism == "fused" for layer in self.layers) else ""
        lines = [f"{self.regularizer} ({self.schedule}) at {len(self.layers)} attention layers{impl}"]
        lines += [f"  {layer}" for layer in self.layers]
        return "\n".join(lines + [f"  {name:<36} skipped: {reason}" for name, reason in self.skipped])


def model_grid(model: nn.Module) -> tuple[Optional[Grid], int]:
    """The patch grid (height, width), where the model has one, and the number of prefix tokens."""
    embed = getattr(model, "patch_embed", None)
    grid = getattr(model, "grid_size", None) or getattr(embed, "grid_size", None)
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if grid is None and size and patch:
        pair = [(x, x) if isinstance(x, int) else tuple(x) for x in (size, patch)]
        grid = (pair[0][0] // pair[1][0], pair[0][1] // pair[1][1])
    positions = getattr(model, "pos_embed", None)
    if grid is None and isinstance(positions, Tensor) and positions.dim() == 4:  # VOLO: 1, height, width, channels
        grid = positions.shape[1:3]
    return (tuple(grid) if grid else None), getattr(model, "num_prefix_tokens", 1)


def apply(
    model: nn.Module,
    regularizer: str = "dropkey",
    ratio: float = 0.1,
    schedule: str = "decreasing",
    *,
    end: float = 0.0,
    window: Window = None,
    layers: tuple[str, ...] = ("self", "class"),
    impl: str = "auto",
    grid: Optional[Grid] = None,
) -> Report:
    """Regularizes the attention layers of `model`, in place.

    Args:
        ratio: drop probability; the peak when the schedule varies it over depth.
        schedule, end: see `dropkey.schedules.ratios`; counted are the layers taken, in forward order.
        window: of dropkey_block, dropkey_cross and their `column` variants: an odd number of cells; or a float in
            (0, 1), the share of the shorter side of each layer's grid, see `dropkey.regularizers.window_cells`; of a
            cross also "full".
        layers: attention layers to act on: self; class (a class token or another single query attends to the keys);
            cross (queries and keys of different sequences); outlook (VOLO); token (T2T's token transformers).
        impl: how fused layers compute attention, see `dropkey.attention`.
        grid: height and width of the patch grid, for models without an attribute that has it.
    Returns:
        The layers with their ratios, and what was skipped and why.
    Raises:
        ValueError: an unknown regularizer, schedule, layer or impl; a window that Block or Cross cannot have; a model
            without any such layer.
    """
    regularizers.check_name(regularizer)
    if regularizer == "none":
        undo(model)
        return Report("none", schedule, "none")
    regularizers.check_window(regularizer, window)
    report = Report(regularizer, schedule, impl_for(model, impl, regularizer))
    taken, report.skipped = select_layers(model, layers)
    values = schedules.ratios(schedule, ratio, end, len(taken))
    undo(model)  # only now, so that an error leaves the model as it was
    own_grid, num_prefix = model_grid(model)
    for found, value in zip(taken, values, strict=True):
        layer = AttentionRegularizer(regularizer, window, impl, found.kind, grid or own_grid, num_prefix)
        layer.ratio, layer.schedule = value, (schedule, end)
        install(layer, found)
        report.layers.append(RegularizedLayer(found.name, found.kind, value, found.mechanism, layer))
    return report


def install(layer: AttentionRegularizer, found: AttentionModule) -> None:
    module = found.module
    own = getattr(module, found.attribute, None)
    layer.replaced = () if own is None else (own,)
    setattr(module, found.attribute, layer.train(module.training))
    if found.attribute == "attn_regularizer" or found.mechanism == "fused" or hasattr(module, "fused_attn"):
        module.__class__ = regularized_class(type(module))


def impl_for(model: nn.Module, impl: str, regularizer: str) -> str:
    """What `impl` will be on the model's present device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = torch.empty(1, 1, 1, 64, device=device)
    return select_impl(impl, regularizer, *[example] * 3) if impl == "auto" else select_impl(impl, regularizer)


def select_layers(model: nn.Module, layers: tuple[str, ...]) -> tuple[list[AttentionModule], list[tuple[str, str]]]:
    """The attention modules to regularize, and (name, reason) of those that are skipped."""
    known = dict.fromkeys(["self", "cross", *KIND_OF_CLASS.values()])
    if not set(layers) <= known.keys():
        raise ValueError(f"layers={layers!r} is no tuple of {', '.join(known)}")
    taken, skipped = [], []
    for found in find_attention_modules(model):
        if found.unsupported_reason:
            skipped.append((found.name, found.unsupported_reason))
        elif found.kind not in layers:
            skipped.append((found.name, f"{found.kind} attention is not among layers={list(layers)}"))
        else:
            taken.append(found)
    if not taken:
        reasons = f" (skipped: {skipped[0][0]}, {skipped[0][1]})" if skipped else NOT_FOUND
        raise ValueError(f"{type(model).__name__} has no attention layer of layers={list(layers)}{reasons}")
    return taken, skipped


def regularized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, AttentionRegularizer]]:
    """(attention module, its regularizer), in order of definition, which is forward order in every architecture of timm
    (`scripts/coverage.py` checks it)."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, AttentionRegularizer):
                yield module, child


def undo(model: nn.Module) -> None:
    """Makes the model what it was before `apply`; does nothing to a model that is not patched."""
    for module, layer in list(regularized_layers(model)):
        if layer.replaced:
            module.attn_drop = copy.copy(layer.replaced[0]).train(layer.training)
        else:
            del module.attn_regularizer
        if isinstance(module, RegularizedAttention):
            module.__class__ = original_class(type(module))


def set_ratio(model: nn.Module, ratio: float, schedule: Optional[str] = None, end: Optional[float] = None) -> None:
    """Sets new ratios at the layers that `apply` took, for ramps over training. A compiled model is not compiled again,
    unless a ratio changes from or to 0. Schedule and end are those of `apply` by default.

    Raises:
        ValueError: a model that `apply` has not patched, a ratio outside [0, 1), an unknown schedule.
    """
    layers = [layer for _, layer in regularized_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no regularized layers; call dropkey.apply(model, ...) first")
    before = layers[0].schedule
    values = schedules.ratios(schedule or before[0], ratio, before[1] if end is None else end, len(layers))
    for layer, value in zip(layers, values, strict=True):
        layer.ratio = value


def seed_masks(model: nn.Module, seed: Optional[int]) -> None:
    """Fixes the masks of the following forward passes: each becomes a pure function of `seed`, the layer's number and
    the mask's shape, whatever else draws random numbers. A training loop calls it before every forward pass, each time
    with another seed.

    It writes into a tensor of each layer, so compiled code and CUDA graphs that were made with a seed follow a new one.
    Recomputation in activation checkpointing gives the same masks, also with preserve_rng_state=False, provided that
    the backward pass comes before the next call. A layer that runs twice in one forward pass uses the same mask twice.
    A copy of the model has its own seeds. A model without regularized layers is left alone.

    Args:
        seed: any integer. None: every call of a layer draws from the default generator of its device again, as before
            the first call of this function, so that `torch.manual_seed` reproduces.
    """
    for number, (_, layer) in enumerate(regularized_layers(model)):
        layer.seed = None if seed is None else derive_seed("mask", seed, number)


@contextlib.contextmanager
def always_on(model: nn.Module):
    """Within, the regularizer acts in evaluation mode too: one pass is then one Monte Carlo sample (paper, figure 7).

    The fast path of nn.TransformerEncoder is off meanwhile, because it computes whole layers in one call.
    """
    before = [(layer, layer.always) for _, layer in regularized_layers(model)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for layer, _ in before:
        layer.always = True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for layer, always in before:
            layer.always = always
