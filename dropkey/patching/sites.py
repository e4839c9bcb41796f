"""Which modules of a model are attention layers, of what kind, and on which grid their keys lie."""

from dataclasses import dataclass
from typing import Iterator, Optional

from torch import nn

from dropkey.regularizers import Grid

# By class name, so that timm's classes need not be imported; whatever is not here and has `attn_drop` is "self".
SITE_OF_CLASS = {
    "OutlookAttention": "outlook",
    "ClassAttention": "class",
    "ClassAttn": "class",
    "TokenTransformerAttention": "token",
}
# Classes whose `attn_drop`, if they have one, does not see each query's distribution over keys.
OBSTACLES = {
    "TokenPerformer": "a performer has no softmax",
    "TalkingHeadAttn": "heads are mixed between the softmax and attn_drop",  # CaiT
    "XCA": "its softmax is over channels, not keys",  # XCiT
    "CrossCovarianceAttn": "its softmax is over channels, not keys",  # EdgeNeXt
    "LinearSelfAttention": "all queries share one row of weights",  # MobileViT v2
}


@dataclass
class Found:
    """An attention module: its name in the model, and either its site kind or why it cannot be regularized."""

    name: str
    module: nn.Module
    site: Optional[str] = None
    obstacle: Optional[str] = None


def find(model: nn.Module) -> Iterator[Found]:
    """Attention modules in forward order (for the models of this project that is the order of definition)."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in OBSTACLES:
            yield Found(name, module, obstacle=OBSTACLES[kind])
        elif isinstance(getattr(module, "attn_drop", None), nn.Module):
            yield Found(name, module, site=SITE_OF_CLASS.get(kind.removeprefix("Regularized"), "self"))
        elif isinstance(module, nn.MultiheadAttention):
            yield Found(name, module, obstacle="nn.MultiheadAttention has no attn_drop module")


def key_grid(keys: int, model_grid: Optional[Grid], num_prefix: int) -> tuple[Grid, int]:
    """Height and width of `keys` keys on the image, and how many prefix tokens precede them.

    Layers of one model see its patch grid, or that grid pooled or not yet pooled by a power of two (VOLO's
    self-attention, T2T's token transformers), with or without the prefix tokens.

    Raises:
        ValueError: no such grid fits.
    """
    if model_grid is None:
        for prefix in dict.fromkeys((num_prefix, 0)):
            side = round(max(keys - prefix, 0) ** 0.5)
            if side and side * side == keys - prefix:
                return (side, side), prefix
    else:
        for doublings in (0, -1, 1, -2, 2):
            height, width = (int(size * 2.0**doublings) for size in model_grid)
            for prefix in dict.fromkeys((num_prefix, 0)):
                if prefix + height * width == keys:
                    return (height, width), prefix
    raise ValueError(
        f"{keys} keys fit neither the model's grid {model_grid} nor its halves and doubles, with {num_prefix} prefix "
        "tokens or none; DropKey-Block and DropKey-Cross need to know where the keys lie"
    )
