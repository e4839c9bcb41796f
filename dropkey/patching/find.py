"""Which modules of a model are attention layers, their kind and mechanism, and the grid on which their keys lie."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional, Sequence

from torch import nn

from dropkey.patching.reading import (
    CALLED_ATTENTION,
    FUSED,
    OTHER_FUSED,
    SOFTMAX,
    calls_in_forward,
    is_softmax_then_dropout,
    looks_like_attention,
    signature,
)
from dropkey.regularizers import Grid

# Tables by class name, so that no library has to be imported; `file.Class` where the bare name is ambiguous.
# Other classes are "self", or "cross" by their name.
KIND_OF_CLASS = {
    "OutlookAttention": "outlook",
    "TokenTransformerAttention": "token",
    "LayerwiseClassAttention": "layer",
    "ClassAttention": "class",  # VOLO
    "ClassAttn": "class",  # CaiT, XCiT
    "crossvit.CrossAttention": "class",  # one branch's class token attends to the other branch
    "AttentionPool2d": "class",  # pools: one query
    "AttentionPoolLatent": "class",
    "SimPool1d": "class",
    "SimPool2d": "class",
}
# Attention whose weights can only be reached as the result of a softmax: there is no `attn_drop`, or it acts after
# heads are mixed.
SOFTMAX_CLASSES = {
    "BottleneckAttn",
    "HaloAttn",
    "NonLocalAttn",
    "TalkingHeadAttn",  # CaiT
    "efficientformer.Attention",
    "efficientformer_v2.Attention2d",
    "Attention2dDownsample",  # EfficientFormer v2
    "CascadedGroupAttention",  # EfficientViT
    "levit.Attention",
    "levit.AttentionDownsample",
    "mvitv2.MultiScaleAttention",
    "MultiScaleAttentionPoolFirst",  # MViT v2
    "SHSA",  # SHViT
    "ShiftedWindowAttention",  # torchvision's Swin
    "ShiftedWindowAttentionV2",
    "RelativePositionalMultiHeadAttention",  # torchvision's MaxViT
}
# They use softmax or are called attention, but have no distribution over keys for each query.
UNSUPPORTED = {
    "TokenPerformer": "a performer has no softmax",
    "XCA": "its softmax is over channels, not keys",  # XCiT
    "XCAttention": "its softmax is over channels, not keys",  # XCiT of vit-pytorch
    "CrossCovarianceAttn": "its softmax is over channels, not keys",  # EdgeNeXt
    "ChannelAttention": "its softmax is over channels, not keys",  # DaViT
    "ChannelAttentionV2": "its softmax is over channels, not keys",
    "LinearSelfAttention": "all queries share one row of weights",  # MobileViT v2
    "FactorAttnConvRelPosEnc": "linear attention: keys are softmaxed by themselves, without queries",  # CoaT
    "LambdaLayer": "linear attention: keys are softmaxed by themselves, without queries",
    "swiftformer.EfficientAdditiveAttention": "linear attention: all queries share one sum of keys",
    "nextvit.ConvAttention": "a convolution",
    "BatNonLocalAttn": "its weights are of rows and columns, from sigmoids",
    "HSMSSD": "a scan: all queries share one row of weights per state",  # EfficientViM
    "GlobalContext": "a gate on channels: all positions share one row of weights",
    "SelectiveKernelAttn": "a gate: its softmax is over branches, not keys",
    "RadixSoftmax": "a gate: its softmax is over branches, not keys",  # ResNeSt
    "csatv2.SpatialTransformerBlock": "its softmax is over the images of the batch, not keys",
}
CROSS = re.compile("cross_?att|cross_?mha|encoder_attn|encoder_attention|encdec|multihead_attn", re.IGNORECASE)


@dataclass
class AttentionModule:
    """An attention module of a model, and how it can be regularized or why not."""

    name: str
    module: nn.Module
    kind: str = "self"
    mechanism: str = "fused"  # or softmax, weights: see `dropkey.patching.patch`
    attribute: str = "attn_regularizer"  # of the module, which takes the regularizer
    unsupported_reason: Optional[str] = None
    missed: bool = False  # looks like attention over keys, but is not regularized as it is written
    hint: bool = False  # found by no more than a softmax or a class name; does not count within attention

    def contains(self, other: "AttentionModule") -> bool:
        return other.name.startswith(f"{self.name}." if self.name else "")


def find_attention_modules(model: nn.Module, softmax: Optional[Sequence[str]] = None) -> list[AttentionModule]:
    """In order of definition, which is forward order (`scripts/coverage.py` checks it). Modules that only look like
    attention, or run a softmax, are among them, with the reason why they are unsupported.

    Args:
        softmax: see `dropkey.apply`; None: as in the `apply` that the model has been through, if any.
    """
    if softmax is None:
        softmax = [name for module in model.modules() if is_regularizer(module) for name in module.request.softmax]
    found = []
    for name, module in reversed(list(model.named_modules())):  # what a module contains comes before it
        outer = AttentionModule(name, module)
        inside = [inner for inner in found if outer.contains(inner)]
        if is_regularizer(module) or not judge(outer, is_named(name, original_class(type(module)), softmax), inside):
            continue
        found = [inner for inner in found if inner not in inside or not belongs_to(outer, inner)] + [outer]
    return found[::-1]


def belongs_to(outer: AttentionModule, inner: AttentionModule) -> bool:
    """Whether what was found within a module is no attention beside that of the module."""
    if inner.hint and (not outer.hint or (outer.missed and not inner.missed)):
        return True
    regularizes_all = not outer.unsupported_reason and outer.attribute == "attn_regularizer"
    return regularizes_all and inner.missed


def judge(found: AttentionModule, named: bool, inside: list[AttentionModule]) -> bool:
    """Whether a module is attention or looks like it; fills in what is known. `inside`: what was found within it."""
    module, cls = found.module, original_class(type(found.module))
    calls = calls_in_forward(cls)
    own_drop = isinstance(getattr(module, "attn_drop", None), nn.Module)
    fused = getattr(module, "fused_attn", bool(FUSED.intersection(calls)))
    found.kind = kind_of(found.name, cls)
    if named or look_up(cls, SOFTMAX_CLASSES):
        found.mechanism = "softmax"
    elif reason := look_up(cls, UNSUPPORTED):
        found.unsupported_reason = reason
    elif "ALL_ATTENTION_FUNCTIONS" in calls:  # the registry of transformers
        found.mechanism, found.unsupported_reason = registry_mechanism(module)
    elif own_drop and all(inner.unsupported_reason for inner in inside):  # else it may act on the output of attention
        found.mechanism, found.attribute = "fused" if fused else "weights", "attn_drop"
        # F.dropout(weights, self.attn_drop.p), or a fused function that may be called instead
        if not fused and ({"attn_drop", "p", "dropout"}.issubset(calls) or other_fused(calls)):
            found.mechanism, found.attribute = "softmax", "attn_regularizer"
    elif FUSED.intersection(calls):
        found.mechanism = "fused" if fused else "softmax"
    elif is_softmax_then_dropout(signature(module, calls)):
        found.mechanism = "softmax"
    else:
        return judge_by_reading(found, cls, calls, inside)
    if not found.unsupported_reason and found.mechanism != "weights":
        found.unsupported_reason = obstacle(found, named, inside)
        found.missed = bool(found.unsupported_reason)
    return True


def judge_by_reading(found: AttentionModule, cls: type, calls: tuple[str, ...], inside: list[AttentionModule]) -> bool:
    """Whether a module of no known style looks like attention or runs a softmax; says how to include it."""
    is_like_attention = looks_like_attention(signature(found.module, calls))
    is_called_attention = bool(CALLED_ATTENTION.search(cls.__name__))
    softmax = any(name in SOFTMAX and name not in found.module._modules for name in calls)
    if name := other_fused(calls):
        reason = f"{name} takes no mask for each head and query; call scaled_dot_product_attention instead"
        if is_like_attention:
            reason += f", or where it runs a softmax of its own: softmax=({cls.__name__!r},)"
    elif is_like_attention or (is_called_attention and softmax):
        between = " between two matrix products" if is_like_attention else ""
        reason = f"it runs a softmax{between}, as attention does; to include it: softmax=({cls.__name__!r},)"
    elif softmax:
        found.hint = True
        reason = (
            "a softmax, but not between two matrix products as in attention: of a classifier, a router or a gate; "
            "if it is attention, name the module that computes it in softmax=(...)"
        )
    elif is_called_attention and all(inner.hint and not inner.missed for inner in inside):
        found.hint = True
        reason = (
            "it is called attention, but its forward shows neither a softmax nor a fused attention; "
            f"if it runs a softmax all the same: softmax=({cls.__name__!r},)"
        )
    else:
        return False
    found.unsupported_reason, found.missed = reason, not found.hint or is_called_attention
    return True


def obstacle(found: AttentionModule, named: bool, inside: list[AttentionModule]) -> Optional[str]:
    """Why a subclass cannot regularize what a module runs, if so."""
    if "forward" in vars(found.module):
        return "its forward is one of the object, not of the class; call dropkey.apply before it is replaced"
    for inner in inside:
        if not (inner.hint or (named and inner.missed)):
            return f"it also contains {inner.name}; move what it runs itself into a module of its own"
    return None


def other_fused(calls: tuple[str, ...]) -> Optional[str]:
    return next((name for name in calls if OTHER_FUSED.match(name)), None)


def is_named(name: str, cls: type, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the class or the dotted name of a module; * and ? stand for any characters."""
    return any(fnmatchcase(cls.__name__, pattern) or fnmatchcase(name, pattern) for pattern in patterns)


