"""Swapping attention layers for regularized ones, in one of three ways, none of which adds a parameter or a key:

- "fused": the module's class becomes a subclass whose training forward diverts calls of
  `scaled_dot_product_attention` and `multi_head_attention_forward` to the operator;
- "weights": its `attn_drop` becomes a `Regularize`, which masks and renormalises softmaxed weights; exact for any
  attention that runs softmax, then `attn_drop` (windows, relative biases and all);
- "softmax": a subclass as above, which masks and renormalises the result of softmax over the last dimension.

A dropout of attention weights that the module has is replaced. In evaluation all step aside, so that the output is
that of the unpatched module, bit for bit.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from dropkey import regularizers, schedules
from dropkey.operator import choose
from dropkey.patching.find import KIND_OF_CLASS, AttentionModule, find, original
from dropkey.patching.layer import Regularize
from dropkey.patching.mechanisms import Regularized, regularized_class
from dropkey.regularizers import Grid, Window
from dropkey.seeds import derive_seed

UNKNOWN = (
    ": no module holds its dropout of weights as `attn_drop`, calls scaled_dot_product_attention in forward or is "
    "nn.MultiheadAttention; the name of a class that calls softmax can be added to dropkey.patching.find.SOFTMAX_CLASSES"
)


@dataclass
class RegularizedLayer:
    """One regularized attention layer."""

    name: str
    kind: str  # self, class, cross, outlook, token
    ratio: float
    mechanism: str  # fused, weights or softmax: see above


@dataclass
class Report:
    """What `apply` did."""

    regularizer: str
    schedule: str
    impl: str  # what the operator uses at fused layers
    layers: list[RegularizedLayer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __str__(self) -> str:
        if self.regularizer == "none":
            return "no regularizer: attention as it is"
        head = f"{self.regularizer} ({self.schedule}) at {len(self.layers)} attention layers"
        lines = [head + (f", impl {self.impl}" if any(s.mechanism == "fused" for s in self.layers) else "")]
        lines += [
            f"  {s.name or '(the model)':<36} {s.kind:<8} {s.mechanism:<8} ratio {s.ratio:.4f}" for s in self.layers
        ]
        lines += [f"  {name:<36} skipped: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def model_grid(model: nn.Module) -> tuple[Optional[Grid], int]:
    """The patch grid (height, width) and the number of prefix tokens, where the model tells them."""
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
        schedule, end: see `dropkey.schedules.ratios`; layers count in forward order among the layers taken.
        window: of dropkey_block and dropkey_cross, in cells.
        layers: attention layers to act on: self; class (a class token or another single query looks at the keys);
            cross (queries and keys of different sequences); outlook (VOLO); token (T2T's token transformers).
        impl: how fused layers compute attention, see `dropkey.attention`.
        grid: height and width of the patch grid, for models that do not tell it.
    Returns:
        The layers with their ratios, and what was left alone and why.
    Raises:
        ValueError: an unknown regularizer, schedule, site or impl; a window that Block or Cross cannot have; a model
            without any such site.
    """
    if regularizer == "none":
        undo(model)
        return Report("none", schedule, "none")
    if regularizer not in regularizers.REGULARIZERS:
        raise ValueError(f"no regularizer '{regularizer}'; there are none, {', '.join(regularizers.REGULARIZERS)}")
    report = Report(regularizer, schedule, planned(impl, regularizer, model))
    regularizers.check_window(regularizer, window)
    taken, report.skipped = choose_layers(model, layers)
    values = schedules.ratios(schedule, ratio, end, len(taken))
    undo(model)  # only now, so that a refusal leaves the model as it was
    own_grid, num_prefix = model_grid(model)
    for found, value in zip(taken, values, strict=True):
        layer = Regularize(regularizer, window, impl, found.kind, grid or own_grid, num_prefix)
        layer.ratio, layer.schedule = value, (schedule, end)
        put(layer, found)
        report.layers.append(RegularizedLayer(found.name, found.kind, value, found.mechanism))
    return report


def put(layer: Regularize, found: AttentionModule) -> None:
    module = found.module
    layer.replaced = tuple(
        filter(None, [getattr(module, found.attribute, None)])
    )  # a tuple, so that it is no submodule
    setattr(module, found.attribute, layer.train(module.training))
    if found.attribute == "regularize" or found.mechanism == "fused" or hasattr(module, "fused_attn"):
        module.__class__ = regularized_class(type(module))


def planned(impl: str, regularizer: str, model: nn.Module) -> str:
    """What `impl` will be for a model on its present device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = torch.empty(1, 1, 1, 64, device=device)
    return choose(impl, regularizer, *[example] * 3) if impl == "auto" else choose(impl, regularizer)


def choose_layers(model: nn.Module, layers: tuple[str, ...]) -> tuple[list[AttentionModule], list[tuple[str, str]]]:
    """The attention modules to regularize, and (name, reason) of those left alone."""
    known = dict.fromkeys(["self", "cross", *KIND_OF_CLASS.values()])
    if not set(layers) <= known.keys():
        raise ValueError(f"layers={layers!r} is no tuple of {', '.join(known)}")
    taken, skipped = [], []
    for found in find(model):
        if found.unsupported_reason:
            skipped.append((found.name, found.unsupported_reason))
        elif found.kind not in layers:
            skipped.append((found.name, f"{found.kind} attention is not among layers={list(layers)}"))
        else:
            taken.append(found)
    if not taken:
        reasons = f" (skipped: {skipped[0][0]}, {skipped[0][1]})" if skipped else UNKNOWN
        raise ValueError(f"{type(model).__name__} has no attention layer of layers={list(layers)}{reasons}")
    return taken, skipped


def regularized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, Regularize]]:
    """(attention module, its Regularize), in order of definition: the order in which layers run, in every
    architecture of timm (`scripts/coverage.py` watches them)."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, Regularize):
                yield module, child


def undo(model: nn.Module) -> None:
    """The model as it was before `apply`; nothing happens to one that is not patched."""
    for module, layer in list(regularized_layers(model)):
        if layer.replaced:
            module.attn_drop = copy.copy(layer.replaced[0]).train(layer.training)
        else:
            del module.regularize
        if isinstance(module, Regularized):
            module.__class__ = original(type(module))


def set_ratio(model: nn.Module, ratio: float, schedule: Optional[str] = None, end: Optional[float] = None) -> None:
    """New ratios at the layers that `apply` took, for ramps over training; without recompiling a compiled model, unless
    from or to 0. Schedule and end are those of `apply` unless given.

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
    the mask's shape, whatever else draws random numbers. A training loop calls it before every forward pass, with a
    seed of its own for each.

    It writes into a tensor of each layer: compiled code and CUDA graphs that were made with a seed follow a new one.
    Recomputation in activation checkpointing gives the same masks, also with preserve_rng_state=False, if the backward
    pass comes before the next call. A layer that runs twice in one forward pass uses the same mask twice. A copy of the
    model has seeds of its own. Nothing happens to a model without regularized layers.

    Args:
        seed: any integer; None: every call of a layer draws from the default generator of its device again, as before
            the first call of this function, so that `torch.manual_seed` reproduces.
    """
    for number, (_, layer) in enumerate(regularized_layers(model)):
        layer.seed = None if seed is None else derive_seed("mask", seed, number)


@contextlib.contextmanager
def always_on(model: nn.Module):
    """Within, the regularizer acts in evaluation mode too: one pass is then one Monte Carlo sample (figure 7).

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
