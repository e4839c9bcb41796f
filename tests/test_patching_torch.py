"""nn.MultiheadAttention, the layers made of it, and torchvision's models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from covering import pairwise
from dropkey import patching
from dropkey.regularizers import REGULARIZERS
from tiny_models import window_of


def patched(model, regularizer="dropkey", ratio=0.3, layers=("self", "class", "cross"), **others):
    patching.apply(
        model, regularizer, ratio, "constant", layers=layers, window=window_of(regularizer), impl="reference", **others
    )
    return model


def run(function, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


# ---- nn.MultiheadAttention against the paper's words: -1e12 on dropped logits, softmax


def dense(module, query, key, value, drop, allowed):
    """Queries, keys and values as B L E; the weights and the output of each query that has a key left."""
    if module.in_proj_weight is None:
        projections = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        projections = module.in_proj_weight.chunk(3)
    offsets = (0, 0, 0) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (x @ p.T + b for x, p, b in zip((query, key, value), projections, offsets, strict=True))
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    allowed = F.pad(allowed, (0, k.shape[-2] - allowed.shape[-1]), value=0.0)
    kept = ~drop & (allowed > -torch.inf)
    weights = (logits + allowed.clamp(min=-1e12) - 1e12 * drop.double()).softmax(-1) * kept.any(-1, keepdim=True)
    out = (weights @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    return (out if module.out_proj.bias is None else out + module.out_proj.bias), weights


LENGTH, KEYS, WIDTH, HEADS = 5, 6, 8, 2
MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "own widths of keys and values": {"kdim": 3, "vdim": 4},
    "no bias": {"bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "all of them": {"kdim": 3, "vdim": 4, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def forbidden(*shape):
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    return mask


def additive(mask):
    return torch.randn(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


def as_float(mask):
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    return mask


# name: arguments of forward
MASKS = {
    "no mask": lambda: {},
    "boolean attn_mask": lambda: {"attn_mask": forbidden(LENGTH, KEYS)},
    "float attn_mask": lambda: {"attn_mask": additive(forbidden(LENGTH, KEYS))},
    "attn_mask of each head": lambda: {"attn_mask": forbidden(2 * HEADS, LENGTH, KEYS)},
    "boolean key_padding_mask": lambda: {"key_padding_mask": forbidden(2, KEYS)},
    "float key_padding_mask": lambda: {"key_padding_mask": additive(forbidden(2, KEYS))},
    "both masks": lambda: {"attn_mask": forbidden(LENGTH, KEYS), "key_padding_mask": forbidden(2, KEYS)},
    "is_causal": lambda: {"attn_mask": torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
}


def inputs(module):
    shapes = (2, LENGTH, WIDTH), (2, KEYS, module.kdim), (2, KEYS, module.vdim)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def call(module, arguments, **others):
    arguments = arguments if module.batch_first else [x.transpose(0, 1) for x in arguments]
    out, weights = module(*arguments, **others)
    return (out if module.batch_first else out.transpose(0, 1)), weights


@pytest.mark.parametrize(("name", "masked", "need_weights"), pairwise(MODULES, MASKS, [True, False]))
def test_multihead_attention_is_the_dense_recomputation(drawn, name, masked, need_weights):
    model = patched(nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, **MODULES[name]).double()))
    module, masks = model[0], MASKS[masked]()
    arguments = inputs(module)
    out, weights = call(module, arguments, need_weights=need_weights, average_attn_weights=False, **masks)
    allowed = torch.zeros(2, HEADS, LENGTH, KEYS, dtype=torch.float64)
    if "attn_mask" in masks:
        mask = as_float(masks["attn_mask"])
        allowed = allowed + (mask.unflatten(0, (2, HEADS)) if mask.dim() == 3 else mask)
    if "key_padding_mask" in masks:
        allowed = allowed + as_float(masks["key_padding_mask"])[:, None, None]
    wanted, wanted_weights = dense(module, *arguments, drawn.masks[0], allowed)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=1e-12)
    assert len(drawn.masks) == 1 and (weights is None) == (not need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
def test_weights_and_shapes_are_torchs_for_one_sample_without_a_batch(need_weights):
    module = nn.MultiheadAttention(WIDTH, HEADS)
    x, padding = torch.randn(5, WIDTH), torch.tensor([False, True, False, False, False])
    given = {"need_weights": need_weights, "key_padding_mask": padding}
    wanted = module(x, x, x, **given)
    model = patched(nn.Sequential(module), ratio=1e-9)
    torch.testing.assert_close(model[0](x, x, x, **given), wanted)


@pytest.mark.parametrize("need_weights", [True, False])
def test_averaged_weights_are_the_mean_over_heads(need_weights):
    module = patched(nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS)))[0]
    x = torch.randn(5, 2, WIDTH)
    _, each = run(module, x, x, x, average_attn_weights=False)
    _, mean = run(module, x, x, x)
    torch.testing.assert_close(mean, each.mean(1))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_both_paths_of_multihead_attention_draw_the_same_for_every_kind(regularizer):
    """need_weights=False goes through the operator, need_weights=True through the weights."""
    module = patched(nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS)).double(), regularizer, grid=(3, 3))[0]
    x = torch.randn(9, 2, WIDTH, dtype=torch.float64)
    outs = [run(module, x, x, x, need_weights=need)[0] for need in (True, False)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


def test_its_own_dropout_is_replaced_even_where_nothing_drops():
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    plain = copy.deepcopy(module)
    plain.dropout = 0.0
    x = torch.randn(5, 2, WIDTH)
    module = patched(nn.Sequential(module), ratio=0.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(module(x, x, x), plain(x, x, x), strict=True))


def test_undo_gives_its_dropout_back():
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    x, text = torch.randn(5, 2, WIDTH), repr(module)
    before = run(module, x, x, x)[0]
    model = patched(nn.Sequential(module))
    patching.undo(model)
    assert type(model[0]) is nn.MultiheadAttention and repr(model[0]) == text
    assert torch.equal(run(module, x, x, x)[0], before)


def test_a_causal_hint_without_a_mask_is_refused():
    module = patched(nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS)))[0]
    x = torch.randn(5, 2, WIDTH)
    with pytest.raises(ValueError, match="is_causal=True is only a hint: give attn_mask too"):
        module(x, x, x, is_causal=True)


# ---- layers made of it


def encoder(dropout=0.0, **changes):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True, **changes)
    return nn.TransformerEncoder(layer, 2)


def fast_calls(model, x):
    """How often torch computes a whole encoder layer in one call."""
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::_transformer_encoder_layer_fwd")


def test_the_fast_path_of_evaluation_is_still_taken():
    model, x = encoder().eval(), torch.randn(2, 7, 16)
    assert fast_calls(patched(model), x) == 2


def test_evaluation_of_an_encoder_is_that_of_the_unpatched_one_bitwise():
    model, x = encoder().eval(), torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        before = model(x), model(x, src_key_padding_mask=padding)
        patched(model)
        after = model(x), model(x, src_key_padding_mask=padding)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_always_on_leaves_the_fast_path_and_returns_to_it():
    model, x = patched(encoder().eval()), torch.randn(2, 7, 16)
    with patching.always_on(model):
        assert fast_calls(model, x) == 0
        with torch.no_grad():
            assert not torch.equal(run(model, x, seed=1), run(model, x, seed=2))
    assert fast_calls(model, x) == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_always_on_restores_the_switch_of_the_fast_path(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(KeyError), patching.always_on(patched(encoder())):
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_decoders_attend_to_themselves_and_across():
    model = nn.Transformer(16, 2, 1, 1, 32)
    report = patching.apply(model, layers=("self", "cross"))
    assert [(layer.name, layer.kind) for layer in report.layers] == [
        ("encoder.layers.0.self_attn", "self"),
        ("decoder.layers.0.self_attn", "self"),
        ("decoder.layers.0.multihead_attn", "cross"),
    ]


def test_attention_across_is_left_alone_by_default():
    report = patching.apply(nn.Transformer(16, 2, 1, 1, 32))
    assert [name for name, _ in report.skipped] == ["decoder.layers.0.multihead_attn"]
    assert report.skipped[0][1].startswith("cross attention is not among layers=")


def test_a_transformer_trains_with_masks_at_every_layer(drawn):
    model = patched(nn.Transformer(16, 2, 1, 2, 32, dropout=0.0))
    x, y = torch.randn(6, 2, 16), torch.randn(4, 2, 16)
    model(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4), tgt_is_causal=True).sum().backward()
    shapes = [(6, 6), (4, 4), (4, 6), (4, 4), (4, 6)]
    assert [mask.shape for mask in drawn.masks] == [(2, 2, *shape) for shape in shapes]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- torchvision


def shaken(model):
    """No parameter so small that its branch does not count, and no stochastic depth."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def swin(block, attention_dropout=0.0):
    from torchvision.models import swin_transformer as file

    merging = {file.SwinTransformerBlock: file.PatchMerging, file.SwinTransformerBlockV2: file.PatchMergingV2}
    return file.SwinTransformer(
        [4, 4],
        8,
        [2, 2],
        [2, 2],
        [2, 2],
        num_classes=3,
        block=block,
        downsample_layer=merging[block],
        attention_dropout=attention_dropout,
    )


