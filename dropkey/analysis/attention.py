"""The attention weights of a model: after the softmax, before anything is dropped, in evaluation mode.

Sites are those that `dropkey.patching` finds, so what can be regularized can be looked at. Shapes: B images, H heads,
Q queries, K keys.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from dropkey.errors import ConfigError
from dropkey.patching.find import AttentionModule, find
from dropkey.patching.mechanisms import Divert


@dataclass
class Attention:
    """What one attention layer did with a batch."""

    name: str  # of the module; " (2)" behind it in the second call of a module that is called more than once
    kind: str  # self, class, cross, outlook, token: see `dropkey.apply`
    weights: Tensor  # B H Q K, each row a distribution over keys
    parts: int  # windows or neighbourhoods (Swin, outlook) in which queries look around, 1: the whole image
    module: nn.Module


class Capture:
    """Stands where `Regularize` does in `Divert`: keeps the weights and drops nothing."""

    active = True

    def __init__(self, keep: Callable[[Tensor], None]):
        self.keep = keep

    def __call__(self, weights: Tensor) -> Tensor:
        self.keep(weights)
        return weights

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], scale: Optional[float]) -> Tensor:
        """What `scaled_dot_product_attention` returns, from weights in float32 at least."""
        full = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(full) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(full).transpose(-2, -1)
        if bias is not None:
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        return self(logits.softmax(-1)).to(v.dtype) @ v


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, see: Callable[[Attention], None]) -> None:
    """Runs `model` on `images` and hands the weights of each attention layer to `see`, in the order in which they run.

    Nothing is kept, so memory is that of one layer. The model is in evaluation mode meanwhile, and afterwards as it
    was. nn.TransformerEncoder leaves its fast path, which shows no weights.

    Raises:
        ConfigError: no attention to look at, or attention computed in a way that shows no weights.
    """
    layers = [found for found in find(model) if not found.unsupported_reason]
    calls, ran = Counter(), set()

    def keep(found: AttentionModule, weights: Tensor) -> None:
        calls[found.name] += 1
        name = found.name + (f" ({calls[found.name]})" if calls[found.name] > 1 else "")
        rows, parts = by_image(weights, len(images), getattr(found.module, "num_heads", None))
        see(Attention(name, found.kind, rows, parts, found.module))

    with evaluating(model), contextlib.ExitStack() as hooks:
        for found in layers:
            hook(found, partial(keep, found), ran, hooks)
        model(images)
    silent = sorted(ran - calls.keys())
    if silent or not ran:
        why = f"; {silent[0]} called neither scaled_dot_product_attention nor a softmax" if silent else ""
        raise ConfigError(f"{type(model).__name__} shows no attention weights{why or reason(model)}")


def attention(model: nn.Module, images: Tensor) -> list[Attention]:
    """`watch`, with everything kept: for a few images."""
    seen = []
    watch(model, images, seen.append)
    return seen


def hook(found: AttentionModule, keep: Callable[[Tensor], None], ran: set[str], hooks: contextlib.ExitStack) -> None:
    """Where `patching.put` would put a regularizer, a listener: before `attn_drop`, and within a `Divert`."""
    diverts = []

    def enter(*_) -> None:
        ran.add(found.name)
        diverts.append(Divert(Capture(keep), weights=found.attribute == "regularize").__enter__())

    def leave(*_) -> None:
        diverts.pop().__exit__(None, None, None)

    handles = [found.module.register_forward_pre_hook(enter)]
    handles.append(found.module.register_forward_hook(leave, always_call=True))
    if found.attribute == "attn_drop":
        handles.append(found.module.attn_drop.register_forward_pre_hook(lambda _, args: keep(args[0])))
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
    """Weights in whatever shape a module has them (... Q K) as B H Q K, and the number of windows that were put one
    after the other among the queries.

    Known are B Q K, BH Q K, BH N Q K, BN H Q K and B H N Q K, with N windows or neighbourhoods.
    """
    if weights.dim() == 3:
        weights = weights.unsqueeze(1)
    if weights.dim() == 4:
        first, second = weights.shape[:2]
        if heads and second != heads and first == images * heads:
            weights = weights.unflatten(0, (images, heads))
        elif first % images == 0:
            weights = weights.unflatten(0, (images, -1)).transpose(1, 2)
        else:
            weights = weights.unsqueeze(2)
    return weights.flatten(2, -2), weights.shape[2:-2].numel()


def reason(model: nn.Module) -> str:
    """Why a model has no attention to look at, as the end of a message."""
    obstacles = [f": {found.name}, {found.unsupported_reason}" for found in find(model) if found.unsupported_reason]
    return obstacles[0] if obstacles else "; no module of it is attention that dropkey.patching knows"
