"""Which modules of a model are attention layers, their kind and mechanism, and the grid on which their keys lie."""

import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Iterator, Optional

from torch import nn

from dropkey.regularizers import Grid

# Tables by class name, so that no library has to be imported; `file.Class` where the bare name is ambiguous.
# Other classes are "self", or "cross" by their name.
KIND_OF_CLASS = {
    "OutlookAttention": "outlook",
    "TokenTransformerAttention": "token",
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
    "CrossCovarianceAttn": "its softmax is over channels, not keys",  # EdgeNeXt
    "ChannelAttention": "its softmax is over channels, not keys",  # DaViT
    "ChannelAttentionV2": "its softmax is over channels, not keys",
    "LinearSelfAttention": "all queries share one row of weights",  # MobileViT v2
    "FactorAttnConvRelPosEnc": "linear attention: keys are softmaxed by themselves, without queries",  # CoaT
    "LambdaLayer": "linear attention: keys are softmaxed by themselves, without queries",
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


def find_attention_modules(model: nn.Module) -> Iterator[AttentionModule]:
    """In order of definition, which is forward order (`scripts/coverage.py` checks it)."""
    for name, module in model.named_modules():
        cls = original_class(type(module))
        uses, found = names_in_forward(cls), AttentionModule(name, module, kind_of(name, cls))
        fused = getattr(module, "fused_attn", "scaled_dot_product_attention" in uses)
        if reason := look_up(cls, UNSUPPORTED):
            found.unsupported_reason = reason
        elif look_up(cls, SOFTMAX_CLASSES):
            found.mechanism = "softmax"
        elif "ALL_ATTENTION_FUNCTIONS" in uses:  # the registry of transformers
            found.mechanism, found.unsupported_reason = registry_mechanism(module)
        elif isinstance(getattr(module, "attn_drop", None), nn.Module) and not wraps_attention(module):
            found.mechanism, found.attribute = "fused" if fused else "weights", "attn_drop"
            if not fused and {"attn_drop", "p", "dropout"} <= uses:  # F.dropout(weights, self.attn_drop.p)
                found.mechanism, found.attribute = "softmax", "attn_regularizer"
        elif "scaled_dot_product_attention" in uses:
            found.mechanism = "fused" if fused else "softmax"
        elif cls.__module__.startswith("transformers.") and cls.__name__.endswith("Attention") and "softmax" in uses:
            found.unsupported_reason = "it does not take its attention function from the registry of transformers"
        elif not isinstance(module, nn.MultiheadAttention):
            continue
        yield found


def wraps_attention(module: nn.Module) -> bool:
    """Whether `attn_drop` acts on the output of attention: weights do not leave nn.MultiheadAttention."""
    return any(isinstance(child, nn.MultiheadAttention) for child in module.children())


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


@lru_cache(maxsize=None)
def names_in_forward(cls: type) -> frozenset[str]:
    """Global names and attributes that `forward` uses, also in the classes it may call by super()."""
    forwards = (inspect.unwrap(parent.__dict__["forward"]) for parent in cls.__mro__ if "forward" in parent.__dict__)
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return frozenset(name for code in codes if code for name in code.co_names)


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
