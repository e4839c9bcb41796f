"""Every class of attention in timm, in one tiny model each; `scripts/coverage.py` goes through every architecture."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import attention2d, halo_attn
from timm.models import crossvit, efficientformer, efficientformer_v2, fastvit, maxxvit, metaformer, mvitv2, nest, shvit
from timm.models import nextvit as next_vit
from torch import nn

from dropkey import patching
from dropkey.patching.find import SOFTMAX_CLASSES
from tiny_models import volo

SCRIPT = Path(__file__).parents[1] / "scripts" / "coverage.py"
spec = importlib.util.spec_from_file_location("timm_coverage", SCRIPT)
coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2)}
FOUR = {"depths": (1, 1, 1, 1)}
# name: arguments, side of the images
MODELS = {
    "vit_tiny_patch16_224": (VIT, 32),
    "beit_base_patch16_224": (VIT, 32),
    "botnet26t_256": ({"img_size": 64}, 64),
    "cait_xxs24_224": (VIT, 32),
    "convit_tiny": (VIT | {"local_up_to_layer": 1, "depth": 2}, 32),
    "cpubone_nano": ({}, 64),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}, 32),
    "efficientvit_m0": ({"img_size": 64}, 64),
    "eva02_tiny_patch14_224": (VIT, 32),
    "gcvit_xxtiny": ({"img_size": 64}, 64),
    "hiera_tiny_224": ({"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 16}, 64),
    "levit_128s": ({"img_size": 64}, 64),
    "test_maxvit": ({"img_size": 64}, 64),
    "mobilevit_xxs": ({}, 64),
    "pvt_v2_b0": (FOUR, 64),
    "samvit_base_patch16": (VIT | {"img_size": 64, "global_attn_indexes": (0,)}, 64),
    "swin_tiny_patch4_window7_224": (SWIN, 32),
    "swinv2_tiny_window8_256": (SWIN, 32),
    "swinv2_cr_tiny_224": (SWIN, 32),
    "test_vit3": ({"img_size": 64}, 64),
    "test_vit_relpos": ({"img_size": 64}, 64),
    "tiny_vit_5m_224": (FOUR, 64),
    "tnt_s_legacy_patch16_224": ({"img_size": 64, "depth": 1}, 64),
    "twins_svt_small": ({"img_size": 64, "depths": (2, 1, 1, 1)}, 64),
    "visformer_tiny": ({"img_size": 64, "depth": (1, 1, 1)}, 64),
    "vit_pwee_patch16_reg1_gap_256": (VIT, 32),
    "vit_dwee_patch16_reg1_gap_256": (VIT, 32),
    "vit_dpwee_patch16_reg1_gap_256": (VIT, 32),
    "xcit_nano_12_p8_224": ({"img_size": 32, "depth": 1}, 32),
}
TWO = {"depths": (1, 1), "num_heads": (2, 2)}
# Where no small model can be had, the layer by itself: how it is made, shape of its input
LAYERS = {
    "VOLO": (volo, (2, 3, 32, 32)),
    "HaloNet": (lambda: halo_attn.HaloAttn(16, num_heads=2, block_size=4, halo_size=2), (2, 16, 8, 8)),
    "CoAtNet": (lambda: maxxvit.Attention2d(16, dim_head=8), (2, 16, 4, 4)),
    "CrossViT": (lambda: crossvit.CrossAttention(16, num_heads=2), (2, 9, 16)),
    "EfficientFormer": (lambda: efficientformer.Attention(16, 8, 2, 2, resolution=4), (2, 16, 16)),
    "EfficientFormer v2": (lambda: efficientformer_v2.Attention2d(16, 8, 2, 2, resolution=4), (2, 16, 4, 4)),
    "EfficientFormer v2, pooled": (
        lambda: efficientformer_v2.Attention2dDownsample(16, 8, 2, 2, resolution=4),
        (2, 16, 4, 4),
    ),
    "FastViT": (lambda: fastvit.Attention(16, head_dim=8), (2, 16, 4, 4)),
    "CAFormer": (lambda: metaformer.Attention(16, head_dim=8), (2, 16, 16)),
    "MobileNet v4": (lambda: attention2d.MultiQueryAttention2d(16, num_heads=2, kv_stride=2), (2, 16, 8, 8)),
    "MViT v2": (
        lambda: mvitv2.MultiScaleVit(mvitv2.MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1), (32, 32)),
        (2, 3, 32, 32),
    ),
    "NesT": (lambda: nest.Nest(32, patch_size=4, num_levels=2, embed_dims=(16, 32), **TWO), (2, 3, 32, 32)),
    "Next-ViT": (lambda: next_vit.EfficientAttention(16, head_dim=8, sr_ratio=2), (2, 16, 16)),
    "SHViT": (lambda: shvit.SHSA(16, 8, 8), (2, 16, 4, 4)),
}


NO_WARNING = pytest.mark.filterwarnings("error:dropkey.apply left out")


@NO_WARNING
@pytest.mark.parametrize("name", MODELS)
def test_training_of_models_is_dropkey_and_evaluation_unchanged(name):
    arguments, side = MODELS[name]
    model = coverage.prepared(timm.create_model(name, num_classes=3, **arguments))
    assert list(coverage.check(model, torch.randn(2, 3, side, side, dtype=torch.float64))) == []


@NO_WARNING
@pytest.mark.parametrize("name", LAYERS)
def test_training_of_layers_is_dropkey_and_evaluation_unchanged(name):
    build, shape = LAYERS[name]
    model = coverage.prepared(nn.Sequential(build()))
    assert list(coverage.check(model, torch.randn(shape, dtype=torch.float64))) == []


@pytest.mark.parametrize(
    "name",
    ["nextvit_small", "swiftformer_xs", "bat_resnext26ts", "efficientvim_m1", "skresnet18", "resnest14d", "csatv2"],
)
def test_what_has_no_distribution_over_keys_is_not_taken_for_attention_that_is_missed(name):
    with coverage.quick_to_build():
        found = patching.find.find_attention_modules(timm.create_model(name, device="meta"))
    assert any(each.unsupported_reason for each in found) and not any(each.missed for each in found)


def test_a_mixture_of_softmaxes_is_masked_as_one_distribution(monkeypatch):
    """ConViT's positional and content attention: what is dropped is a key of both."""
    masks, mask = [], coverage.regularizers.seeded_mask
    monkeypatch.setattr(coverage.regularizers, "seeded_mask", lambda *a, **k: masks.append(mask(*a, **k)) or masks[-1])
    model = coverage.prepared(timm.create_model("convit_tiny", **VIT, local_up_to_layer=1))
    attention, x = model.blocks[0].attn, torch.randn(2, 16, 64, dtype=torch.float64)
    attention.rel_indices = attention.get_rel_indices(16)
    weights = attention.get_attention(x)
    patching.apply(model, ratio=0.3, schedule="constant")
    out = attention(x)
    kept = weights * ~masks[0]
    weights = kept / kept.sum(-1, keepdim=True).clamp(min=1e-18)
    v = attention.v(x).unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(out, attention.proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_without_attn_drop_is_found_by_its_call_of_sdpa(fused):
    class Plain(nn.Module):
        fused_attn = fused

        def forward(self, q):
            if self.fused_attn:
                return nn.functional.scaled_dot_product_attention(q, q, q)
            return (q @ q.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ q

    model, q = nn.Sequential(Plain()), torch.randn(2, 2, 9, 8)
    report = patching.apply(model, ratio=0.3, schedule="constant", impl="reference")
    assert [layer.mechanism for layer in report.layers] == ["fused" if fused else "softmax"]
    torch.manual_seed(1)
    out = model(q)
    model[0].fused_attn = not fused
    torch.manual_seed(1)
    torch.testing.assert_close(model(q), out)


def test_softmax_over_another_dimension_is_left_alone():
    class Gated(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x) * x.softmax(dim=-2)

    class Plain(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x, outs = torch.randn(2, 2, 9, 8), []
    for layer in (Gated(), Plain()):
        patching.apply(nn.Sequential(layer), ratio=0.3, schedule="constant")
        torch.manual_seed(1)
        outs.append(layer(x))
    torch.testing.assert_close(outs[0], outs[1] * x.softmax(-2))


def test_every_class_listed_for_its_softmax_is_one_of_timm_or_torchvision():
    """A name that nobody has any more is a misspelling, or a class that was renamed and is now missed."""
    found = set()
    for root in (Path(timm.__file__).parent, Path(__import__("torchvision").__file__).parent):
        for file in root.rglob("*.py"):
            text = file.read_text()
            found |= {name for name in SOFTMAX_CLASSES if f"class {name.rsplit('.')[-1]}(" in text}
    assert found == SOFTMAX_CLASSES


def test_the_lowest_number_in_a_mask_forbids_as_minus_infinity_does():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    layer, x = Masked(), torch.randn(2, 2, 9, 8)
    patching.apply(nn.Sequential(layer), ratio=0.8, schedule="constant")
    lowest = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    outs = []
    for mask in (lowest, lowest.masked_fill(lowest < 0, -torch.inf)):
        torch.manual_seed(1)
        outs.append(layer(x, mask))
    assert torch.equal(*outs) and (outs[0] == 0).all(-1).any()
