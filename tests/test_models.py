"""Every model of configs/model is built and patched; every family trains a step with every regularizer."""

from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F

from covering import pairwise
from dropkey import patching, weights
from dropkey.build import regularize
from dropkey.config.check import check
from dropkey.config.compose import CONFIGS, compose
from dropkey.config.geometry import default_patch
from dropkey.config.schema import ModelConfig
from dropkey.errors import ConfigError
from dropkey.models import create_model
from dropkey.regularizers import STRUCTURED
from tiny_models import EVERY_LAYER, FAMILIES, FAMILY_AND_REGULARIZER, REGULARIZERS_AND_NONE, images_for, window_of

MODELS = sorted(
    path.stem for path in (CONFIGS / "model").glob("*.yaml") if not path.stem.startswith(("detr", "qpic", "metro"))
)  # of these: test_detr.py, test_interaction.py, test_metro.py
REGULARIZERS = sorted(path.stem for path in (CONFIGS / "regularizer").glob("*.yaml"))
DEPTH = {
    "timm": 12,  # attention layers that take the regularizer by default: blocks, and VOLO's class attention
    "deit_base": 12,
    "deit_small": 12,
    "deit_tiny": 12,
    "ceit_base": 12,
    "ceit_small": 12,
    "ceit_tiny": 12,
    "t2t_vit_7": 7,
    "t2t_vit_10": 10,
    "t2t_vit_12": 12,
    "t2t_vit_14": 14,
    "t2t_vit_19": 19,
    "t2t_vit_24": 24,
    "t2t_vit_t_14": 14,
    "t2t_vit_t_19": 19,
    "t2t_vit_t_24": 24,
    "t2t_vit_small_image": 12,
    "vit_4x64": 4,
    "vit_6x64": 6,
    "vit_6x128": 6,
    "vit_7x256": 7,
    "vit_9x192": 9,
    "vit_base": 12,
    "vit_small": 12,
    "vit_tiny": 12,
    # (Yuan et al., 2021, arXiv:2106.13112, table 2: transformer layers of stage 2) + 2 class attentions
    "volo_d1": 14 + 2,
    "volo_d2": 18 + 2,
    "volo_d3": 28 + 2,
    "volo_d4": 28 + 2,
    "volo_d5": 36 + 2,
}


def composed(*overrides):
    return check(compose(list(overrides)))


def built(cfg):
    data = cfg.data
    return create_model(cfg.model, image_size=data.image_size, channels=data.channels, num_classes=data.num_classes)


# ---- configs


@pytest.mark.parametrize("name", MODELS)
def test_every_model_config_is_built_and_patched_at_imagenet_size(name):
    cfg = composed(f"model={name}", "data=imagenet", "regularizer=dropkey", "schedule=decreasing")
    with torch.device("meta"):
        model = built(cfg)
    report = regularize(model, cfg)
    assert len(report.layers) == DEPTH[name]
    assert (report.layers[0].ratio, report.layers[-1].ratio) == (cfg.regularizer.ratio, 0.0)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer_config_patches_every_family(name):
    cfg = composed(f"regularizer={name}")
    for build in FAMILIES.values():
        report = regularize(build(), cfg)
        assert report.regularizer == cfg.regularizer.name == name
        assert bool(report.layers) == (name != "none")


def test_there_is_a_config_for_every_regularizer():
    assert set(REGULARIZERS) == set(REGULARIZERS_AND_NONE)


# Whole millions as published: DeiT in its table 1 (arXiv:2012.12877, cut off), VOLO in its table 2 (arXiv:2106.13112,
# rounded, auxiliary head included); T2T-ViT is in test_t2t_vit.
@pytest.mark.parametrize(
    ("name", "millions", "whole"),
    [("deit_tiny", 5, int), ("deit_small", 22, int), ("deit_base", 86, int), ("volo_d1", 27, round)],
)
def test_parameter_count_is_the_published_one(name, millions, whole):
    auxiliary = ["model.args.use_aux_head=true"] if name.startswith("volo") else []
    with torch.device("meta"):
        model = built(composed(f"model={name}", "data=imagenet", *auxiliary))
    assert whole(weights.parameter_count(model) / 1e6) == millions


