"""Every architecture family in a size that trains a step in milliseconds: about 20,000 parameters, 32 or 48 px."""

import timm
import torch
from timm.models.volo import VOLO
from torch import Tensor, nn

import dropkey.models  # noqa: F401 (registers T2T-ViT)
from dropkey.regularizers import REGULARIZERS, STRUCTURED

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}


def vit(img_size=32, **changes):
    return timm.create_model("vit_tiny_patch16_224", img_size=img_size, patch_size=8, **VIT | changes)


def deit(img_size=32, **changes):
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=img_size, patch_size=8, **VIT | changes)


def volo(img_size=32, patch_size=4, **changes):
    """One outlook attention on 8 x 8 tokens, three self-attentions on 4 x 4, two class attentions."""
    img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
    return VOLO(
        [1, 1, 1, 1],
        img_size=img_size,
        patch_size=patch_size,
        embed_dims=[16, 32, 32, 32],
        num_heads=[2, 2, 2, 2],
        stem_hidden_dim=8,
        mlp_ratio=2,
        num_classes=5,
        use_aux_head=False,
        **changes,
    )


def t2t(img_size=48, **changes):
    return timm.create_model("t2t_vit_7", img_size=img_size, **VIT | changes)


def t2t_t(img_size=48, **changes):
    return timm.create_model("t2t_vit_t_14", img_size=img_size, **VIT | changes)


def t2t_small(img_size=32, **changes):
    return timm.create_model("t2t_vit_small_image", img_size=img_size, **VIT | changes)


FAMILIES = {"vit": vit, "deit": deit, "volo": volo, "t2t": t2t, "t2t_t": t2t_t, "t2t_small": t2t_small}
EVERY_LAYER = ("self", "class", "cross", "outlook", "token")


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    sizes = {"VOLO": 32, "T2TViT": getattr(model, "img_size", None)}
    size = sizes.get(type(model).__name__) or model.patch_embed.img_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width)


def window_of(regularizer: str):
    return 3 if regularizer in STRUCTURED else None


REGULARIZERS_AND_NONE = ("none", *REGULARIZERS)
# VOLO has fused, class and outlook attention, so every regularizer occurs with it; every other family occurs with one.
FAMILY_AND_REGULARIZER = [("volo", regularizer) for regularizer in REGULARIZERS]
FAMILY_AND_REGULARIZER += [pair for pair in zip(FAMILIES, REGULARIZERS, strict=False) if pair[0] != "volo"]
