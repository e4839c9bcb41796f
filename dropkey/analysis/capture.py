"""The attention weights of a model: after the softmax, before anything is dropped, in evaluation mode.

Layers are those that `dropkey.patching` finds, so whatever can be regularized can be captured. Shapes: B images,
H heads, Q queries, K keys, N windows.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, Optional

import torch
from einops import rearrange
from torch import Tensor, nn

from dropkey.errors import ConfigError
from dropkey.patching.find import AttentionModule, find_attention_modules
from dropkey.patching.mechanisms import InterceptAttention


@dataclass
class LayerAttention:
    """What one attention layer did with a batch."""

    name: str  # of the module; " (2)" is appended in the second call of a module that is called more than once
    kind: str  # self, class, cross, outlook, token, layer: see `dropkey.apply`
    weights: Tensor  # B H Q K, each row a distribution over keys
    windows: int  # in which queries attend (Swin, outlook), one after the other among the queries; 1: the whole image
    module: nn.Module


class Capture:
    """Takes the place of an `AttentionRegularizer` in `InterceptAttention`: passes weights on and drops nothing."""

    active = True

    def __init__(self, callback: Callable[[Tensor], None]):
        self.callback = callback

    def __call__(self, weights: Tensor) -> Tensor:
        self.callback(weights)
        return weights

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], scale: Optional[float]) -> Tensor:
        """As `scaled_dot_product_attention`, with weights in float32 at least."""
        full = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(full) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(full).transpose(-2, -1)
        if bias is not None:
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        return self(logits.softmax(-1)).to(v.dtype) @ v


@torch.no_grad()
def capture_attention(model: nn.Module, images: Tensor, callback: Callable[[LayerAttention], None]) -> None:
    """Runs `model` on `images` and calls `callback` with the weights of each attention layer, in forward order.

    Nothing is kept, so memory is that of one layer. The model is in evaluation mode meanwhile, and afterwards as it
    was. nn.TransformerEncoder leaves its fast path, which has no weights to capture.

    Raises:
        ConfigError: no attention layer, or attention computed in a way that gives no weights.
    """
    layers = [found for found in find_attention_modules(model) if not found.unsupported_reason]
    calls, ran = Counter(), set()

    def collect(found: AttentionModule, weights: Tensor) -> None:
        calls[found.name] += 1
        name = found.name + (f" ({calls[found.name]})" if calls[found.name] > 1 else "")
        weights, windows = by_image(weights, len(images), getattr(found.module, "num_heads", None))
        callback(LayerAttention(name, found.kind, weights, windows, found.module))

    with evaluating(model), contextlib.ExitStack() as hooks:
        for found in layers:
            add_hooks(found, partial(collect, found), ran, hooks)
        model(images)
    silent = sorted(ran - calls.keys())
    if silent or not ran:
        why = f"; {silent[0]} called neither scaled_dot_product_attention nor a softmax" if silent else ""
        raise ConfigError(f"{type(model).__name__} has no attention weights to capture{why or no_attention(model)}")


def attention_weights(model: nn.Module, images: Tensor) -> list[LayerAttention]:
    """`capture_attention` with all layers kept: for a few images."""
    layers = []
    capture_attention(model, images, layers.append)
    return layers


def add_hooks(
    found: AttentionModule, callback: Callable[[Tensor], None], ran: set[str], hooks: contextlib.ExitStack
) -> None:
    """Capture where `dropkey.apply` would regularize: before `attn_drop`, and within `InterceptAttention`."""
    entered = []

    def enter(*_) -> None:
        ran.add(found.name)
        own = found.attribute == "attn_regularizer"
        entered.append(InterceptAttention(Capture(callback), weights=own).__enter__())

    def leave(*_) -> None:
        entered.pop().__exit__(None, None, None)

    handles = [found.module.register_forward_pre_hook(enter)]
    handles.append(found.module.register_forward_hook(leave, always_call=True))
    if found.attribute == "attn_drop":
        handles.append(found.module.attn_drop.register_forward_pre_hook(lambda _, args: callback(args[0])))
    for handle in handles:
        hooks.callback(handle.remove)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def by_image(weights: Tensor, images: int, heads: Optional[int]) -> tuple[Tensor, int]:
    """Weights in any shape that modules use (B Q K, BH Q K, BH N Q K, BN H Q K, B H N Q K) as B H NQ K, and N."""
    if weights.dim() == 3:
        weights = weights.unsqueeze(1)
    if weights.dim() == 4:
        first, second = weights.shape[:2]
        if heads and second != heads and first == images * heads:
            weights = rearrange(weights, "(b h) n q k -> b h n q k", b=images)
        elif first % images == 0:
            weights = rearrange(weights, "(b n) h q k -> b h n q k", b=images)
        else:
            weights = weights.unsqueeze(2)
    return weights.flatten(2, -2), weights.shape[2:-2].numel()


def no_attention(model: nn.Module) -> str:
    """Why a model has no attention to capture, as the end of a message."""
    reasons = [(found.name, found.unsupported_reason) for found in find_attention_modules(model)]
    unsupported = [f": {name}, {reason}" for name, reason in reasons if reason]
    return unsupported[0] if unsupported else "; dropkey.patching knows no module of it as attention"
