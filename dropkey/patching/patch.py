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
import warnings
from dataclasses import replace
from itertools import takewhile
from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from dropkey import regularizers, schedules
from dropkey.patching.find import KIND_OF_CLASS, AttentionModule, find_attention_modules, is_named, original_class
from dropkey.patching.layer import AttentionRegularizer, Request
from dropkey.patching.mechanisms import RegularizedAttention, regularized_class
from dropkey.patching.reports import Report, impl_for, is_within, regularized_layers, report, shown, why_skipped
from dropkey.regularizers import Grid, Window
from dropkey.seeds import derive_seed

NOT_FOUND = (
    ": no module holds its dropout of weights as `attn_drop`, calls scaled_dot_product_attention in forward or is "
    "nn.MultiheadAttention; a class that runs its own softmax can be named: softmax=('Attention',)"
)
SCOPES = ("model", "stack")


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
    modules: Sequence[str] = (),
    softmax: Sequence[str] = (),
    scope: str = "model",
    impl: str = "auto",
    grid: Optional[Grid] = None,
) -> Report:
    """Regularizes the attention layers of `model`, in place. Warns where a module that looks like attention is left out
    for another reason than `layers`.

    Args:
        ratio, schedule, end: see `dropkey.schedules.ratios`; counted are the layers taken, in forward order.
        window: of dropkey_block, dropkey_cross and their `column` variants: an odd number of cells; or a share of each
            layer's grid, see `dropkey.regularizers.window_cells`; of a cross also "full".
        layers: attention layers to act on: self; class (a class token or another single query attends to the keys);
            cross (queries and keys of different sequences); outlook (VOLO); token (T2T's token transformers);
            layer (CeiT: the class token attends to those of all layers).
        modules: parts of the model to act in, by their dotted names or some of the words in these ("encoder",
            "decoder.layers.0"; * fits anything); none: everywhere.
        softmax: classes or dotted names of further attention modules ("Attention", "decoder.*.attn"; * fits anything).
            Every softmax over the last dimension in their forward is regularized, and a dropout of its result replaced.
            Modules like those of vit-pytorch (nn.Softmax, then dropout, between two matrix products) need no name.
        scope: what the schedule runs over: "model", all attention layers in forward order; or "stack", the blocks of
            each stack by itself (encoder, decoder), see `blocks_of`; self- and cross-attention of one share a ratio.
        impl: how fused layers compute attention, see `dropkey.attention`.
        grid: height and width of the patch grid, for models without an attribute that has it.
    Returns:
        The layers with their ratios, and what was skipped and why.
    Raises:
        ValueError: an unknown regularizer, schedule, layer, scope or impl; a window that Block or Cross cannot have; a
            model without any such layer; a name in `modules` or `softmax` that takes none.
    """
    regularizers.check_name(regularizer)
    if regularizer == "none":
        undo(model)
        return report(model)
    regularizers.check_window(regularizer, window)
    impl_for(model, impl, regularizer)  # refuses what cannot run
    softmax, modules = ((each,) if isinstance(each, str) else tuple(each) for each in (softmax, modules))
    request = Request(schedule, end, scope, layers, softmax, modules)
    taken, missed = select_layers(model, request)
    blocks = blocks_of([(found.name, found.kind) for found in taken], scope)
    values = spread(blocks, schedule, ratio, end)
    undo(model)  # only now, so that an error leaves the model as it was
    own_grid, num_prefix = model_grid(model)
    for found, block, value in zip(taken, blocks, values, strict=True):
        layer = AttentionRegularizer(regularizer, window, impl, found.kind, grid or own_grid, num_prefix)
        layer.ratio, layer.request, layer.mechanism, layer.block = value, request, found.mechanism, block
        install(layer, found)
    if missed:
        warn_of(missed, len(taken) + len(missed))
    return report(model)


def warn_of(missed: list[AttentionModule], like_attention: int) -> None:
    first = f"{shown(missed[0].name)}: {missed[0].unsupported_reason}"
    message = f"dropkey.apply left out {len(missed)} of {like_attention} modules that look like attention; {first}"
    warnings.warn(f"{message} (dropkey.report(model) lists all)", stacklevel=3)  # at the line that calls apply


