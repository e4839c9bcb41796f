"""Attention as people write it in models of their own, and the errors where it cannot be regularized."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropkey

WIDTH, HEADS = 16, 2


class Projected(nn.Module):
    """Queries, keys and values, and what all variants below do with them: `mix`."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.prepare()

    def prepare(self):
        pass

    def split(self, x):
        return (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))

    def merge(self, x):
        return self.proj(x.transpose(1, 2).flatten(2))

    def logits(self, q, k):
        return torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5


class Fused(Projected):
    def forward(self, x):
        q, k, v = self.split(x)
        dropout = 0.1 if self.training else 0.0
        return self.merge(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))


class Einsum(Projected):
    def prepare(self):
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.merge(torch.einsum("bhij,bhjd->bhid", self.attn_drop(self.logits(q, k).softmax(dim=-1)), v))


class Folded(Einsum):
    """Heads as part of the batch."""

    def forward(self, x):
        q, k, v = (part.flatten(0, 1) for part in self.split(x))
        weights = self.attn_drop(torch.bmm(q, k.transpose(1, 2)).softmax(-1))
        return self.merge(torch.bmm(weights, v).unflatten(0, (-1, HEADS)))


class ReadsItsDropout(Einsum):
    def forward(self, x):
        q, k, v = self.split(x)
        weights = F.dropout(F.softmax(self.logits(q, k), -1), self.attn_drop.p, self.training)
        return self.merge(weights @ v)


class FloatDropout(Projected):
    def prepare(self):
        self.attn_drop = 0.1

    def forward(self, x):
        q, k, v = self.split(x)
        weights = F.dropout(F.softmax(self.logits(q, k), dim=-1), p=self.attn_drop, training=self.training)
        return self.merge(weights @ v)


class OtherNames(Projected):
    def prepare(self):
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.merge(self.dropout(self.attend(self.logits(q, k))) @ v)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 4:] = True
        return self.mha(x, x, x, key_padding_mask=padding)[0]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = Fused(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        memory, x = x[:, :3], x + self.self_attn(x)
        return x + self.cross_attn(x, memory, memory)[0]


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.again = Einsum()

    def forward(self, x):
        return self.again(self.first(x))


# name: model, (kind, mechanism) of each layer
MODELS = {
    "scaled_dot_product_attention": (Fused, [("self", "fused")]),
    "einsum": (Einsum, [("self", "weights")]),
    "heads folded into the batch": (Folded, [("self", "weights")]),
    "F.dropout with attn_drop.p": (ReadsItsDropout, [("self", "softmax")]),
    "attn_drop is a number": (FloatDropout, [("self", "softmax")]),
    "nn.Softmax and other names": (OtherNames, [("self", "softmax")]),
    "wrapped nn.MultiheadAttention": (Wrapped, [("self", "fused")]),
    "decoder": (Decoder, [("self", "fused"), ("cross", "fused")]),
    "used twice": (UsedTwice, [("self", "weights")]),
}


def run(model, x, seed=1):
    torch.manual_seed(seed)
    return model(x)


def apply(model, ratio=0.4, **others):
    return dropkey.apply(model, "dropkey", ratio, "constant", layers=("self", "cross"), **others)


@pytest.mark.parametrize("name", MODELS)
def test_handwritten_attention_is_regularized_in_training_only_and_can_be_taken_back(name):
    build, wanted = MODELS[name]
    model, x = build(), torch.randn(2, 9, WIDTH)
    text, trained, evaluated = repr(model), run(model, x), run(model.eval(), x)
    report = apply(model.train(), softmax=("FloatDropout",) if build is FloatDropout else ())
    assert [(layer.kind, layer.mechanism) for layer in report.layers] == wanted
    assert not torch.equal(run(model, x, seed=1), run(model, x, seed=2))
    assert torch.equal(run(model.eval(), x), evaluated)
    with dropkey.always_on(model):
        assert not torch.equal(run(model, x, seed=1), run(model, x, seed=2))
    dropkey.set_ratio(model.train(), 0.0)
    assert torch.equal(run(model, x), evaluated), "its own dropout still acts"
    dropkey.undo(model)
    assert repr(model) == text and torch.equal(run(model, x), trained)


def test_a_module_used_twice_draws_two_masks(drawn):
    model = UsedTwice()
    assert len(apply(model).layers) == 1
    model(torch.randn(2, 9, WIDTH))
    assert len(drawn.masks) == 2 and not torch.equal(*drawn.masks)


@pytest.mark.parametrize("masked", [None, (9,), (9, 9), "first"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 3, 4), (2, 3, 4, 2)])
def test_any_number_of_dimensions_and_any_mask_that_broadcasts(drawn, batch, masked):
    class Attention(nn.Module):
        def forward(self, q, mask):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    model, q = nn.Sequential(Attention()), torch.randn(*batch, 9, 8)
    shape = (*batch[:1], *[1 for _ in batch[1:]], 9, 9) if masked == "first" else masked
    mask = None if shape is None else torch.rand(shape) < 0.6
    apply(model)
    out = model[0](q, mask)
    allowed = ~drawn.masks[0].reshape(*batch, 9, 9) & (True if mask is None else mask)
    weights = (q @ q.transpose(-2, -1) * 8**-0.5 - 1e12 * ~allowed).softmax(-1) * allowed.any(-1, keepdim=True)
    torch.testing.assert_close(out, weights @ q)


def test_dropout_of_the_output_of_attention_is_no_dropout_of_weights():
    """Renormalised, features would not be what they were."""

    class Block(Wrapped):
        def __init__(self):
            super().__init__()
            self.attn_drop = nn.Dropout(0.1)

        def forward(self, x):
            return x + self.attn_drop(super().forward(x))

    model = Block()
    assert [layer.name for layer in apply(model).layers] == ["mha"]
    assert isinstance(model.attn_drop, nn.Dropout)


def test_the_report_has_a_name_for_the_model_itself():
    assert "\n  (the model)  " in str(apply(Einsum()))


def test_where_no_attention_is_found_the_message_tells_how_it_is_found():
    with pytest.raises(
        ValueError, match=r"`attn_drop`, calls scaled_dot_product.*can be named: softmax=\('Attention',\)$"
    ):
        apply(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("wrong", ["self", ("self", "corss")])
def test_unknown_sites_are_refused_even_beside_known_ones(wrong):
    with pytest.raises(ValueError, match=r"layers=.* is no tuple of self, cross, outlook, token, layer, class"):
        dropkey.apply(Decoder(), layers=wrong)
