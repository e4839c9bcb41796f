"""Learning rates by part of the model and by layer, and ratios that follow the training."""

import pytest
import timm
import torch

import dropkey
import dropkey.models  # registers T2T-ViT
import runs
from dropkey import build
from dropkey.config import identity
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.config.schema import OptimConfig
from dropkey.engine.optim import base_lr, build_optimizer, build_schedule
from dropkey.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2)


def scales(model, **optim) -> dict[str, float]:
    """Parameter name -> its learning rate over optim.lr, in the middle of the schedule."""
    config = OptimConfig(lr=0.5, min_lr=0.0, warmup_epochs=0, **optim)
    optimizer = build_optimizer(model, config)
    build_schedule(optimizer, config, steps=10, per_epoch=5).step_update(5)
    lr = {p: group["lr"] / base_lr(optimizer) for group in optimizer.param_groups for p in group["params"]}
    assert base_lr(optimizer) == pytest.approx(0.25)  # half a cosine of 0.5
    return {name: lr[p] for name, p in model.named_parameters() if p.requires_grad}


def test_a_part_of_the_model_has_its_factor_and_the_rest_one(model):
    found = scales(model, lr_scale={"head": 10, "patch_embed": 0.0})
    assert {name: value for name, value in found.items() if value != pytest.approx(1.0)} == {
        "patch_embed.proj.weight": 0.0,
        "patch_embed.proj.bias": 0.0,
        "head.weight": pytest.approx(10.0),
        "head.bias": pytest.approx(10.0),
    }


def test_the_longest_name_counts(model):
    found = scales(model, lr_scale={"blocks": {"0": 0.1}, "blocks.0.mlp": 0.5})
    assert found["blocks.0.attn.qkv.weight"] == pytest.approx(0.1)
    assert found["blocks.0.mlp.fc1.weight"] == pytest.approx(0.5)
    assert found["blocks.1.mlp.fc1.weight"] == pytest.approx(1.0)


def test_each_layer_learns_slower_than_the_next(model):
    found = scales(model, layer_decay=0.5)
    blocks = [found[f"blocks.{number}.attn.qkv.weight"] for number in range(3)]
    assert blocks == pytest.approx([blocks[2] / 4, blocks[2] / 2, blocks[2]])
    assert found["head.weight"] == pytest.approx(1.0) and found["patch_embed.proj.weight"] < blocks[0]


def test_layer_decay_and_factors_multiply(model):
    decayed, both = scales(model, layer_decay=0.5), scales(model, layer_decay=0.5, lr_scale={"blocks": 3})
    assert both["blocks.0.mlp.fc1.weight"] == pytest.approx(3 * decayed["blocks.0.mlp.fc1.weight"])
    assert both["pos_embed"] == pytest.approx(decayed["pos_embed"])


def test_what_has_no_weight_decay_has_none_in_any_part(model):
    optimizer = build_optimizer(model, OptimConfig(lr_scale={"head": 2, "blocks": 0.5}))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    plain = build_optimizer(model, OptimConfig())
    assert decay == {p: group["weight_decay"] for group in plain.param_groups for p in group["params"]}


def test_the_cool_down_is_the_end_of_the_epochs_at_the_lowest_rate(model):
    config = OptimConfig(lr=0.5, min_lr=0.1, warmup_epochs=1, cooldown_epochs=2, warmup_lr=0.0)
    optimizer = build_optimizer(model, config)
    schedule, rates = build_schedule(optimizer, config, steps=50, per_epoch=5), []
    for step in range(50):
        schedule.step_update(step)
        rates.append(base_lr(optimizer))
    assert rates[40:] == pytest.approx([0.1] * 10) and min(rates[5:40]) > 0.1 and rates[5] == pytest.approx(0.5)


def test_t2t_has_layers_to_decay_over():
    model = timm.create_model("t2t_vit_7", img_size=64)
    found = scales(model, layer_decay=0.5)
    assert found["blocks.0.mlp.fc1.weight"] < found["blocks.6.mlp.fc1.weight"] < found["head.weight"]


def test_a_part_that_the_model_does_not_have_is_refused_with_the_nearest(model):
    with pytest.raises(ConfigError, match=r"optim.lr_scale.heads is no part of the model; did you mean head\?"):
        build_optimizer(model, OptimConfig(lr_scale={"heads": 1}))


@pytest.mark.parametrize("value", ["-1", "fast", "true", "null", ".nan"])
def test_a_factor_is_a_number_from_zero(value):
    with pytest.raises(ConfigError, match=r"optim\.lr_scale\.head="):
        check(compose([f"optim.lr_scale.head={value}"]))