def is_regularizer(module: nn.Module) -> bool:
    return type(module).__name__ == "AttentionRegularizer"


def registry_mechanism(module: nn.Module) -> tuple[str, Optional[str]]:
    """The mechanism of a module that takes its attention function from the registry of transformers, and why it is
    unsupported, if so."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
    known = {"sdpa": "fused", "eager": "softmax"}
    if name in known:
        return known[name], None
    return "fused", f"{name} takes no mask for each head and query; load the model with attn_implementation='sdpa'"


def original_class(cls: type) -> type:
    """The class that `apply` replaced, or `cls` itself."""
    return cls.__mro__[2] if cls.__mro__[1].__name__ == "RegularizedAttention" else cls


def look_up(cls: type, table):
    """The entry of a class in a table (of a set: True), by `file.Class` or `Class`; or None."""
    keys = (f"{cls.__module__.rsplit('.')[-1]}.{cls.__name__}", cls.__name__)
    return next((table[key] if isinstance(table, dict) else True for key in keys if key in table), None)


def kind_of(name: str, cls: type) -> str:
    is_cross = CROSS.search(cls.__name__) or CROSS.search(name.rsplit(".")[-1])
    return look_up(cls, KIND_OF_CLASS) or ("cross" if is_cross else "self")


def key_grid(keys: int, model_grid: Optional[Grid], num_prefix: int) -> tuple[Grid, int]:
    """Height and width of `keys` keys on the image, and how many prefix tokens precede them.

    Layers of one model see its patch grid, or that grid pooled or not yet pooled by a power of two (VOLO's
    self-attention, T2T's token transformers), with or without the prefix tokens. Other layers, and models without a
    grid, are taken to see a square: a window, as in Swin.

    Raises:
        ValueError: no such grid fits.
    """
    for doublings in (0, -1, 1, -2, 2) if model_grid else ():
        height, width = (int(size * 2.0**doublings) for size in model_grid)
        for prefix in dict.fromkeys((num_prefix, 0)):
            if prefix + height * width == keys:
                return (height, width), prefix
    for prefix in dict.fromkeys((0,) if model_grid else (num_prefix, 0)):
        side = round(max(keys - prefix, 0) ** 0.5)
        if side and side * side == keys - prefix:
            return (side, side), prefix
    known = f"{num_prefix} prefix tokens and a square, nor "
    if model_grid:
        known = f"the grid {model_grid}, its halves and doubles, with {num_prefix} prefix tokens or none, nor "
    raise ValueError(
        f"{keys} keys fit neither {known}a square; DropKey-Block and DropKey-Cross must know where the keys lie: "
        "give dropkey.apply(model, ..., grid=(height, width))"
    )