@pytest.mark.parametrize(("name", "millions"), [("vit_4x64", 0.14), ("vit_6x128", 0.8), ("vit_7x256", 3.7)])
def test_small_models_have_the_size_their_config_claims(name, millions):
    with torch.device("meta"):
        model = built(composed(f"model={name}", "data=cifar10"))
    assert weights.parameter_count(model) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(
    ("name", "regularizer"),
    [("vit_tiny_patch16_224", "dropkey"), ("volo_d1_224", "dropkey_block"), ("t2t_vit_7", "dropout")],
)
def test_patching_leaves_the_parameter_count(name, regularizer):
    model = timm_model(name)
    patching.undo(model)
    before = [parameter.requires_grad for parameter in model.parameters()]
    patching.apply(model, regularizer, layers=EVERY_LAYER, window=window_of(regularizer))
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@cache
def timm_model(name):
    with torch.device("meta"):
        return timm.create_model(name)


# ---- patches


@pytest.mark.parametrize(
    ("name", "image_size", "patch"),
    [
        ("vit_tiny_patch16_224", 224, 16),
        ("vit_tiny_patch16_224", 96, 16),
        ("vit_base_patch32_224", 224, 32),
        ("vit_tiny_patch16_224", 64, 8),
        ("vit_tiny_patch16_224", 32, 4),
        ("vit_tiny_patch16_224", 28, 4),
        ("vit_tiny_patch16_224", 8, 2),
        ("deit_tiny_distilled_patch16_224", 32, 4),
        ("volo_d1_224", 224, 8),
        ("volo_d1_224", 32, 4),
    ],
)
def test_default_patch(name, image_size, patch):
    assert default_patch(name, image_size) == patch


@pytest.mark.parametrize("image_size", [8, 28, 32, 48, 64])
def test_small_images_have_at_least_4_x_4_and_at_most_12_x_12_tokens(image_size):
    model = build_vit(image_size)
    assert 4 <= model.patch_embed.grid_size[0] <= 12


def build_vit(image_size):
    cfg = composed("model=vit_4x64", "data=cifar10", f"data.image_size={image_size}")
    with torch.device("meta"):
        return built(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=vit_4x64", "data.image_size=32", "model.patch_size=5"], "not divisible by model.patch_size"),
        (["model=volo_d1", "data.image_size=36"], "not divisible by twice model.patch_size"),
        (["model=volo_d1", "data.image_size=32", "model.patch_size=2"], "VOLO has 4, 8 and 16"),
        (["model=t2t_vit_14", "data.image_size=32"], "take model=t2t_vit_small_image"),
        (["model=t2t_vit_14", "data.image_size=64", "model.patch_size=8"], "has soft splits, no patches"),
    ],
)
def test_sizes_that_cannot_be_cut_into_tokens_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed(*overrides)


def test_a_model_without_attention_is_a_config_error():
    cfg = composed("model.name=resnet18", "data=cifar10", "model.embed_dim=null", "model.depth=null")
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(ConfigError, match="regularizer=dropkey: ResNet has no attention layer"):
        regularize(model, cfg)


def test_arguments_an_architecture_does_not_have_are_a_config_error():
    with pytest.raises(ConfigError, match=r"model\.name=resnet18 with"):
        create_model(ModelConfig("resnet18", embed_dim=64), image_size=32, channels=3, num_classes=10)


@pytest.mark.parametrize("fused", [True, False])
def test_plain_attention_is_fused_on_request_and_the_process_wide_switch_stays(fused):
    before = timm.layers.use_fused_attn()
    with torch.device("meta"):
        model = create_model(ModelConfig(), image_size=32, channels=3, num_classes=10, fused=fused)
    assert {block.attn.fused_attn for block in model.blocks} == {fused}
    assert timm.layers.use_fused_attn() == before


# ---- a training step


@pytest.mark.parametrize(("family", "regularizer"), [*FAMILY_AND_REGULARIZER, ("vit", "none")])
def test_every_family_trains_a_step_with_every_regularizer(family, regularizer):
    model = FAMILIES[family]()
    patching.apply(model, regularizer, 0.3, "constant", layers=EVERY_LAYER, window=window_of(regularizer))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    logits = model(images_for(model, 4))
    loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    assert all(p.isfinite().all() for p in trained.values())
    assert any(not torch.equal(before[name], p) for name, p in trained.items())


@pytest.mark.parametrize(("family", "ratio", "regularizer"), pairwise(FAMILIES, [0.7, 0.95], [*STRUCTURED, "dropkey"]))
def test_high_ratios_train_without_nan(family, ratio, regularizer):
    model = FAMILIES[family]()
    patching.apply(model, regularizer, ratio, "constant", layers=EVERY_LAYER, window=window_of(regularizer))
    model(images_for(model)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
