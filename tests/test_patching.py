"""Patching adds nothing, leaves evaluation alone, reports what it did, and can be taken back, copied and saved."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from dropkey import patching
from dropkey.config import schema
from dropkey.patching.find import KIND_OF_CLASS, find_attention_modules
from dropkey.patching.layer import AttentionRegularizer
from dropkey.patching.patch import regularized_layers
from dropkey.regularizers import REGULARIZERS
from dropkey.schedules import ratios
from tiny_models import (
    EVERY_LAYER,
    FAMILIES,
    FAMILY_AND_REGULARIZER,
    deit,
    images_for,
    t2t,
    t2t_t,
    vit,
    volo,
    window_of,
)

FAMILY = pytest.mark.parametrize("family", FAMILIES)
REGULARIZER = pytest.mark.parametrize("regularizer", REGULARIZERS)
BOTH = pytest.mark.parametrize(("family", "regularizer"), FAMILY_AND_REGULARIZER)


def patch(model, regularizer="dropkey", ratio=0.3, schedule="constant", layers=EVERY_LAYER, **others):
    return patching.apply(model, regularizer, ratio, schedule, layers=layers, window=window_of(regularizer), **others)


def run(model, images, seed=1):
    torch.manual_seed(seed)
    return model(images)


def run_and_gradients(model, images, seed=1):
    model.zero_grad()
    out = run(model, images, seed)
    out.square().sum().backward()
    return [out, *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- what must not change


@BOTH
def test_state_dict_is_unchanged(family, regularizer):
    model = FAMILIES[family]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model, regularizer)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@BOTH
def test_evaluation_is_bitwise_that_of_the_unpatched_model(family, regularizer):
    model = FAMILIES[family]().eval()
    images = images_for(model)
    before = model(images)
    patch(model, regularizer, 0.7)
    assert torch.equal(model(images), before)
    assert torch.equal(model.train().eval()(images), before)


@BOTH
def test_ratio_zero_trains_bitwise_like_the_unpatched_model(family, regularizer):
    model = FAMILIES[family]()
    images = images_for(model)
    before = run_and_gradients(model, images)
    before = [x.clone() for x in before]
    patch(model, regularizer, 0.0)
    assert equal(run_and_gradients(model, images), before)


@REGULARIZER
def test_the_last_layer_of_a_decreasing_schedule_trains_bitwise_like_the_unpatched_one(regularizer):
    model = vit()
    attention, tokens = model.blocks[-1].attn, torch.randn(2, 17, 32)
    before = attention(tokens)
    patch(model, regularizer, 0.3, "decreasing")
    assert torch.equal(attention(tokens), before)


# ---- what must change


@BOTH
def test_every_layer_draws_one_mask_in_training(drawn, family, regularizer):
    model = FAMILIES[family]()
    report = patch(model, regularizer, 0.3)
    model(images_for(model))
    assert drawn.regularizers == [regularizer] * len(report.layers)


@BOTH
def test_training_passes_differ(family, regularizer):
    model = FAMILIES[family]()
    patch(model, regularizer)
    images = images_for(model)
    assert not torch.equal(run(model, images, seed=1), run(model, images, seed=2))


@FAMILY
def test_an_own_attention_dropout_is_replaced(family):
    """Else Dropout would act besides the regularizer."""
    model = FAMILIES[family]()
    for module in model.modules():
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.p = 0.5
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.p = 0.0
    images = images_for(model)
    patch(model, "dropkey", 0.0)
    assert torch.equal(run(model, images), run(plain, images))


# ---- taking it back, doing it twice


@BOTH
def test_undo_restores_classes_dropout_and_training_bitwise(family, regularizer):
    model = FAMILIES[family]()
    for module in model.modules():
        if isinstance(getattr(module, "attn_drop", None), nn.Dropout):
            module.attn_drop.p = 0.2
    images = images_for(model)
    classes, text = [type(module) for module in model.modules()], repr(model)
    before = [x.clone() for x in run_and_gradients(model, images)]
    patch(model, regularizer)
    patching.undo(model)
    assert [type(module) for module in model.modules()] == classes
    assert repr(model) == text
    assert equal(run_and_gradients(model, images), before)


@pytest.mark.parametrize("training", [True, False])
def test_undo_keeps_the_mode(training):
    model = volo()
    patch(model)
    model.train(training)
    patching.undo(model)
    assert {module.training for module in model.modules()} == {training}


def test_undo_of_an_unpatched_model_does_nothing():
    model = vit()
    text = repr(model)
    patching.undo(model)
    assert repr(model) == text


@BOTH
def test_applying_twice_is_applying_once(family, regularizer):
    once = FAMILIES[family]()
    twice = copy.deepcopy(once)
    text, images = repr(once), images_for(once)
    report = patch(once, regularizer)
    patch(twice, "dropout", 0.7, "increasing")
    assert patch(twice, regularizer) == report
    assert repr(twice) == repr(once)
    assert equal(run_and_gradients(twice, images), run_and_gradients(once, images))
    patching.undo(twice)
    assert repr(twice) == text


def test_none_takes_a_regularizer_out():
    model = volo()
    text = repr(model)
    patch(model)
    assert patch(model, "none").layers == []
    assert repr(model) == text


# ---- copies and files


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_in_a_fresh_model(model):
    fresh = {"VisionTransformer": vit, "VOLO": volo, "T2TViT": t2t_t}[type(model).__name__]()
    patch(fresh, "dropkey")
    fresh.load_state_dict(model.state_dict())
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "state_dict": state_in_a_fresh_model,
}


@pytest.mark.parametrize("build", [vit, volo, t2t_t])
@pytest.mark.parametrize("copy_of", COPIES)
def test_copies_keep_masks_in_force(copy_of, build):
    model = build()
    patch(model)
    images = images_for(model)
    twin = COPIES[copy_of](model)
    assert equal(run_and_gradients(twin, images), run_and_gradients(model, images))
    assert not torch.equal(run(twin, images, seed=1), run(twin, images, seed=2))


@pytest.mark.parametrize("copy_of", ["deepcopy", "pickle", "torch.save"])
def test_copies_can_be_changed_and_taken_back_by_themselves(copy_of):
    model = vit()
    text = repr(model)
    patch(model)
    twin = COPIES[copy_of](model)
    patching.set_ratio(twin, 0.0)
    assert all(layer.ratio == 0.3 for _, layer in regularized_layers(model))
    patching.undo(twin)
    assert repr(twin) == text
    assert len(list(regularized_layers(model))) == 3


def test_weights_go_from_unpatched_to_patched_and_back():
    plain, patched = vit(), vit()
    patch(patched)
    assert str(patched.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert str(vit().load_state_dict(patched.state_dict())) == "<All keys matched successfully>"
    images = images_for(plain)
    assert torch.equal(plain.eval()(images), patched.eval()(images))


# ---- layers and ratios


@pytest.mark.parametrize("schedule", schema.SCHEDULES)
@FAMILY
def test_ratios_follow_the_order_in_which_layers_run(family, schedule):
    model, order = FAMILIES[family](), []
    report = patch(model, "dropkey", 0.3, schedule, end=0.05)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "attn_drop", None), AttentionRegularizer):
            module.register_forward_pre_hook(lambda module, inputs, name=name: order.append(name))
    model(images_for(model))
    assert [layer.name for layer in report.layers] == order
    wanted = ratios(schedule, 0.3, 0.05, len(order))
    assert [layer.ratio for layer in report.layers] == wanted
    assert [model.get_submodule(name).attn_drop.ratio for name in order] == wanted


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (vit, ["self"] * 3),
        (deit, ["self"] * 3),
        (volo, ["self"] * 3 + ["class"] * 2),
        (t2t, ["self"] * 3),
        (t2t_t, ["self"] * 3),
    ],
)
def test_by_default_self_and_class_attention_are_taken(build, kinds):
    report = patching.apply(build())
    assert [layer.kind for layer in report.layers] == kinds


@pytest.mark.parametrize(
    ("build", "kinds"), [(volo, ["outlook", *["self"] * 3, *["class"] * 2]), (t2t_t, ["token"] * 2 + ["self"] * 3)]
)
def test_outlook_and_token_attention_are_taken_on_request(build, kinds):
    report = patching.apply(build(), layers=EVERY_LAYER)
    assert [layer.kind for layer in report.layers] == kinds
    assert report.skipped == []


@pytest.mark.parametrize(
    ("build", "layers", "skipped"),
    [
        (volo, ("self", "class"), {"network.0.0.attn": "outlook attention is not among layers="}),
        (volo, ("self", "outlook"), {f"post_network.{i}.attn": "class attention is not among" for i in (0, 1)}),
        (t2t_t, ("self",), {f"tokens_to_token.attention{i}.attn": "token attention is not among" for i in (1, 2)}),
        (t2t, EVERY_LAYER, {f"tokens_to_token.attention{i}": "a performer has no softmax" for i in (1, 2)}),
        (vit, EVERY_LAYER, {}),
    ],
)
def test_what_is_skipped_is_reported_with_the_reason(build, layers, skipped):
    report = patching.apply(build(), layers=layers)
    assert [name for name, _ in report.skipped] == list(skipped)
    for name, reason in report.skipped:
        assert reason.startswith(skipped[name])
        assert name in str(report)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("xcit_nano_12_p16_224", {"depth": 2}, "channels, not keys"),
        ("edgenext_xx_small", {}, "channels, not keys"),
        ("mobilevitv2_050", {}, "one row of weights"),
    ],
)
def test_attention_without_a_distribution_over_keys_is_skipped(name, arguments, reason):
    with torch.device("meta"):
        found = list(find_attention_modules(timm.create_model(name, **arguments)))
    assert any(reason in (each.unsupported_reason or "") for each in found)


def test_the_layers_are_those_of_the_config():
    assert {"self", "cross", *KIND_OF_CLASS.values()} == set(schema.LAYERS)


@FAMILY
def test_the_report_names_every_layer_with_its_ratio(family):
    report = patch(FAMILIES[family](), "dropkey", 0.3, "decreasing")
    lines = str(report).splitlines()
    assert lines[0].startswith(f"dropkey (decreasing) at {len(report.layers)} attention layers")
    for line, layer in zip(lines[1:], report.layers, strict=False):
        assert line.split() == [layer.name, layer.kind, layer.mechanism, "ratio", f"{layer.ratio:.4f}"]


def test_the_printed_model_shows_kind_and_ratio():
    model = vit()
    patch(model, "dropkey_block", 0.25)
    assert repr(model).count("dropkey_block, ratio=0.25, window=3, layer=self") == 3


def test_the_report_shows_a_window_in_cells_as_soon_as_layers_know_their_grids():
    model = volo()
    report = patching.apply(model, "dropkey_cross_column", 0.3, window=0.7, layers=EVERY_LAYER)
    lines = str(report).splitlines()[1:]
    assert [line.partition("window ")[2] for line in lines] == ["0.7 of the grid"] * 5 + [""]  # the last has ratio 0
    model(images_for(model))
    lines = str(report).splitlines()[1:]
    assert lines[0].endswith("outlook  weights  ratio 0.3000  window 0.7 of 3 x 3 = 3 cells")
    assert lines[1].endswith("self     fused    ratio 0.2400  window 0.7 of 4 x 4 = 3 cells")
    assert repr(model).count("window=0.7 of 4 x 4 = 3 cells, layer=self") == 3


@pytest.mark.parametrize("window", [3, "full"])
def test_the_report_shows_a_window_in_cells_at_once(window):
    report = patching.apply(vit(), "dropkey_cross", 0.3, "constant", window=window)
    assert all(line.endswith(f"ratio 0.3000  window {window}") for line in str(report).splitlines()[1:])


def test_a_share_of_a_single_cell_is_refused_by_the_first_training_pass():
    model = vit()
    patching.apply(model, "dropkey_block", 0.3, window=0.3)
    with pytest.raises(ValueError, match=r"window=0\.3 of a grid of 4 x 4 is a single cell, which is plain DropKey"):
        model(images_for(model))


@pytest.mark.parametrize("schedule", schema.SCHEDULES)
def test_set_ratio_gives_what_apply_would_give(schedule):
    model, wanted = volo(), volo()
    patch(model, "dropkey", 0.1)
    patching.set_ratio(model, 0.4, schedule, end=0.02)
    patch(wanted, "dropkey", 0.4, schedule, end=0.02)
    assert repr(model) == repr(wanted)


# ---- Monte Carlo


@BOTH
def test_always_on_acts_in_evaluation_and_ends(family, regularizer):
    model = FAMILIES[family]().eval()
    patch(model, regularizer)
    images = images_for(model)
    plain = run(model, images)
    with patching.always_on(model):
        assert not torch.equal(run(model, images, seed=1), run(model, images, seed=2))
    assert torch.equal(run(model, images), plain)


def test_always_on_ends_after_an_exception_too():
    model = vit().eval()
    patch(model)
    images = images_for(model)
    plain = model(images)
    with pytest.raises(KeyError), patching.always_on(model):
        raise KeyError
    assert torch.equal(model(images), plain)


def test_always_on_leaves_training_as_it_is():
    model = volo()
    patch(model)
    images = images_for(model)
    plain = run(model, images)
    with patching.always_on(model):
        assert torch.equal(run(model, images), plain)


# ---- refusals


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "mlp_mixer_toy"])
def test_a_model_without_attention_is_refused(name):
    model = nn.Sequential(nn.Linear(4, 4)) if name == "mlp_mixer_toy" else timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match="has no attention layer of layers="):
        patching.apply(model)


def test_a_model_without_the_layers_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"VisionTransformer has no attention layer of layers=\['outlook'\]"):
        patching.apply(vit(), layers=("outlook",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regularizer": "dropkeys"}, "no regularizer 'dropkeys'; choose from none, dropout"),
        ({"schedule": "cosine"}, "no schedule 'cosine'"),
        ({"impl": "flash"}, "no impl 'flash'"),
        ({"regularizer": "dropout", "impl": "sdpa"}, "impl=sdpa masks logits"),
        ({"ratio": 1.0}, r"ratios lie in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratios lie in \[0, 1\)"),
        ({"regularizer": "dropkey_block"}, "dropkey_block takes an odd window"),
        ({"regularizer": "dropkey_block", "window": "full"}, "dropkey_block takes an odd window"),
        ({"regularizer": "dropkey_cross", "window": 4}, "dropkey_cross takes an odd window"),
        ({"regularizer": "dropkey_cross_column", "window": 1.5}, "dropkey_cross_column takes an odd window"),
    ],
)
def test_arguments_that_cannot_work_are_refused_and_the_model_stays_as_it_was(arguments, message):
    model = vit()
    text = repr(model)
    with pytest.raises(ValueError, match=message):
        patching.apply(model, **arguments)
    assert repr(model) == text


# ---- ramps of the ratio


@pytest.mark.parametrize(("schedule", "end"), [("constant", 0.0), ("increasing", 0.05), ("decreasing", 0.02)])
def test_another_ratio_keeps_the_schedule(schedule, end):
    model, other = vit(), vit()
    patching.apply(model, "dropkey", 0.1, schedule, end=end)
    patching.set_ratio(model, 0.4)
    report = patching.apply(other, "dropkey", 0.4, schedule, end=end)
    layers = [layer for _, layer in regularized_layers(model)]
    assert [layer.ratio for layer in layers] == [layer.ratio for layer in report.layers]


def test_a_ratio_for_a_model_without_regularizer_is_refused():
    with pytest.raises(ValueError, match=r"no regularized layers; call dropkey.apply"):
        patching.set_ratio(vit(), 0.1)