VISION = {
    "ViT": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3),
    "Swin": lambda: swin(torchvision.models.swin_transformer.SwinTransformerBlock),
    "Swin v2": lambda: swin(torchvision.models.swin_transformer.SwinTransformerBlockV2),
    "MaxViT": lambda: torchvision.models.MaxVit((32, 32), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=3),
}
LAYERS_AND_MECHANISMS = {
    "ViT": (2, "fused"),
    "Swin": (4, "softmax"),
    "Swin v2": (4, "softmax"),
    "MaxViT": (4, "softmax"),
}
VISION_MODEL = pytest.mark.parametrize("name", VISION)


@VISION_MODEL
def test_layers_of_torchvision_are_found(name):
    report = patching.apply(VISION[name]())
    count, mechanism = LAYERS_AND_MECHANISMS[name]
    assert [layer.mechanism for layer in report.layers] == [mechanism] * count


@VISION_MODEL
def test_evaluation_of_torchvision_is_unchanged_bitwise(name):
    model, x = VISION[name]().eval(), torch.randn(2, 3, 32, 32)
    before, keys = model(x), list(model.state_dict())
    patched(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


def dense_weights(masks):
    """F.softmax as the paper has it, each call with the next mask."""
    softmax, masks = F.softmax, iter(masks)

    def masked(logits, dim):
        drop = next(masks).view(logits.shape)
        left = (softmax(logits, dim) * ~drop).sum(dim, keepdim=True)  # shifted windows forbid by -100, not -inf
        return softmax(logits - 1e12 * drop.to(logits.dtype), dim) * (left > 1e-18)

    return masked


@pytest.mark.parametrize("name", ["Swin", "Swin v2", "MaxViT"])
def test_training_of_torchvision_is_dropkey(monkeypatch, drawn, name):
    model, x = shaken(VISION[name]()).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = copy.deepcopy(model)
    out = patched(model)(x)
    assert len(drawn.masks) == LAYERS_AND_MECHANISMS[name][0]
    monkeypatch.setattr(F, "softmax", dense_weights(drawn.masks))
    torch.testing.assert_close(out, plain(x), rtol=1e-8, atol=1e-9)


@VISION_MODEL
def test_torchvision_without_a_ratio_trains_as_the_unpatched_model_bitwise(name):
    model, x = shaken(VISION[name]()), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    assert torch.equal(run(patched(model, ratio=0.0), x), run(plain, x))


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_dropout_of_attention_weights_in_swin_is_replaced(ratio):
    block = torchvision.models.swin_transformer.SwinTransformerBlock
    models, x = [swin(block, dropout) for dropout in (0.5, 0.0)], torch.randn(2, 3, 32, 32)
    models[1].load_state_dict(models[0].state_dict())
    outs = [run(patched(shaken(model), ratio=ratio), x) for model in models]
    assert torch.equal(*outs)


# ---- copied, compiled, checkpointed

SAMPLES = {
    "encoder": (encoder, (2, 7, 16)),
    "ViT": (VISION["ViT"], (2, 3, 32, 32)),
    "Swin v2": (VISION["Swin v2"], (2, 3, 32, 32)),
}
SAMPLE = pytest.mark.parametrize("name", SAMPLES)


def step(function, x, model, seed=1):
    out = run(function, x, seed=seed)
    return [out, *torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])]


@SAMPLE
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike(name, copy_of):
    build, shape = SAMPLES[name]
    model, x = patched(shaken(build())), torch.randn(shape)
    twin = copy_of(model)
    assert all(torch.equal(a, b) for a, b in zip(step(twin, x, twin), step(model, x, model), strict=True))


@pytest.mark.parametrize("name", ["encoder", "Swin v2"])
def test_compiled_without_graph_breaks_they_train_alike(name):
    build, shape = SAMPLES[name]
    model, x = patched(shaken(build())), torch.randn(shape)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(compiled, x, model), step(model, x, model))


@SAMPLE
def test_checkpointed_they_train_alike(name):
    build, shape = SAMPLES[name]
    model, x = patched(shaken(build())), torch.randn(shape)
    again = step(lambda x: checkpoint(model, x, use_reentrant=False), x, model)
    torch.testing.assert_close(again, step(model, x, model))
