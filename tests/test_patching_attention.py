"""What patched layers compute: as dense recomputations, on the right grid, compiled, checkpointed, in bf16."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import volo as timm_volo
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from dropkey import patching, regularizers
from dropkey.bernoulli import as_ratio, as_threshold
from dropkey.models.t2t_vit import TokenTransformerAttention
from dropkey.patching.find import key_grid
from dropkey.regularizers import REGULARIZERS, STRUCTURED
from tiny_models import (
    EVERY_LAYER,
    FAMILIES,
    FAMILY_AND_REGULARIZER,
    deit,
    images_for,
    t2t,
    t2t_small,
    t2t_t,
    vit,
    volo,
    window_of,
)

REGULARIZER = pytest.mark.parametrize("regularizer", REGULARIZERS)


def patch(module, regularizer="dropkey", ratio=0.3, **others):
    others = {"layers": EVERY_LAYER, "window": window_of(regularizer)} | others
    return patching.apply(module, regularizer, ratio, "constant", **others)


# ---- dense recomputations, in the paper's own words: -1e12 on dropped logits, softmax


def weigh(logits, drop, regularizer, ratio=0.3):
    """Attention weights under the mask; a query without keys attends to nothing."""
    if REGULARIZERS[regularizer].masks_logits:
        return (logits - 1e12 * drop.double()).softmax(-1) * ~drop.all(-1, keepdim=True)
    weights = logits.softmax(-1) * ~drop
    if regularizer == "dropout":
        return weights / (1 - as_ratio(as_threshold(ratio, torch.device("cpu"))))
    total = weights.sum(-1, keepdim=True).detach()
    return weights / torch.where(total > 0, total, 1)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def dense_self(module, x, drop, regularizer, bias=0.0):
    q, k, v = (heads(part, module.num_heads) for part in module.qkv(x.flatten(1, -2)).chunk(3, dim=-1))
    weights = weigh(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias, drop, regularizer)
    return module.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x)


def dense_window(module, x, drop, regularizer):
    return dense_self(module, x, drop, regularizer, bias=module._get_rel_pos_bias())


def dense_class(module, x, drop, regularizer):
    k, v = (heads(part, module.num_heads) for part in module.kv(x).chunk(2, dim=-1))
    q = heads(module.q(x[:, :1]), module.num_heads)
    weights = weigh(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, drop, regularizer)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


def dense_token(module, x, drop, regularizer):
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    return module.proj(weigh(q @ k.transpose(-2, -1) * x.shape[-1] ** -0.5, drop[:, 0], regularizer) @ v) + v


def dense_outlook(module, x, drop, regularizer):
    """Stride 1, kernel 3: each position predicts a 9 x 9 matrix over its neighbourhood; the results are added up."""
    batch, height, width, channels = x.shape
    logits = module.attn(x).view(batch, height, width, module.num_heads, 9, 9) * (channels / module.num_heads) ** -0.5
    drop = drop.expand(-1, -1, 9, -1).reshape(batch, module.num_heads, height, width, 9, 9).permute(0, 2, 3, 1, 4, 5)
    weights, padded = weigh(logits, drop, regularizer), F.pad(module.v(x), (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(padded)
    offsets = [(down, across) for down in range(3) for across in range(3)]
    near = torch.stack([padded[:, i : i + height, j : j + width] for i, j in offsets], dim=-2)  # B H W 9 C
    mixed = weights @ near.unflatten(-1, (module.num_heads, -1)).transpose(-2, -3)
    for place, (i, j) in enumerate(offsets):
        out[:, i : i + height, j : j + width] += mixed[..., place, :].flatten(-2)
    return module.proj(out[:, 1:-1, 1:-1])


def fused(module, is_fused=True):
    module.fused_attn = is_fused
    return module


def unfused(module):
    return fused(module, False)


# name: module, shape of its input, dense recomputation, the mechanism reported
LAYERS = {
    "timm, fused": (lambda: fused(Attention(16, 2)), (2, 17, 16), dense_self, "fused"),
    "timm, parts": (lambda: unfused(Attention(16, 2)), (2, 17, 16), dense_self, "weights"),
    "VOLO, fused": (lambda: fused(timm_volo.Attention(16, 2)), (2, 4, 4, 16), dense_self, "fused"),
    "VOLO, parts": (lambda: unfused(timm_volo.Attention(16, 2)), (2, 4, 4, 16), dense_self, "weights"),
    "windows, fused": (lambda: fused(WindowAttention(16, 2, window_size=4)), (2, 16, 16), dense_window, "fused"),
    "windows, parts": (lambda: unfused(WindowAttention(16, 2, window_size=4)), (2, 16, 16), dense_window, "weights"),
    "class": (lambda: timm_volo.ClassAttention(16, 2), (2, 17, 16), dense_class, "weights"),
    "token": (lambda: TokenTransformerAttention(12, 16), (2, 16, 12), dense_token, "weights"),
    "outlook": (lambda: timm_volo.OutlookAttention(16, 2), (2, 4, 5, 16), dense_outlook, "weights"),
}


@REGULARIZER
@pytest.mark.parametrize("layer", LAYERS)
def test_training_is_the_dense_recomputation_with_the_same_mask(drawn, layer, regularizer):
    build, shape, dense, mechanism = LAYERS[layer]
    model = nn.Sequential(build()).double()
    report = patch(model, regularizer, grid=(4, 4))
    assert [layer.mechanism for layer in report.layers] == [mechanism]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = model(x)
    (drop,) = drawn.masks
    wanted = dense(model[0], x, drop, regularizer)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    towards, trained = torch.randn_like(out), [x, *model.parameters()]
    ours, theirs = (torch.autograd.grad((y * towards).sum(), trained) for y in (out, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masked", ["attn_mask", "is_causal"])
@REGULARIZER
def test_masks_of_the_caller_hold_besides(drawn, regularizer, masked):
    arguments = {masked: torch.rand(2, 1, 17, 17) < 0.8 if masked == "attn_mask" else True}
    model = nn.Sequential(Attention(16, 2)).double()
    patch(model, regularizer, grid=(4, 4))
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    out = model[0](x, **arguments)
    (drop,) = drawn.masks
    allowed = arguments.get("attn_mask", torch.ones(17, 17, dtype=torch.bool).tril())
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e12)
    wanted = dense_self(model[0], x, drop, regularizer, bias)
    alive = (~drop & allowed).any(-1).all(1)
    torch.testing.assert_close(out[alive], wanted[alive], rtol=0, atol=1e-12)


def test_grouped_queries_are_diverted_too(drawn):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_drop, self.fused_attn = nn.Dropout(0.0), True

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    model = nn.Sequential(Grouped())
    patch(model)
    q, (k, v) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 9, 8)
    out = model[0](q, k, v)
    (drop,) = drawn.masks
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=~drop, enable_gqa=True)
    torch.testing.assert_close(out, wanted)


def test_a_layer_that_is_asked_for_its_weights_stays_regularized(drawn):
    """As tools that plot attention maps do: they set fused_attn to False."""
    model = nn.Sequential(Attention(16, 2)).double()
    patch(model)
    x, outs = torch.randn(2, 17, 16, dtype=torch.float64), []
    for fused in (True, False):
        model[0].fused_attn = fused
        torch.manual_seed(1)
        outs.append(model(x))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    assert len(drawn.masks) == 2


@REGULARIZER
def test_half_precision_weights_are_renormalised_in_fp32(regularizer):
    layer = patching.layer.AttentionRegularizer(regularizer, window_of(regularizer), "auto", "self", None, 0)
    layer.ratio = 0.3
    weights = torch.randn(2, 3, 196, 196).softmax(-1).bfloat16()
    torch.manual_seed(1)
    half = layer(weights)
    torch.manual_seed(1)
    torch.testing.assert_close(half.float(), layer(weights.float()), rtol=2**-8, atol=0)
    assert half.dtype == torch.bfloat16


# ---- where keys lie


@pytest.mark.parametrize(
    ("keys", "model_grid", "num_prefix", "wanted"),
    [
        (197, (14, 14), 1, ((14, 14), 1)),
        (198, (14, 14), 2, ((14, 14), 2)),
        (196, (14, 14), 1, ((14, 14), 0)),
        (61, (6, 10), 1, ((6, 10), 1)),
        (784, (14, 14), 1, ((28, 28), 0)),
        (3136, (14, 14), 1, ((56, 56), 0)),
        (240, (6, 10), 1, ((12, 20), 0)),
        (15, (6, 10), 1, ((3, 5), 0)),
        (16, (6, 10), 1, ((3, 5), 1)),
        (49, (16, 16), 1, ((7, 7), 0)),  # a window
        (49, None, 1, ((7, 7), 0)),
        (50, None, 1, ((7, 7), 1)),
        (51, None, 2, ((7, 7), 2)),
        (1, (1, 1), 0, ((1, 1), 0)),
    ],
)
def test_key_grid(keys, model_grid, num_prefix, wanted):
    assert key_grid(keys, model_grid, num_prefix) == wanted


@pytest.mark.parametrize(("keys", "model_grid"), [(60, None), (99, (14, 14)), (3, None), (62, (6, 10))])
def test_keys_that_fit_no_grid_are_refused(keys, model_grid):
    with pytest.raises(ValueError, match=f"{keys} keys fit neither"):
        key_grid(keys, model_grid, 1)


GRIDS = {  # grid and prefix tokens of each layer's keys, in forward order
    "vit": (lambda: vit(), [((4, 4), 1)] * 3),
    "vit, non-square": (lambda: vit((32, 48)), [((4, 6), 1)] * 3),
    "vit without class token": (lambda: vit((16, 72), class_token=False, global_pool="avg"), [((2, 9), 0)] * 3),
    "vit with registers": (lambda: vit(reg_tokens=4), [((4, 4), 5)] * 3),
    "deit": (lambda: deit((48, 32)), [((6, 4), 2)] * 3),
    "volo": (lambda: volo(), [((3, 3), 0)] + [((4, 4), 0)] * 3 + [((4, 4), 1)] * 2),
    "volo, non-square": (lambda: volo((40, 80)), [((3, 3), 0)] + [((5, 10), 0)] * 3 + [((5, 10), 1)] * 2),
    "volo, 9 x 4": (lambda: volo((72, 32)), [((3, 3), 0)] + [((9, 4), 0)] * 3 + [((9, 4), 1)] * 2),
    "t2t": (lambda: t2t((48, 80)), [((3, 5), 1)] * 3),
    "t2t_t": (lambda: t2t_t(), [((12, 12), 0), ((6, 6), 0)] + [((3, 3), 1)] * 3),
    "t2t_t, non-square": (lambda: t2t_t((48, 80)), [((12, 20), 0), ((6, 10), 0)] + [((3, 5), 1)] * 3),
    "t2t_small": (lambda: t2t_small(), [((16, 16), 0)] + [((8, 8), 1)] * 3),
}


@pytest.mark.parametrize("regularizer", STRUCTURED)
@pytest.mark.parametrize("name", GRIDS)
def test_structured_regularizers_see_the_grid_of_every_layer(drawn, name, regularizer):
    build, wanted = GRIDS[name]
    model = build()
    patch(model, regularizer)
    size = {"volo": (32, 32), "volo, non-square": (40, 80), "volo, 9 x 4": (72, 32)}.get(name)
    model(torch.randn(2, 3, *size) if size else images_for(model))
    assert [(layout["grid"], layout["num_prefix"]) for layout in drawn.layouts] == wanted


def test_a_grid_can_be_given(drawn):
    model = nn.Sequential(Attention(16, 2))
    patch(model, "dropkey_block", grid=(2, 8))
    model(torch.randn(2, 17, 16))
    assert drawn.layouts[0]["grid"] == (2, 8)


@pytest.mark.parametrize("regularizer", STRUCTURED)
@pytest.mark.parametrize("name", ["vit, non-square", "volo", "t2t_t"])
def test_a_relative_window_drops_as_that_number_of_cells_on_the_grid_of_each_layer(drawn, name, regularizer):
    build, grids = GRIDS[name]
    model = build()
    patch(model, regularizer, window=0.7)
    patching.seed_masks(model, 1)
    model(images_for(model))
    layers = [layer for _, layer in patching.patch.regularized_layers(model)]
    for layer, mask, (grid, num_prefix) in zip(layers, list(drawn.masks), grids, strict=True):
        cells = {3: 3, 4: 3, 6: 5, 12: 9}[min(grid)]
        layout = {"grid": grid, "num_prefix": num_prefix, "window": cells}
        wanted = regularizers.seeded_mask(regularizer, mask.shape, layer.threshold, layer.mask_seed, **layout)
        assert torch.equal(mask, wanted)


# ---- compiled, checkpointed, bf16


def training_step(function, x, module):
    torch.manual_seed(1)
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(
    ("regularizer", "backend"), [("dropkey", "aot_eager"), ("dropkey_cross", "eager"), ("dropout", "eager")]
)
def test_a_patched_layer_compiles_without_graph_breaks(regularizer, backend):
    model = nn.Sequential(Attention(16, 2))
    patch(model, regularizer, grid=(4, 4))
    x = torch.randn(2, 17, 16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(model[0], fullgraph=True, backend=backend)
    torch.testing.assert_close(training_step(compiled, x, model), training_step(model[0], x, model))
    assert not torch.equal(compiled(x), compiled(x))


def test_a_relative_window_compiles_without_graph_breaks():
    model = nn.Sequential(Attention(16, 2))
    patch(model, "dropkey_block_column", window=0.5)
    x = torch.randn(2, 17, 16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(model[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(training_step(compiled, x, model), training_step(model[0], x, model))


@pytest.mark.parametrize("regularizer", ["dropkey_cross"])
def test_a_compiled_layer_follows_new_ratios_and_modes(regularizer):
    """Numbers that change between calls become symbols inside torch.compile."""
    model = nn.Sequential(Attention(16, 2))
    patch(model, regularizer, grid=(4, 4))
    x = torch.randn(2, 17, 16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(model[0], fullgraph=True, backend="eager")
    for ratio in (0.3, 0.5, 0.6, 0.0):
        patching.set_ratio(model, ratio, "constant")
        torch.testing.assert_close(training_step(compiled, x, model), training_step(model[0], x, model))
    patching.set_ratio(model, 0.3, "constant")
    model.eval()
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(("layer", "regularizer"), list(zip(LAYERS, cycle(REGULARIZERS), strict=False)))
def test_checkpointed_layers_give_the_same_gradients(layer, regularizer):
    build, shape, _, _ = LAYERS[layer]
    model = nn.Sequential(build())
    patch(model, regularizer, grid=(4, 4))
    x = torch.randn(shape, requires_grad=True)
    plain = training_step(model, x, model)
    again = training_step(lambda x: checkpoint(model, x, use_reentrant=False), x, model)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_models_give_the_same_gradients(family):
    model, gradients = FAMILIES[family](), []
    patch(model)
    images = images_for(model)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("family", "regularizer"), FAMILY_AND_REGULARIZER)
def test_bf16_autocast_stays_finite(family, regularizer):
    model = FAMILIES[family]()
    patch(model, regularizer, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(3 * images_for(model))
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