def install(layer: AttentionRegularizer, found: AttentionModule) -> None:
    module = found.module
    own = getattr(module, found.attribute, None)
    layer.replaced = () if own is None else (own,)
    setattr(module, found.attribute, layer.train(module.training))
    if found.attribute == "attn_regularizer" or found.mechanism == "fused" or hasattr(module, "fused_attn"):
        module.__class__ = regularized_class(type(module))


def select_layers(model: nn.Module, request: Request) -> tuple[list[AttentionModule], list[AttentionModule]]:
    """The attention modules to regularize, and those that look like attention and are missed."""
    known = dict.fromkeys(["self", "cross", *KIND_OF_CLASS.values()])
    if not set(request.layers) <= known.keys():
        raise ValueError(f"layers={request.layers!r} is no tuple of {', '.join(known)}")
    found = find_attention_modules(model, request.softmax)
    taken = [each for each in found if not why_skipped(each, request)]
    for pattern in request.softmax:
        named = [each for each in found if is_named(each.name, original_class(type(each.module)), (pattern,))]
        if not named:
            fits = f"neither the class nor the dotted name of a module of {type(model).__name__}"
            raise ValueError(f"softmax={pattern!r} is {fits}; print(model) shows both")
        if not any(each in taken for each in named):
            raise ValueError(f"softmax={pattern!r}: {why_skipped(named[0], request)}")
    for part in request.modules:
        if not any(is_within(each.name, part) for each in taken):
            names = ", ".join(shown(each.name) for each in found if each.kind in request.layers)
            raise ValueError(
                f"modules={part!r} holds no attention of layers={list(request.layers)}; there are: {names}"
            )
    skipped = sorted((each for each in found if each not in taken), key=lambda each: not each.missed)
    if not taken:
        first = NOT_FOUND
        if skipped:
            first = f" (skipped: {shown(skipped[0].name)}, {why_skipped(skipped[0], request)})"
        raise ValueError(f"{type(model).__name__} has no attention layer of layers={list(request.layers)}{first}")
    return taken, [each for each in skipped if each.missed]


def blocks_of(layers: list[tuple[str, str]], scope: str) -> list[tuple[str, int]]:
    """The stack of each layer, of which name and kind are given, and the number of its block there. scope="model": one
    stack, and each layer a block. Else the stack is what comes before the first number in the name, after the start
    that all names share (model.encoder.layers, model.decoder.layers); before the last part, where there is no number.
    Cross-attention belongs to the block before it, if that has none yet."""
    if scope not in SCOPES:
        raise ValueError(f"no scope {scope!r}; choose from {', '.join(SCOPES)}")
    if scope == "model":
        return [("", number) for number in range(len(layers))]
    paths = [name.split(".") for name, _ in layers]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
    found, last, latest = [], {}, {}  # the last block of each stack, and the kind of its latest layer
    for path, (_, kind) in zip(paths, layers, strict=True):
        stack = ".".join(path[: next((i for i in range(shared, len(path)) if path[i].isdigit()), -1)])
        if kind != "cross" or latest.get(stack, "cross") == "cross":
            last[stack] = last.get(stack, -1) + 1
        latest[stack] = kind
        found.append((stack, last[stack]))
    return found


def spread(blocks: list[tuple[str, int]], schedule: str, ratio: float, end: float) -> list[float]:
    """One ratio per layer, given the stack and block of each: the schedule runs once over the blocks of each stack."""
    counts = {stack: 1 + max(block for other, block in blocks if other == stack) for stack, _ in blocks}
    ramps = {stack: schedules.ratios(schedule, ratio, end, count) for stack, count in counts.items()}
    return [ramps[stack][block] for stack, block in blocks]


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
    unless a ratio changes from or to 0. Schedule and end stay what they are unless given; so do the stacks.

    Raises:
        ValueError: a model that `apply` has not patched, a ratio outside [0, 1), an unknown schedule.
    """
    layers = [layer for _, layer in regularized_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no regularized layers; call dropkey.apply(model, ...) first")
    before = layers[0].request
    changes = {"schedule": schedule or before.schedule, "end": before.end if end is None else end}
    values = spread([layer.block for layer in layers], ratio=ratio, **changes)
    for layer, value in zip(layers, values, strict=True):
        layer.ratio, layer.request = value, replace(layer.request, **changes)


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
