"""CeiT: a vision transformer with convolutions in its stem and in its feed-forward layers.

Source: "Incorporating Convolution Designs into Visual Transformers" (Yuan et al., ICCV 2021, arXiv:2103.11816).
Parameter names and shapes are those of the released checkpoints.

Shapes: B images, C channels, N patch tokens on a grid of h x w, D token width, H heads, L layers.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

STEM_STRIDE = 4  # pixels of the image to a pixel of the stem's features
STEM_WIDTH = 64
MIN_TOKENS = 9  # on fewer than a 3x3 grid there is hardly anything to attend to
EPS = 1e-6


class Stem(nn.Module):
    """(B, C, height, width) -> (B, 64, height / 4, width / 4). There is no activation, as in the original code."""

    def __init__(self, in_chans: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, STEM_WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(STEM_WIDTH)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.bn(self.conv(x)))


class ImageToTokens(nn.Module):
    """(B, C, height, width) -> (B, N, D): patches of the stem's features (section 3.2)."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if patch_size < STEM_STRIDE or patch_size % STEM_STRIDE or any(side % patch_size for side in img_size):
            raise ValueError(
                f"patches of {patch_size} px: a multiple of {STEM_STRIDE} that divides {img_size} is needed"
            )
        self.backbone = Stem(in_chans)
        side = patch_size // STEM_STRIDE
        self.proj = nn.Conv2d(STEM_WIDTH, embed_dim, kernel_size=side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(self.backbone(x)), "b d h w -> b (h w) d")


class LocallyEnhancedFeedForward(nn.Module):
    """(B, 1 + N, D) -> the same (section 3.3): the MLP of a block with a depthwise convolution among neighbours on the
    grid. The class token passes unchanged."""

    def __init__(self, dim: int, hidden_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.bn2 = nn.BatchNorm2d(hidden_dim)
        self.conv3 = nn.Conv2d(hidden_dim, dim, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        class_token, tokens = x.split([1, x.shape[1] - 1], dim=1)
        features = rearrange(tokens, "b (h w) d -> b d h w", h=self.grid[0])
        features = self.act(self.bn1(self.conv1(features)))
        features = self.act(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        return torch.cat((class_token, rearrange(features, "b d h w -> b (h w) d")), dim=1)


class Block(nn.Module):
    """(B, 1 + N, D) -> the same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int], drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.leff = LocallyEnhancedFeedForward(dim, int(dim * mlp_ratio), grid)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.leff(self.norm2(x)))


class LayerwiseClassAttention(nn.Module):
    """The last of L class tokens attends to all of them: (B, L, D) -> (B, 1, D).

    Not fused, so that `attn_drop` gets the attention weights (B, H, 1, L) and a regularizer can replace it.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        attn = ((q[:, :, -1:] * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        attn = self.attn_drop(attn)
        return self.proj(rearrange(attn @ v, "b h l d -> b l (h d)"))


class LayerwiseClassBlock(nn.Module):
    """From the class tokens of all layers to the one that is classified: (B, L, D) -> (B, D) (section 3.4)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = LayerwiseClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.feedforward = Mlp(dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1] + self.attn(self.norm1(x))[:, 0]
        return last + self.feedforward(self.norm2(last))


class CeiT(nn.Module):
    """CeiT: (B, in_chans, height, width) of exactly `img_size` -> logits (B, num_classes), or features if that is 0.

    `img_size` is a side or (height, width) in pixels. `patch_size` is the side of a token on the image in pixels, a
    multiple of the stem's 4; the published models have 16. `drop_path_rate` grows linearly from 0 in the first block to
    its value in the last; the layer over class tokens has none. `grid_size` is the (rows, columns) of the patch tokens,
    which follow one class token. Raises ValueError for fewer than 9 tokens or an image of another size.

    BatchNorm uses the images of one process and of one step of gradient accumulation, as in the original code.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.img_size = tuple(to_2tuple(img_size))
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.i2t = ImageToTokens(self.img_size, patch_size, in_chans, embed_dim)
        self.grid_size = rows, columns = tuple(side // patch_size for side in self.img_size)
        if rows * columns < MIN_TOKENS:
            raise ValueError(f"{rows}x{columns} tokens are fewer than {MIN_TOKENS}: smaller patches or larger images")
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + rows * columns, embed_dim), std=0.02))
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, self.grid_size, rate) for rate in rates)
        self.lca = LayerwiseClassBlock(embed_dim, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.reset_classifier(num_classes)
        self.apply(_init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass; their running statistics of BatchNorm then move twice a step."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialized one, or by the identity if `num_classes` is 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).apply(_init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """What is classified: normalized (B, D), made of the class tokens of all layers."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"image size {tuple(x.shape[-2:])}, but the model was built for {self.img_size}")
        x = self.i2t(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        class_tokens = []
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            class_tokens.append(x[:, 0])
        return self.norm(self.lca(torch.stack(class_tokens, dim=1) + self.pos_layer_embed))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D) -> logits (B, num_classes), or itself with `pre_logits`."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict, model: CeiT) -> dict[str, Tensor]:
    """A released file, or any state dict with its names, adapted to `model`; for timm's `filter_fn` arguments.

    The head is removed where the number of classes differs; position embeddings are resampled to another grid.
    """
    state_dict = state_dict.get("model", state_dict)
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "head.weight" in state_dict and len(state_dict["head.weight"]) != model.num_classes:
        del state_dict["head.weight"], state_dict["head.bias"]
    if "pos_embed" in state_dict and state_dict["pos_embed"].shape[1] != model.pos_embed.shape[1]:
        state_dict["pos_embed"] = resample_abs_pos_embed(
            state_dict["pos_embed"], list(model.grid_size), num_prefix_tokens=model.num_prefix_tokens
        )
    return state_dict


# What differs from timm's defaults; fixed_input_size tells timm that the model takes img_size.
_CFG = {"fixed_input_size": True, "crop_pct": 0.875, "classifier": "head", "first_conv": "i2t.backbone.conv"}
default_cfgs = generate_default_cfgs({f"ceit_{size}": _CFG for size in ("tiny", "small", "base")})


def _register(name: str, dim: int, heads: int) -> Callable[..., CeiT]:
    """Register the model with timm; arguments of `timm.create_model` take precedence over those given here."""
    architecture = {"embed_dim": dim, "num_heads": heads}

    def create(pretrained: bool = False, **kwargs) -> CeiT:
        kwargs = architecture | kwargs
        return build_model_with_cfg(CeiT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)

    create.__name__ = create.__qualname__ = name
    return register_model(create)


#                                width, heads
ceit_tiny = _register("ceit_tiny", 192, 3)
ceit_small = _register("ceit_small", 384, 6)
ceit_base = _register("ceit_base", 768, 12)
