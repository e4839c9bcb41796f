"""How an attention module is made to regularize: subclasses made at run time, which step aside in evaluation."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dropkey.patching.layer import Regularize


class Divert(TorchFunctionMode):
    """While entered, scaled_dot_product_attention is the regularized operator."""

    def __init__(self, regularize: Regularize):
        super().__init__()
        self.regularize = regularize

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.divert(*args, **kwargs)
        return func(*args, **kwargs)

    def divert(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        return self.regularize.attend(query, key, value, attn_mask, scale)


class Regularized:
    """Mixin that comes before the original class of an attention module."""

    def forward(self, *args, **kwargs):
        if not (self.fused_attn and self.attn_drop.active):
            return super().forward(*args, **kwargs)
        with Divert(self.attn_drop):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):  # the class is made at run time: pickle and deepcopy make it again
        return blank, (type(self).__mro__[2],), self.__dict__


@lru_cache(maxsize=None)
def regularized_class(base: type) -> type:
    return type(f"Regularized{base.__name__}", (Regularized, base), {"__module__": __name__, "__doc__": base.__doc__})


def blank(base: type) -> nn.Module:
    cls = regularized_class(base)
    return cls.__new__(cls)
