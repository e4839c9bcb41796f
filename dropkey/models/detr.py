"""DETR (Carion et al., 2020, arXiv:2005.12872): a set of boxes from a set of queries, each with a class or "no object".

Names of weights are those of facebookresearch/detr, so its files load as they are; `checkpoint_filter_fn` converts
those of Hugging Face. Attention weights have no dropout here: that is the regularizer's business. Shape letters: B
images, H and W pixels, N tokens (cells of the last feature map), Q queries, L decoder layers, D width, K classes.
"""

import math
import re
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

RESNETS = {"resnet50": 2048, "resnet101": 2048}  # and their output channels
TRAINED = ("layer2", "layer3", "layer4")  # of a ResNet; the layers before keep their weights


class ResNet(nn.Module):
    """The last feature map. All BatchNorms are frozen, statistics and affine; so are the first layers.

    Random weights need another backbone: a frozen BatchNorm that was never trained normalises nothing.
    """

    def __init__(self, name: str, in_chans: int, dilation: bool, pretrained: bool):
        super().__init__()
        if name not in RESNETS or in_chans != 3:
            raise ValueError(f"backbone={name} with {in_chans} channels; choices: {', '.join(RESNETS)} (3 channels)")
        whole = get_model(
            name,
            weights="IMAGENET1K_V1" if pretrained else None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        self.body = IntermediateLayerGetter(whole, {"layer4": "0"})
        self.num_channels = RESNETS[name]
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.startswith(TRAINED))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)["0"]


