"""configs/experiment/imagenet_* have the published values; what is ours is named in them."""

from types import SimpleNamespace

import pytest
import timm

import runs
from dropkey import tasks
from dropkey.config.check import check
from dropkey.config.compose import CONFIGS, compose
from dropkey.engine.optim import build_optimizer, build_schedule
from dropkey.models import create_model

# Read in the official repositories: T2T-ViT main.py and README (yitu-opensource/T2T-ViT), VOLO main.py and README
# (sail-sg/volo), DeiT main.py and README_deit (facebookresearch/deit), CeiT main.py and README (coeusguo/ceit).
COMMON = {
    **{"data.image_size": 224, "data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225]},
    **{"optim.name": "adamw", "optim.warmup_lr": 1e-6, "optim.min_lr": 1e-5, "optim.clip_grad_norm": None},
    **{"augment.hflip": 0.5, "augment.crop_scale": [0.08, 1.0], "augment.rand_augment": "rand-m9-mstd0.5-inc1"},
    **{"augment.random_erasing": 0.25, "augment.label_smoothing": 0.1, "augment.mixup": 0.8, "augment.cutmix": 1.0},
    **{"augment.mixup_prob": 1.0, "model.drop_path": 0.1, "trainer.ema_decay": None},
}
T2T = {
    **{"optim.lr": 5e-4, "trainer.batch_size": 512, "trainer.epochs": 310, "optim.cooldown_epochs": 10},
    **{"optim.warmup_epochs": 10, "trainer.ema_decay": 0.99996, "trainer.ema_warmup": False, "data.crop_pct": 0.9},
    **{"augment.interpolation": "random", "augment.erase_mixed": True, "augment.aug_repeats": 1},
}
VOLO = {
    **{"trainer.batch_size": 1024, "trainer.epochs": 310, "optim.cooldown_epochs": 10, "optim.warmup_epochs": 20},
    **{"optim.weight_decay": 0.05, "augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.erase_mixed": False},
    **{"augment.interpolation": "random", "augment.aug_repeats": 1, "data.crop_pct": 0.96},
    **{"model.args": {"use_aux_head": True, "use_mix_token": True}},
}
DEIT = {
    **{"optim.lr": 5e-4 * 1024 / 512, "trainer.batch_size": 1024, "trainer.epochs": 300, "optim.cooldown_epochs": 0},
    **{"optim.warmup_epochs": 5, "optim.weight_decay": 0.05, "data.crop_pct": 0.875, "augment.aug_repeats": 3},
    **{"augment.interpolation": "bicubic", "augment.erase_mixed": False},
}
PUBLISHED = {
    "imagenet_t2t_vit_14": {**T2T, "optim.weight_decay": 0.05},
    "imagenet_t2t_vit_19": {**T2T, "optim.weight_decay": 0.065},
    "imagenet_volo_d1": {**VOLO, "optim.lr": 1.6e-3},
    "imagenet_volo_d2": {**VOLO, "optim.lr": 1e-3, "model.drop_path": 0.2},
    "imagenet_deit_base": DEIT,
    "imagenet_ceit_small": DEIT,
}
# facebookresearch/detr: main.py, datasets/coco.py and README
DETR = {
    **{"model.name": "detr_r50", "data.name": "coco", "data.num_classes": 91, "data.mean": [0.485, 0.456, 0.406]},
    **{"optim.name": "adamw", "optim.lr": 1e-4, "optim.lr_scale": {"backbone": 0.1}, "optim.weight_decay": 1e-4},
    **{"optim.filter_bias_and_bn": False, "optim.clip_grad_norm": 0.1, "optim.warmup_epochs": 0, "optim.args": {}},
    **{"optim.sched": "step", "optim.decay_epochs": 200, "optim.decay_rate": 0.1, "trainer.epochs": 300},
    **{"trainer.batch_size": 2 * 8, "trainer.eval_batch_size": 2 * 8, "augment.hflip": 0.5, "trainer.ema_decay": None},
    "task.args": {
        "scales": list(range(480, 801, 32)),
        "max_size": 1333,
        "crop_scales": [400, 500, 600],
        "crop_sides": [384, 600],
        "eval_scale": 800,
    },
}
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def value(cfg, key: str):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("imagenet_")])
def test_a_recipe_of_imagenet_has_the_published_values(name):
    cfg = check(compose([f"experiment={name}"]))
    assert {key: value(cfg, key) for key in COMMON | PUBLISHED[name]} == COMMON | PUBLISHED[name]


def test_the_recipe_of_detr_has_the_published_values():
    cfg = check(compose(["experiment=coco_detr_r50"]))
    assert {key: value(cfg, key) for key in DETR} == DETR


@pytest.mark.parametrize("name", ["imagenet_volo_d1", "imagenet_volo_d2"])
def test_the_recipe_of_volo_takes_token_labels_and_says_what_training_without_costs(name):
    with_labels = check(compose([f"experiment={name}", "data.token_labels=maps"]))
    data = SimpleNamespace(train=range(9), val=None, test=range(3), num_classes=2, image_size=224)
    assert "labels of tokens from maps" in tasks.build(with_labels).describe_data(data)
    without = tasks.build(check(compose([f"experiment={name}"]))).describe_data(data)
    assert without.count("\n") == 1 and "83.8 % instead of the published 84.2 %" in without


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_says_what_is_published_and_what_is_ours(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert "# Published: " in text and "# Ours: " in text


def transfer(model):
    cfg = check(compose(["experiment=cifar10_transfer"]))
    optimizer = build_optimizer(model, cfg.optim)
    schedule = build_schedule(optimizer, cfg.optim, steps=100, per_epoch=10)
    rates = []
    for step in (0, 99):
        schedule.step_update(step)
        rates.append({p: g["lr"] for g in optimizer.param_groups for p in g["params"]})
    return rates


def test_the_transfer_trains_the_head_with_a_hundred_times_the_rate_of_the_rest():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    first, last = transfer(model)
    assert first[model.head.weight] == pytest.approx(0.05) and first[model.blocks[0].norm1.bias] == pytest.approx(5e-4)
    assert last[model.head.weight] == pytest.approx(2e-4, rel=0.1)


@pytest.mark.parametrize("name", ["deit_tiny", "volo_d1", "ceit_tiny", "t2t_vit_7"])
def test_the_transfer_fits_each_family(name):
    cfg = check(compose(["experiment=cifar10_transfer", f"model={name}"]))
    model = create_model(cfg.model, image_size=224, channels=3, num_classes=10)
    optimizer = build_optimizer(model, cfg.optim)
    assert max(g["lr"] * g["lr_scale"] for g in optimizer.param_groups) == pytest.approx(0.05)


def test_the_transfer_of_t2t_freezes_what_the_published_one_leaves_out():
    cfg = check(compose(["experiment=cifar10_transfer_t2t_vit_19"]))
    assert cfg.optim.lr_scale == {"head": 100, "cls_token": 0, "norm": 0}


def test_a_transfer_runs_from_a_run_of_another_size_and_other_classes(tmp_path):
    small = ("trainer.max_steps=2", "trainer.device=cpu", "trainer.compile=false", "data.max_train_samples=64")
    start = runs.train(tmp_path)
    words = ("data.image_size=16", "augment.crop_padding=2", "data.mean=null", "data.std=null", "trainer.eval_every=1")
    run = runs.train(tmp_path, "experiment=cifar10_transfer", "data=digits", *words, *small, f"init_from={start.path}")
    assert run.finished
