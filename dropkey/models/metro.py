"""METRO (Lin et al., 2021, arXiv:2012.09760): the mesh of a body from an image, by three shrinking encoders.

Each joint and each vertex of a coarse mesh is a token: what a convolution over the grid of the backbone gives it, and
its place in a template. Attention weights have no dropout here: that is the regularizer's business. Weights of the
official network for bodies load, see `checkpoint_filter_fn`. Shape letters: B images, H and W pixels, N tokens, J
joints, D width.
"""

import re
from itertools import pairwise
from typing import Callable, Optional, Sequence

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from dropkey.mesh.samples import Body

MASKED, MASK = 0.3, 0.01  # at most this share of joints and of vertices is hidden in training, by this value
STD = 0.02  # of initial weights, as in BERT


class Layer(nn.Module):
    """BERT's: post-norm, GELU, dropout after attention and after the feed-forward layers."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class Block(nn.Module):
    """An encoder: B N `before` to B N `after`, with a linear shortcut around it."""

    def __init__(self, tokens: int, before: int, width: int, after: int, depth: int, *sizes, dropout: float):
        super().__init__()
        self.embed, self.positions = nn.Linear(before, width), nn.Parameter(torch.zeros(tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(Layer(width, *sizes, dropout) for _ in range(depth)))
        self.head, self.shortcut = nn.Linear(width, after), nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.dropout(self.embed(x) + self.positions))) + self.shortcut(x)


def small_backbone(in_chans: int) -> nn.Sequential:
    """Five convolutions with GroupNorm, 64 channels at stride 8: for images of some 64 pixels, from random weights."""
    layers = []
    for width, stride in ((16, 2), (32, 1), (32, 2), (64, 2), (64, 1)):
        layers += [nn.Conv2d(in_chans, width, 3, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        in_chans = width
    return nn.Sequential(*layers)


class METRO(nn.Module):
    """The body is among the weights: it comes with them, or from `set_body`.

    Args:
        img_size: side of the images; how many cells the backbone makes of it is found by trying.
        joints: J.
        levels: vertices of the coarse, the middle and the full mesh.
        faces: how many triangles the body has, for drawing.
        backbone: small, or any convolutional network of timm, such as resnet50, hrnet_w64 (the official one).
        pretrained: ImageNet weights of timm in the backbone.
        widths: of the three encoders.
        depth: layers in each of them.
        hidden: width of the feed-forward layers, the same in all.
        dropout: never of attention weights.
    """

    def __init__(
        self,
        *,
        img_size: int,
        joints: int,
        levels: Sequence[int],
        faces: int = 0,
        in_chans: int = 3,
        backbone: str = "resnet50",
        pretrained: bool = False,
        widths: Sequence[int] = (1024, 256, 128),
        depth: int = 4,
        num_heads: int = 4,
        hidden: int = 3072,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.joints, self.body = joints, Body.blank(joints, levels, faces)
        self.register_buffer("template", torch.zeros(joints + levels[0], 3))  # of the tokens, around the root
        if backbone == "small":
            self.backbone = small_backbone(in_chans)
        else:
            self.backbone = timm.create_model(
                backbone, pretrained=pretrained, in_chans=in_chans, num_classes=0, global_pool=""
            )
        with torch.no_grad():
            _, channels, *grid = self.backbone.eval()(torch.zeros(1, in_chans, img_size, img_size)).shape
        tokens, ends = len(self.template), (*widths[1:], 3)
        self.cells = nn.Conv1d(grid[0] * grid[1], tokens, 1)
        begins = (channels + 3, *widths[1:])
        sizes = (depth, num_heads, hidden)
        self.blocks = nn.ModuleList(
            Block(tokens, before, width, after, *sizes, dropout=dropout)
            for before, width, after in zip(begins, widths, ends, strict=True)
        )
        self.up = nn.ModuleList(nn.Linear(few, many) for few, many in pairwise(levels))
        # from the coarse vertices: each to a number, then 250 of these, then scale and shift
        self.camera = nn.ModuleList([nn.Linear(3, 1), nn.Linear(levels[0], 250), nn.Linear(250, 3)])
        self.blocks.apply(initialise)
        self.train()

    def set_body(self, body: Body) -> None:
        for name, value in body.named_buffers():
            getattr(self.body, name).copy_(value)
        self.template.copy_(body.tokens())

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Joints B J 3, the coarse, middle and full mesh, each B V 3, around the root, and the camera B 3 (scale and
        shift of a weak perspective), of images B C H W."""
        grid = self.cells(self.backbone(images).flatten(2).transpose(1, 2))
        x = torch.cat([self.template.to(grid.dtype).expand(len(images), -1, -1), grid], dim=-1)
        if self.training:
            x = torch.where(self.hidden(len(x), x.device)[..., None], MASK, x)
        for block in self.blocks:
            x = block(x)
        joints, coarse = x[:, : self.joints], x[:, self.joints :]
        levels = [coarse]
        for up in self.up:
            levels.append(up(levels[-1].transpose(1, 2)).transpose(1, 2))
        each, some, camera = self.camera
        return joints, levels, camera(some(each(coarse).squeeze(-1)))

    def hidden(self, count: int, device) -> Tensor:
        """bool B N, True where a token is hidden: of each sample up to MASKED of the joints, and of the vertices; how
        many, and which, is drawn from torch's generator."""
        parts = []
        for tokens in (self.joints, len(self.template) - self.joints):
            most = (torch.rand(count, 1, device=device) * MASKED * tokens).floor()
            parts.append(torch.rand(count, tokens, device=device).argsort(1) < most)
        return torch.cat(parts, dim=1)


