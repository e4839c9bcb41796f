"""T2T-ViT: a vision transformer whose patch embedding is a small transformer itself.

Source: "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (Yuan et al., ICCV 2021,
arXiv:2101.11986). Overlapping soft splits, with a narrow transformer layer between each two, shrink the image to the
tokens of a deep and thin backbone. Parameter names and shapes are those of the released checkpoints.

Shapes: B images, C channels, N tokens, D token width, H heads, M random features.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# (kernel, stride, padding) in pixels of the input or tokens of the stage before.
IMAGENET_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # 224 px -> 56x56 -> 28x28 -> 14x14 tokens
SMALL_SPLITS = ((3, 2, 1), (3, 2, 1))  # 32 px -> 16x16 -> 8x8 tokens
TOKEN_DIM = 64  # width of the tokens between the soft splits
MIN_TOKENS = 9  # on fewer than a 3x3 grid there is hardly anything to attend to


class TokenPerformer(nn.Module):
    """Token layer with linear attention: (B, N, in_dim) -> (B, N, dim).

    There is no softmax and no N x N matrix, hence nothing for an attention regularizer to act on. As in the released
    checkpoints, `mlp` is a Sequential and keys come before queries in `kqv`.
    """

    def __init__(self, in_dim: int, dim: int = TOKEN_DIM, drop: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        # M orthogonal rows, w @ w.T = M * identity. Frozen, but a parameter: the checkpoints hold it.
        w = torch.empty(dim // 2, dim)
        self.w = nn.Parameter(nn.init.orthogonal_(w, gain=len(w) ** 0.5), requires_grad=False)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(drop))

    def random_features(self, x: Tensor) -> Tensor:
        """phi(x) = exp(w·x - |x|²/2) / sqrt(M), positive: (B, N, D) -> (B, N, M).

        With rows of w from N(0, I) the mean of phi(q)·phi(k) is exp(q·k). The initial rows have length sqrt(M), not
        about sqrt(D), as in the original code: a flatter kernel.
        """
        return torch.exp(x @ self.w.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2) / self.w.shape[0] ** 0.5

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """phi(q)(phi(k)ᵀv) / (phi(q)·sum of phi(k)): three (B, N, D) -> (B, N, D) in fp32.

        In fp32 also under autocast, as a rounded exponent gives a wrong exponential, and the sums run over N tokens.
        """
        device = q.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            phi_q, phi_k = self.random_features(q.float()), self.random_features(k.float())
            weighted_values = phi_k.transpose(1, 2) @ v.float()  # B M D
            total = phi_q @ phi_k.sum(dim=1).unsqueeze(-1)  # B N 1
            return (phi_q @ weighted_values) / (total + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        out = self.linear_attention(q, k, v).to(v.dtype)
        x = v + self.drop(self.proj(out))  # v is the residual, because the layer changes the width of x
        return x + self.mlp(self.norm2(x))


class TokenTransformerAttention(nn.Module):
    """One-head softmax attention that changes the width: (B, N, in_dim) -> (B, N, dim), values as the residual.

    Not fused, so that `attn_drop` gets the attention weights (B, 1, N, N) and a regularizer can replace it.
    """

    def __init__(self, in_dim: int, dim: int = TOKEN_DIM):
        super().__init__()
        self.num_heads = 1
        self.scale = in_dim**-0.5  # of the input's width, not of the head's, as in the original code
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three d) -> three b 1 n d", three=3)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        attn = self.attn_drop(attn)
        return rearrange(self.proj(attn @ v) + v, "b 1 n d -> b n d")


class TokenTransformer(nn.Module):
    """Token layer with softmax attention: (B, N, in_dim) -> (B, N, dim)."""

    def __init__(self, in_dim: int, dim: int = TOKEN_DIM):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = TokenTransformerAttention(in_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


TOKEN_LAYERS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Image to backbone tokens: (B, C, height, width) -> (B, N, embed_dim) (section 3.1, figure 4).

    Soft split, token layer, soft split, ..., soft split, projection. `grids` holds the (rows, columns) after each soft
    split; a border that no window covers is ignored, as in `unfold`.
    """

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, tokens: str, soft_splits: Sequence):
        super().__init__()
        if tokens not in TOKEN_LAYERS:
            raise ValueError(f"tokens={tokens!r} is not one of {', '.join(TOKEN_LAYERS)}")
        self.soft_splits = tuple(tuple(split) for split in soft_splits)
        self.grids: tuple[tuple[int, int], ...] = ()
        size, channels = img_size, in_chans
        for index, (kernel, stride, padding) in enumerate(self.soft_splits, start=1):
            size = tuple(max(0, (side + 2 * padding - kernel) // stride + 1) for side in size)
            self.grids += (size,)
            channels *= kernel * kernel
            if index < len(self.soft_splits):
                self.add_module(f"attention{index}", TOKEN_LAYERS[tokens](channels))
                channels = TOKEN_DIM
        self.project = nn.Linear(channels, embed_dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for index, (kernel, stride, padding) in enumerate(self.soft_splits):
            if index > 0:
                layer = getattr(self, f"attention{index}")
                x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
                x = rearrange(x, "b (h w) d -> b d h w", h=self.grids[index - 1][0])
            x = rearrange(F.unfold(x, kernel, stride=stride, padding=padding), "b patch n -> b n patch")
        return self.project(x)


def sinusoid_table(positions: int, dim: int) -> Tensor:
    """Fixed position embedding (1, positions, dim): sine on even channels, cosine on odd ones.

    Channel j of position p has the angle p / 10000^(2·floor(j/2)/dim) in radians. Computed in float64, as large angles
    lose their phase in float32; returned in the default dtype.
    """
    position = torch.arange(positions, dtype=torch.float64).unsqueeze(1)
    channel = torch.arange(dim)
    angle = position / 10000.0 ** (2 * (channel // 2).double() / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).unsqueeze(0).to(torch.get_default_dtype())


class T2TViT(nn.Module):
    """T2T-ViT: (B, in_chans, height, width) of exactly `img_size` -> logits (B, num_classes), or features if that is 0.

    `img_size` is a side or (height, width) in pixels. `soft_splits` lists (kernel, stride, padding), with a token layer
    (performer or transformer) between each two. `drop_rate` is, as in the original code and unlike timm's, the dropout
    after the position embedding and in the backbone's projections and MLPs. `drop_path_rate` grows linearly from 0 in
    the first block to its value in the last. `grid_size` is the (rows, columns) of the backbone's tokens, which follow
    one class token. Raises ValueError for fewer than 9 tokens and, in forward, for an image of another size.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        tokens: str = "performer",
        soft_splits: Sequence[Sequence[int]] = IMAGENET_SPLITS,
    ):
        super().__init__()
        self.img_size = tuple(to_2tuple(img_size))
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.tokens_to_token = TokensToToken(self.img_size, in_chans, embed_dim, tokens, soft_splits)
        self.grid_size = rows, columns = self.tokens_to_token.grids[-1]
        if rows * columns < MIN_TOKENS:
            raise ValueError(
                f"image size {self.img_size[0]}x{self.img_size[1]} leaves {rows}x{columns} = {rows * columns} backbone "
                f"tokens, fewer than {MIN_TOKENS}: use t2t_vit_small_image or a larger image"
            )
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(sinusoid_table(1 + rows * columns, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        # nn.LayerNorm, because its eps is 1e-5 and timm's is 1e-6.
        block = partial(Block, embed_dim, num_heads, mlp_ratio, proj_drop=drop_rate, norm_layer=nn.LayerNorm)
        self.blocks = nn.Sequential(*(block(drop_path=drop_path_rate * i / max(1, depth - 1)) for i in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_classifier(num_classes)
        self.apply(_init_linear)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute token layers (at 224 px the token transformer's N is 3136) and blocks in the backward pass."""
        self.grad_checkpointing = self.tokens_to_token.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialized one, or by the identity if `num_classes` is 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).apply(_init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalized tokens (B, 1 + rows·columns, embed_dim), the class token first."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"image size {tuple(x.shape[-2:])}, but the model was built for {self.img_size}")
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class token of (B, N, embed_dim) -> logits (B, num_classes), or itself (B, embed_dim) with `pre_logits`."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict, model: T2TViT) -> dict[str, Tensor]:
    """A released file, or any state dict with its names, adapted to `model`; for timm's `filter_fn` arguments.

    The head is removed where the number of classes differs: load with strict=False, as timm's `pretrained=True` does.
    With another number of tokens the model keeps its own `pos_embed`, which depends on the position alone.
    """
    keys = ("state_dict_ema", "state_dict", "model")  # in order of preference
    state_dict = next((state_dict[key] for key in keys if state_dict.get(key) is not None), state_dict)
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "head.weight" in state_dict and len(state_dict["head.weight"]) != model.num_classes:
        del state_dict["head.weight"], state_dict["head.bias"]
    if "pos_embed" in state_dict and state_dict["pos_embed"].shape[1] != model.pos_embed.shape[1]:
        state_dict["pos_embed"] = model.pos_embed.detach()
    return state_dict


# What differs from timm's defaults; fixed_input_size tells timm that the model takes img_size.
_CFG = {"fixed_input_size": True, "crop_pct": 0.9, "classifier": "head"}
_FILES = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main"
_RELEASED = {  # top-1 on ImageNet, which is in the file's name
    **{"7": 71.7, "10": 75.2, "12": 76.5, "14": 81.5, "19": 81.9, "24": 82.3, "t_14": 81.7, "t_19": 82.4, "t_24": 82.6}
}
default_cfgs = generate_default_cfgs(
    {
        f"t2t_vit_{size}": _CFG | {"url": f"{_FILES}/{top1}_T2T_ViT{size if size[0] == 't' else f'_{size}'}.pth.tar"}
        for size, top1 in _RELEASED.items()
    }
    | {"t2t_vit_small_image": _CFG | {"input_size": (3, 32, 32), "crop_pct": 1.0}}
)


def _register(name: str, dim: int, depth: int, heads: int, mlp_ratio: float, **others) -> Callable[..., T2TViT]:
    """Register the model with timm; arguments of `timm.create_model` take precedence over those given here."""
    architecture = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": mlp_ratio, **others}

    def create(pretrained: bool = False, **kwargs) -> T2TViT:
        kwargs = architecture | kwargs
        return build_model_with_cfg(T2TViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)

    create.__name__ = create.__qualname__ = name
    return register_model(create)


#                                  width, depth, heads, MLP ratio
t2t_vit_7 = _register("t2t_vit_7", 256, 7, 4, 2)
t2t_vit_10 = _register("t2t_vit_10", 256, 10, 4, 2)
t2t_vit_12 = _register("t2t_vit_12", 256, 12, 4, 2)
t2t_vit_14 = _register("t2t_vit_14", 384, 14, 6, 3)
t2t_vit_19 = _register("t2t_vit_19", 448, 19, 7, 3)
t2t_vit_24 = _register("t2t_vit_24", 512, 24, 8, 3)
t2t_vit_t_14 = _register("t2t_vit_t_14", 384, 14, 6, 3, tokens="transformer")
t2t_vit_t_19 = _register("t2t_vit_t_19", 448, 19, 7, 3, tokens="transformer")
t2t_vit_t_24 = _register("t2t_vit_t_24", 512, 24, 8, 3, tokens="transformer")
# For images of 32 px; source: "Vision Transformer for Small-Size Datasets" (Lee et al., arXiv:2112.13492).
t2t_vit_small_image = _register("t2t_vit_small_image", 256, 12, 4, 2, tokens="transformer", soft_splits=SMALL_SPLITS)
