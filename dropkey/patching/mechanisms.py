"""How an attention module is regularized: its class is replaced by a subclass, which does nothing in evaluation."""

from functools import lru_cache
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropkey.patching.layer import AttentionRegularizer
from dropkey.patching.multihead import multi_head_attention

SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)  # nn.Softmax calls the first
PRODUCTS = (torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class InterceptAttention(TorchFunctionMode):
    """While entered, the calls that attention consists of are regularized.

    scaled_dot_product_attention always; with `weights` also the result of a softmax over the last dimension, and
    multi_head_attention_forward, whose inner calls a mode does not see. A dropout of those weights is left out, because
    the regularizer replaces it.
    """

    def __init__(self, layer: AttentionRegularizer, weights: bool):
        super().__init__()
        self.layer, self.weights = layer, weights
        self.called = False  # whether there was anything to regularize
        self.rows = None  # shape of the latest weights without the keys

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.called = True
            return self.regularized_sdpa(*args, **kwargs)
        if self.weights and func is F.multi_head_attention_forward:
            self.called = True
            if self.layer.active:
                return multi_head_attention(self.layer, *args, **kwargs)
            return func(*args, **kwargs | {"training": False})
        if self.weights and func in SOFTMAX:
            return self.reweigh(func(*args, **kwargs), *args[1:2], **kwargs)
        if self.rows and func is F.dropout:
            weights = args[0] if args else kwargs["input"]
            if weights.shape[:-1] == self.rows:
                self.rows = None
                return weights
        if func in PRODUCTS:  # now the weights have met the values: a later dropout is not theirs
            self.rows = None
        return func(*args, **kwargs)

    def regularized_sdpa(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if not self.layer.active:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
        q, k, v = (x.expand(*batch, -1, -1) for x in (query, key, value))
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        elif attn_mask is not None and attn_mask.dtype != torch.bool:
            # Some models write the lowest number for -inf: a query without other keys would attend to forbidden ones
            attn_mask = attn_mask.masked_fill(attn_mask == torch.finfo(attn_mask.dtype).min, -torch.inf)
        if q.dim() == 4:
            return self.layer.attention(q, k, v, attn_mask, scale)
        if attn_mask is not None:
            attn_mask = to_bhqk(attn_mask.expand(*q.shape[:-1], k.shape[-2]))
        return self.layer.attention(to_bhqk(q), to_bhqk(k), to_bhqk(v), attn_mask, scale).reshape(
            *q.shape[:-1], v.shape[-1]
        )

    def reweigh(self, weights: Tensor, dim: Optional[int] = None, **_) -> Tensor:
        if dim not in (-1, weights.dim() - 1):
            return weights
        self.called, self.rows = True, weights.shape[:-1]
        return self.layer(to_bhqk(weights)).view(weights.shape)


def to_bhqk(x: Tensor) -> Tensor:
    """Any number of dimensions as four: leading ones are added or flattened."""
    while x.dim() < 4:
        x = x.unsqueeze(-3)
    return x.flatten(0, -4) if x.dim() > 4 else x


class RegularizedAttention:
    """Mixin that comes before the original class of an attention module."""

    def forward(self, *args, **kwargs):
        own = "attn_regularizer" in self._modules
        layer = self.attn_regularizer if own else self.attn_drop
        if not (layer.training or layer.always):
            return super().forward(*args, **kwargs)
        intercept = InterceptAttention(layer, weights=own)
        with intercept:
            out = super().forward(*args, **kwargs)
        if own and layer.active and not intercept.called:
            name = type(self).__name__.removeprefix("Regularized")
            raise RuntimeError(
                f"{name} called neither scaled_dot_product_attention nor a softmax over the last dimension, so its "
                "attention cannot be regularized; if its attention implementation was changed after dropkey.apply, "
                "change it back"
            )
        return out

    def __reduce_ex__(self, protocol):  # the class is made at run time: pickle and deepcopy make it again
        return empty_module, (type(self).__mro__[2],), self.__dict__


@lru_cache(maxsize=None)
def regularized_class(base: type) -> type:
    attributes = {"__module__": __name__, "__doc__": base.__doc__}
    return type(f"Regularized{base.__name__}", (RegularizedAttention, base), attributes)


def empty_module(base: type) -> nn.Module:
    cls = regularized_class(base)
    return cls.__new__(cls)