def initialise(module: nn.Module) -> None:
    """As BERT."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=STD)
    elif isinstance(module, Block):
        nn.init.normal_(module.positions, std=STD)


# Official names, of microsoft/MeshTransformer, and ours.
RENAMED = (
    (r"^trans_encoder\.(\d+)\.bert\.encoder\.layer\.(\d+)\.", r"blocks.\1.layers.\2."),
    (r"^trans_encoder\.(\d+)\.bert\.img_embedding\.", r"blocks.\1.embed."),
    (r"^trans_encoder\.(\d+)\.bert\.position_embeddings\.weight$", r"blocks.\1.positions"),
    (r"^trans_encoder\.(\d+)\.cls_head\.", r"blocks.\1.head."),
    (r"^trans_encoder\.(\d+)\.residual\.", r"blocks.\1.shortcut."),
    (r"\.attention\.output\.dense\.", ".attention.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".feed_forward.0."),
    (r"\.output\.dense\.", ".feed_forward.2."),
    (r"\.output\.LayerNorm\.", ".norm2."),
    *((rf"^upsampling{number}\.", f"up.{place}.") for place, number in enumerate(("", 2))),
    (r"^conv_learn_tokens\.", "cells."),
    *((rf"^cam_param_fc{number}\.", f"camera.{place}.") for place, number in enumerate(("", 2, 3))),
)
RESNET = tuple(  # which is a list of its parts there
    (rf"^backbone\.{place}\.", f"backbone.{name}.")
    for place, name in ((0, "conv1"), (1, "bn1"), (4, "layer1"), (5, "layer2"), (6, "layer3"), (7, "layer4"))
)
UNUSED = re.compile(r"\.bert\.(embeddings|pooler)\.|^backbone\.classifier\.")


def checkpoint_filter_fn(weights: dict[str, Tensor], model: METRO) -> dict[str, Tensor]:
    """Weights under our names, from a state dict with those or with the official ones. A model that has a body keeps it
    where the weights have none, as those of older runs and the official ones."""
    own = model.state_dict()
    kept = {name: own[name] for name in own if name.startswith(("body.", "template"))}
    if not model.body.regressor.any():
        kept = {}
    if "conv_learn_tokens.weight" not in weights:
        return kept | weights
    renamed, found = RENAMED + RESNET * ("backbone.4.0.conv1.weight" in weights), {}
    for name, value in weights.items():
        if not UNUSED.search(name):
            for pattern, new in renamed:
                name = re.sub(pattern, new, name)
            found[name] = value[: len(model.template)] if name.endswith(".positions") else value
    for first in [name for name in found if ".self.query." in name]:
        parts = [found.pop(first.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        found[first.replace(".self.query.", ".in_proj_")] = torch.cat(parts)
    return kept | found


def _register(name: str, **architecture) -> Callable[..., METRO]:
    """Register the model with timm; arguments of `timm.create_model` take precedence over those given here."""

    def create(
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        drop_path_rate=0.0,
        num_classes: Optional[int] = None,
        **kwargs,
    ) -> METRO:
        if drop_path_rate:
            raise ValueError("METRO has no stochastic depth; leave model.drop_path at 0")
        return METRO(**architecture | kwargs)

    create.__name__ = create.__qualname__ = name
    return register_model(create)


metro_r50 = _register("metro_r50")
metro_hrnet_w64 = _register("metro_hrnet_w64", backbone="hrnet_w64")
# For small figures of few vertices, from random weights.
metro_small = _register("metro_small", backbone="small", widths=(64, 48, 32), num_heads=2, hidden=128, dropout=0.0)