class SmallBackbone(nn.Module):
    """Five convolutions with GroupNorm, stride 8: for images of some 50 pixels, from random weights."""

    def __init__(self, in_chans: int):
        super().__init__()
        layers = []
        for width, stride in ((16, 1), (32, 2), (32, 2), (64, 2), (64, 1)):
            layers += [
                nn.Conv2d(in_chans, width, 3, stride, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.ReLU(inplace=True),
            ]
            in_chans = width
        self.body, self.num_channels = nn.Sequential(*layers), in_chans

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def sine_positions(padding: Tensor, width: int) -> Tensor:
    """B N width of a feature map's padding (bool B h w): sines of the row and of the column, counted over what is real
    and scaled to 2π at its end."""
    real = (~padding).float()
    frequencies = 10_000 ** (2 * (torch.arange(width // 2, device=padding.device) // 2) / (width // 2))
    parts = []
    for axis in (1, 2):
        place = real.cumsum(axis)
        place = place / (place.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi
        angles = place[..., None] / frequencies
        parts.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2))
    return torch.cat(parts, dim=-1).flatten(1, 2)


class Layer(nn.Module):
    """What layers of encoder and decoder share: post-norm, ReLU, and dropout in three kinds of places."""

    attends_across = False  # to the encoder's tokens

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if self.attends_across:  # here, because modules are to be in forward order
            self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


class EncoderLayer(Layer):
    def forward(self, x: Tensor, positions: Tensor, padding: Optional[Tensor]) -> Tensor:
        at = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(at, at, x, key_padding_mask=padding, need_weights=False)[0]))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(Layer):
    attends_across = True

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__(width, heads, hidden, dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x, memory, positions, queries, padding: Optional[Tensor]) -> Tensor:
        at = x + queries
        x = self.norm1(x + self.dropout(self.self_attn(at, at, x, need_weights=False)[0]))
        cross = self.multihead_attn(
            x + queries, memory + positions, memory, key_padding_mask=padding, need_weights=False
        )
        x = self.norm2(x + self.dropout(cross[0]))
        return self.norm3(x + self.feed_forward(x))


class Encoder(nn.Module):
    def __init__(self, depth: int, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(depth))


class Decoder(nn.Module):
    def __init__(self, depth: int, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(sizes[0])


class Transformer(nn.Module):
    def __init__(self, depth: int, *sizes):
        super().__init__()
        self.encoder, self.decoder = Encoder(depth, *sizes), Decoder(depth, *sizes)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, positions: Tensor, queries: Tensor, padding: Optional[Tensor]) -> list[Tensor]:
        """B Q D after each decoder layer, of B N D, B N D, B Q D and bool B N (True: padded, attended by nobody).

        The norm acts on a copy: the next layer goes on with what it was not applied to.
        """
        for layer in self.encoder.layers:
            tokens = layer(tokens, positions, padding)
        x, levels = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            x = layer(x, tokens, positions, queries, padding)
            levels.append(self.decoder.norm(x))
        return levels


class MLP(nn.Module):
    def __init__(self, width: int, out: int, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out if i == depth - 1 else width) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Trunk(nn.Module):
    """All but the heads, which a subclass adds.

    Args:
        backbone: resnet50, resnet101, or small (see `SmallBackbone`).
        depth: of the encoder, and of the decoder.
        dropout: after attention and in the feed-forward layers; never of attention weights.
        dilation: the last stage of a ResNet at stride 16 (DC5).
        pretrained: ImageNet weights of torchvision in the backbone.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        backbone: str = "resnet50",
        embed_dim: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 8.0,
        num_queries: int = 100,
        dropout: float = 0.1,
        dilation: bool = False,
        pretrained: bool = False,
    ):
        super().__init__()
        small = backbone == "small"
        trunk = SmallBackbone(in_chans) if small else ResNet(backbone, in_chans, dilation, pretrained)
        self.backbone = nn.ModuleList([trunk])  # a list, as officially: names begin with backbone.0
        self.input_proj = nn.Conv2d(trunk.num_channels, embed_dim, 1)
        self.transformer = Transformer(depth, embed_dim, num_heads, int(embed_dim * mlp_ratio), dropout)
        self.query_embed = nn.Embedding(num_queries, embed_dim)

    def levels(self, images: Tensor, padding: Optional[Tensor] = None) -> list[Tensor]:
        """B Q D after each decoder layer.

        Args:
            images: B C H W, smaller ones padded with zeros at the right and the bottom.
            padding: bool B H W, True where padded; None: nowhere.
        """
        features = self.input_proj(self.backbone[0](images))
        if padding is None:
            cells = torch.zeros_like(features[:, 0], dtype=torch.bool)
        else:
            cells = F.interpolate(padding[:, None].float(), size=features.shape[-2:])[:, 0].bool()
        positions = sine_positions(cells, features.shape[1]).to(features.dtype)
        ignored = None if padding is None else cells.flatten(1)
        queries = self.query_embed.weight.repeat(len(images), 1, 1)
        return self.transformer(features.flatten(2).transpose(1, 2), positions, queries, ignored)


class DETR(Trunk):
    def __init__(self, *, num_classes: int = 91, embed_dim: int = 256, **trunk):
        super().__init__(embed_dim=embed_dim, **trunk)
        self.pretrained_cfg = {"classifier": "class_embed"}  # which other classes leave as initialised
        self.class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.bbox_embed = MLP(embed_dim, 4)

    def forward(self, images: Tensor, padding: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """Logits L B Q K+1 (the last: no object) and boxes L B Q 4 (centre, width, height as shares of the real image)
        of each decoder layer; in evaluation of the last alone, L = 1. Arguments: those of `levels`."""
        levels = self.levels(images, padding)
        x = torch.stack(levels if self.training else levels[-1:])
        return self.class_embed(x), self.bbox_embed(x).sigmoid()


# --------------------------------------------------------------------------------------------- weights of other names

# Hugging Face's names (transformers 4 and 5, backbones of timm and of transformers), in the order of replacement.
RENAMED = (
    (r"^model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone.0.body."),
    (r"body\.embedder\.embedder\.convolution", "body.conv1"),
    (r"body\.embedder\.embedder\.normalization", "body.bn1"),
    (r"body\.encoder\.stages\.(\d)\.layers", lambda found: f"body.layer{int(found[1]) + 1}"),
    (r"\.layer\.([012])\.convolution", lambda found: f".conv{int(found[1]) + 1}"),
    (r"\.layer\.([012])\.normalization", lambda found: f".bn{int(found[1]) + 1}"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.input_projection", "input_proj"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
    (r"decoder\.layernorm", "decoder.norm"),
    (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"\.(mlp\.)?fc([12])", r".linear\2"),
    (r"encoder_attn\.", "multihead_attn."),
    (r"\.o_proj", ".out_proj"),
)


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the official names, from a state dict with those or with Hugging Face's."""
    found = {}
    for name, value in weights.items():
        for pattern, new in RENAMED if "class_labels_classifier.weight" in weights else ():
            name = re.sub(pattern, new, name)
        if not name.endswith("num_batches_tracked"):
            found[name] = value
    for first in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(first.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[first.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found


# For the digits on small canvases: 0.25 million parameters.
SMALL = {"backbone": "small", "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "dropout": 0.0}


def register(name: str, network: type[Trunk], **architecture) -> Callable[..., Trunk]:
    """Register the model with timm; arguments of `timm.create_model` take precedence over those given here."""

    def create(pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, drop_path_rate=0.0, **kwargs) -> Trunk:
        if drop_path_rate:
            raise ValueError(f"{network.__name__} has no stochastic depth; leave model.drop_path at 0")
        return network(**architecture | kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = network.__module__
    return register_model(create)


detr_r50 = register("detr_r50", DETR)
detr_r101 = register("detr_r101", DETR, backbone="resnet101")
detr_small = register("detr_small", DETR, **SMALL, num_queries=8)