def test_a_frozen_part_keeps_its_weights_and_the_rest_learns(tmp_path):
    run = runs.train(tmp_path, "optim.lr_scale={patch_embed: 0, head: 2}")
    start = runs.train(tmp_path, "trainer.max_steps=1", "optim.lr=1e-30", "optim.min_lr=0", "optim.warmup_lr=0")
    trained, first = (runs.state(one)["model"] for one in (run, start))
    same = {name for name in trained if torch.equal(trained[name], first[name])}
    assert same == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


# ------------------------------------------------------------------------------------------- ratio over training


def ratios(*overrides: str) -> list[set[float]]:
    """The layers' ratios at each of five steps."""
    cfg = check(compose(["schedule.over=training", "regularizer.ratio=0.4", *overrides]))
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    build.regularize(model, cfg)
    prepare, found = build.microbatch_hook(cfg, model, 5), []
    for step in range(5):
        prepare(step, 3)
        found.append({round(layer.ratio, 6) for layer in dropkey.report(model).layers})
    return found


def test_the_ratio_follows_the_steps_and_is_the_same_in_all_layers():
    assert ratios("schedule=decreasing") == [{0.4}, {0.3}, {0.2}, {0.1}, {0.0}]
    assert ratios("schedule=increasing", "schedule.end=0.2") == [{0.2}, {0.25}, {0.3}, {0.35}, {0.4}]
    assert ratios("schedule=constant") == [{0.4}] * 5


def test_a_constant_ratio_is_one_run_whatever_it_would_follow():
    from dropkey.config.identity import run_hash

    one, other = (check(compose(["schedule=constant", f"schedule.over={over}"])) for over in ("depth", "training"))
    assert run_hash(one) == run_hash(other)


def test_an_interrupted_run_goes_on_with_the_ratio_of_its_step(tmp_path, monkeypatch):
    words = ("schedule.over=training", "regularizer.ratio=0.5", "optim.layer_decay=0.8", "optim.lr_scale.head=3")
    whole = runs.train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path / "parts", *words)
    parts = runs.train(tmp_path / "parts", *words)
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None


def test_passes_after_training_keep_the_ratio_of_its_end():
    def last(*words: str) -> float:
        return build.last_ratio(check(compose(list(words))))

    assert last("schedule=increasing", "schedule.over=training") == 0.1
    assert last("schedule=decreasing", "schedule.over=training", "schedule.end=.05") == 0.05
    assert last("schedule=decreasing") == 0.1


# ------------------------------------------------------------------------------------------------- steps and decay


def rates(optim: OptimConfig, steps: int = 50) -> list[float]:
    """Of each step, 5 to an epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], optim.lr)
    schedule, found = build_schedule(optimizer, optim, steps, per_epoch=5), []
    for step in range(steps):
        schedule.step_update(step)
        found.append(base_lr(optimizer))
    return found


STEP = {"lr": 0.5, "sched": "step", "warmup_epochs": 0, "decay_epochs": 4}


def test_the_step_schedule_is_that_of_torch():
    """torch's StepLR goes by epochs: two falls in ten epochs of a fall every four."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule, expected = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1), []
    for _ in range(10):
        expected += [optimizer.param_groups[0]["lr"]] * 5
        optimizer.step()
        schedule.step()
    assert rates(OptimConfig(**STEP)) == pytest.approx(expected)


def test_a_warm_up_does_not_move_the_fall():
    found = rates(OptimConfig(**{**STEP, "warmup_epochs": 1, "warmup_lr": 0.0, "decay_epochs": 6, "decay_rate": 0.5}))
    assert found[:6] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert found[29:31] == pytest.approx([0.5, 0.25])


def test_weight_decay_may_act_on_everything(model):
    for scale in ({}, {"head": 0.1}):
        optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4, filter_bias_and_bn=False, lr_scale=scale))
        assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_what_a_schedule_does_not_use_is_no_part_of_a_run():
    def hashed(*words):
        return identity.run_hash(check(compose(list(words))))

    assert hashed() == hashed("optim.decay_epochs=3", "optim.decay_rate=0.5")
    step = ("optim.sched=step", "optim.decay_epochs=20")
    assert len({hashed(), hashed(*step), hashed(*step, "optim.decay_rate=0.2")}) == 3


@pytest.mark.parametrize(
    "words, message",
    {
        "optim.sched=step": "after how many epochs",
        "optim.sched=step optim.decay_epochs=40": "must be above optim.warmup_epochs=1 and below trainer.epochs=40",
        "optim.sched=step optim.decay_epochs=1": "must be above optim.warmup_epochs=1",
        "optim.sched=step optim.decay_epochs=9 optim.cooldown_epochs=1": "set it to 0",
        "optim.sched=steps": "did you mean step",
    }.items(),
)
def test_a_step_schedule_that_cannot_work_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        check(compose(words.split()))
