"""What analysis sees is what the model computes; records and pictures come out of real runs."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import runs
import tiny_models
from dropkey import patching
from dropkey.analysis import entropy as entropies
from dropkey.analysis import trained
from dropkey.analysis.capture import attention_weights
from dropkey.analysis.entropy import measure_entropy, row_entropy
from dropkey.analysis.maps import attention_maps, rollout
from dropkey.commands import visualize
from dropkey.errors import ConfigError


def vit(fused=True, **changes):
    model = tiny_models.vit(**changes).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def swin():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes).eval()


def inputs_of(model, modules, images):
    """What each module was given."""
    given = {}
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: given.__setitem__(m, args[0]))
    with torch.no_grad():
        model(images)
    return [given[module] for module in modules]


def by_hand(x, qkv, heads, scale=None):
    """softmax(scale q k^T) in float64 from the tokens and the projection: B H Q K."""
    q, k, _ = (x.double() @ qkv.weight.double().T + (0 if qkv.bias is None else qkv.bias.double())).chunk(3, dim=-1)
    q, k = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
    return (q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)).softmax(-1)


def equal(seen, wanted):
    assert seen.shape == wanted.shape
    torch.testing.assert_close(seen.double(), wanted, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- attention weights


@pytest.mark.parametrize("fused", [True, False])
def test_weights_of_a_vit_are_the_softmax_of_its_queries_and_keys(fused):
    model, images = vit(fused), torch.randn(2, 3, 32, 32)
    seen = attention_weights(model, images)
    tokens = inputs_of(model, [block.attn for block in model.blocks], images)
    assert [layer.name for layer in seen] == [f"blocks.{i}.attn" for i in range(3)]
    for layer, x, block in zip(seen, tokens, model.blocks, strict=True):
        equal(layer.weights, by_hand(x, block.attn.qkv, 2))


def test_weights_of_t2t_include_the_token_transformer_with_its_own_scale():
    model = tiny_models.t2t_small().eval()
    images = tiny_models.images_for(model)
    seen = attention_weights(model, images)
    module = model.tokens_to_token.attention1.attn
    (x,) = inputs_of(model, [module], images)
    equal(seen[0].weights, by_hand(x, module.qkv, 1, scale=x.shape[-1] ** -0.5))
    assert [layer.kind for layer in seen] == ["token", "self", "self", "self"]


def test_weights_of_volo_are_those_of_its_self_and_class_attention():
    model = tiny_models.volo().eval()
    images = tiny_models.images_for(model)
    seen = {layer.name: layer for layer in attention_weights(model, images)}
    own = {name: module for name, module in model.named_modules() if name in seen}
    tokens = dict(zip(own, inputs_of(model, list(own.values()), images), strict=True))
    kinds = [layer.kind for layer in seen.values()]
    assert kinds == ["outlook", "self", "self", "self", "class", "class"]
    for name, module in own.items():
        if seen[name].kind == "self":
            equal(seen[name].weights, by_hand(tokens[name].flatten(1, 2), module.qkv, 2))
        elif seen[name].kind == "class":
            q = module.q(tokens[name][:, :1]).unflatten(-1, (2, -1)).transpose(1, 2)
            k = module.kv(tokens[name]).chunk(2, -1)[0].unflatten(-1, (2, -1)).transpose(1, 2)
            equal(seen[name].weights, (q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).double().softmax(-1).detach())


def test_outlook_attention_is_the_softmax_of_what_each_neighbourhood_predicts():
    model = tiny_models.volo().eval()
    images = tiny_models.images_for(model)
    layer = attention_weights(model, images)[0]
    (x,) = inputs_of(model, [layer.module], images)
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2)  # B N C
    logits = layer.module.attn(pooled).unflatten(-1, (2, 9, 9)).transpose(1, 2) * layer.module.scale
    assert layer.windows == 16
    equal(layer.weights, logits.double().softmax(-1).flatten(2, 3).detach())


class Encoder(nn.Module):
    """As users write them: images to 16 tokens, torch's own layers, mean, classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.layers(self.embed(images).flatten(2).transpose(1, 2)).mean(1))


def test_weights_of_multihead_attention_are_those_it_returns_itself():
    model, images = Encoder().eval(), torch.randn(2, 3, 32, 32)
    seen = attention_weights(model, images)
    x = model.embed(images).flatten(2).transpose(1, 2)
    _, wanted = model.layers.layers[0].self_attn(x, x, x, average_attn_weights=False)
    equal(seen[0].weights, wanted.double().detach())
    assert len(seen) == 2


def test_windows_come_one_after_the_other_as_queries_of_their_image():
    model, images = swin(), torch.randn(3, 3, 32, 32)
    one_by_one = [attention_weights(model, image[None]) for image in images]
    for i, layer in enumerate(attention_weights(model, images)):
        assert layer.weights.shape[0] == 3 and layer.weights.shape[-1] == 16
        torch.testing.assert_close(layer.weights, torch.cat([seen[i].weights for seen in one_by_one]))
    assert [layer.windows for layer in attention_weights(model, images)] == [16, 4, 4]


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "swin", "encoder"])
def test_rows_sum_to_one_and_the_model_is_left_as_it_was(family):
    model = {"swin": swin, "encoder": Encoder}.get(family, tiny_models.FAMILIES.get(family))()
    images = torch.randn(2, 3, 32, 32) if family in ("swin", "encoder") else tiny_models.images_for(model)
    model.eval()
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        before = model(images)
        model.train().get_submodule("head").eval()  # modes of single modules come back too
        modes = [m.training for m in model.modules()]
        for layer in attention_weights(model, images):
            torch.testing.assert_close(layer.weights.sum(-1), torch.ones(layer.weights.shape[:-1]))
        assert modes == [m.training for m in model.modules()]
        assert torch.equal(model.eval()(images), before)
    assert [type(m) for m in model.modules()] == classes
    assert runs.unequal(dict(model.state_dict()), state) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("family", ["vit", "volo", "t2t_t"])
def test_a_regularized_model_shows_the_same_weights_as_the_plain_one(family):
    model = tiny_models.FAMILIES[family]()
    images = tiny_models.images_for(model)
    plain = attention_weights(model, images)
    patching.apply(model, "dropkey", 0.5, "constant", layers=("self", "class", "outlook", "token"))
    model.train()
    for a, b in zip(plain, attention_weights(model, images), strict=True):
        assert a.name == b.name and torch.equal(a.weights, b.weights)


def test_a_failing_forward_leaves_no_hook_and_no_mode_behind():
    model = vit()
    with pytest.raises(AssertionError):
        attention_weights(model, torch.randn(2, 3, 40, 40))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_model_without_attention_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="knows no module of it as attention"):
        attention_weights(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 3, 2, 2))


# ---------------------------------------------------------------------------------------------------------- entropy


def test_entropy_of_uniform_attention_is_log_k_and_of_a_choice_zero():
    assert row_entropy(torch.full((2, 1, 3, 65), 1 / 65)).allclose(torch.tensor(math.log(65), dtype=torch.float64))
    assert (row_entropy(F.one_hot(torch.arange(5), 5).float()) == 0).all()


def test_measured_entropy_is_the_mean_over_images_and_queries_for_each_head():
    model, images = vit(), torch.randn(5, 3, 32, 32)
    rows = measure_entropy(model, images.split(2))
    for row, layer in zip(rows, attention_weights(model, images), strict=True):
        wanted = -(layer.weights.double() * layer.weights.double().log()).sum(-1).mean((0, 2))
        assert row["nats"] == pytest.approx(wanted.tolist(), rel=1e-5)
        assert row["normalised"] == pytest.approx((wanted / math.log(17)).tolist(), rel=1e-5)
        assert row["keys"] == 17


def test_a_model_that_cannot_tell_keys_apart_has_normalised_entropy_one():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    rows = measure_entropy(model, [torch.randn(2, 3, 32, 32)])
    assert all(value == pytest.approx(1, abs=1e-6) for row in rows for value in row["normalised"])


# ------------------------------------------------------------------------------------------------------------- maps


def test_rollout_of_identity_attention_is_the_identity():
    eye = torch.eye(6).expand(2, 3, 6, 6)
    assert torch.equal(rollout([eye] * 4), torch.eye(6).expand(2, 6, 6))


def test_rollout_is_the_product_that_abnar_and_zuidema_define():
    layers = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(3)]
    wanted = torch.eye(5)
    for weights in layers:
        mixed = weights.mean(1) + torch.eye(5)
        wanted = mixed / mixed.sum(-1, keepdim=True) @ wanted
    torch.testing.assert_close(rollout(layers), wanted)
    torch.testing.assert_close(rollout(layers).sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(rollout(layers, torch.full((2, 1, 5), 0.2)), wanted.mean(1, keepdim=True))


def test_rollout_takes_class_attention_as_layers_that_move_the_class_token_alone():
    patches, own = torch.rand(2, 3, 4, 4).softmax(-1), torch.rand(2, 3, 1, 5).softmax(-1)
    rows = rollout([patches, own])
    mixed = (patches.mean(1) + torch.eye(4)) / 2
    torch.testing.assert_close(rows[:, 1:, 1:], mixed)
    own = (own.mean(1) + F.one_hot(torch.tensor([[0]]), 5)) / 2
    torch.testing.assert_close(rows[:, :1, 1:], own[..., 1:] @ mixed)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize(
    "family, grid, said",
    [
        ("vit", (4, 4), "all 3 attention layers; class token"),
        ("volo", (4, 4), "the last 5 of 6 attention layers (those with the same tokens); class token"),
        ("t2t_small", (8, 8), "the last 3 of 4 attention layers (those with the same tokens); class token"),
    ],
)
def test_maps_cover_the_image_and_their_caption_describes_them(family, grid, said):
    model = tiny_models.FAMILIES[family]()
    found = attention_maps(model, tiny_models.images_for(model))
    assert found.values.shape == (2, 1, *grid) and said in found.caption
    torch.testing.assert_close(found.values.sum((-1, -2)), torch.ones(2, 1))


def test_maps_of_heads_are_the_class_tokens_rows():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    rows = attention_weights(model, images)[1].weights[:, :, 0, 1:]
    rows = (rows / rows.sum(-1, keepdim=True)).unflatten(-1, (4, 4))
    torch.testing.assert_close(attention_maps(model, images, "all", 1).values, rows)
    torch.testing.assert_close(attention_maps(model, images, "1", -2).values, rows[:, 1:])


def test_a_model_without_class_token_is_read_as_the_mean_over_queries():
    model, images = Encoder(), torch.randn(2, 3, 32, 32)
    found = attention_maps(model, images, "all")
    assert "mean over queries" in found.caption
    torch.testing.assert_close(found.values.flatten(2), attention_weights(model, images)[-1].weights.mean(-2))


@pytest.mark.parametrize(
    "head, layer, said",
    [
        ("rollout", -1, "attends in 4 windows of 16 tokens, not over the image; there is no rollout"),
        ("all", 0, "attends in 16 windows of 16 tokens"),
        ("all", 7, "layer=7: SwinTransformer has 3 attention layers"),
    ],
)
def test_maps_that_do_not_exist_are_refused_in_a_line(head, layer, said):
    with pytest.raises(ConfigError, match=said):
        attention_maps(swin(), torch.randn(2, 3, 32, 32), head, layer)


# --------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tiny runs that differ in the regularizer."""
    place = tmp_path_factory.mktemp("runs")
    return [str(runs.train(place, f"regularizer={kind}", *runs.ONE_EPOCH).path) for kind in ("none", "dropkey")]


def said(capsys, *words) -> list[str]:
    visualize.main(list(words))
    return capsys.readouterr().out.splitlines()


def refused(*words) -> str:
    with pytest.raises(ConfigError) as error:
        visualize.main(list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


def is_png(path) -> bool:
    return Path(path).read_bytes()[:4] == b"\x89PNG"


def test_entropy_is_recorded_drawn_and_not_computed_again(two, capsys, tmp_path, monkeypatch):
    picture = tmp_path / "entropy.png"
    lines = said(capsys, "entropy", f"run={','.join(two)}", f"output={picture}")
    assert is_png(picture) and lines[-1] == f"picture {picture}"
    records = [json.loads((Path(run) / "entropy.json").read_text()) for run in two]
    assert [line.split()[-1] for line in lines[1:3]] == [f"{record['mean']:.4f}" for record in records]
    assert all(len(record["layers"]) == 2 and record["epoch"] == 1 for record in records)
    monkeypatch.setattr(entropies, "open_run", lambda *_: pytest.fail("computed again"))
    assert said(capsys, "entropy", f"run={','.join(two)}", f"output={picture}") == lines


def test_the_record_is_the_same_to_the_byte_when_made_again(two):
    file = Path(two[1]) / "entropy.json"
    entropies.record_entropy(two[1])
    first = file.read_bytes()
    file.unlink()
    assert entropies.record_entropy(two[1])[1] is False
    assert file.read_bytes() == first


def test_a_record_of_other_code_or_of_an_unfinished_run_is_made_again(two, monkeypatch):
    entropies.record_entropy(two[1])
    assert entropies.record_entropy(two[1])[1] is True
    monkeypatch.setattr(entropies, "code_of", lambda cfg: {"engine": "another"})
    assert entropies.record_entropy(two[1])[1] is False
    monkeypatch.setattr(entropies.RunDirectory, "finished", False)
    assert entropies.record_entropy(two[1])[1] is False


def test_maps_of_one_run_lie_in_it(two, capsys):
    said(capsys, "maps", f"run={two[0]}", "images=0,3", "head=all")
    assert is_png(Path(two[0]) / "maps.png")


def test_maps_of_several_runs_are_side_by_side_in_pictures(two, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said(capsys, "maps", f"run={Path(two[0]).parent}/*", "images=1")
    assert is_png("pictures/maps.png")


@pytest.mark.parametrize("words", [["masks", "ratio=0.2", "grid=7"], ["schedules", "layers=1"], ["schedules"]])
def test_pictures_without_runs(capsys, tmp_path, words):
    picture = tmp_path / "here" / "picture.svg"
    said(capsys, *words, f"output={picture}")
    first = picture.read_text()
    assert "</svg>" in first


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "an action is missing; choices: maps, entropy"),
        (["entrpy"], "choices: maps, entropy"),
        (["maps"], "maps takes run="),
        (["maps", "runs=x"], "did you mean run?"),
        (["maps", "run=nowhere"], "run=nowhere means no run"),
        (["maps", "run=nowhere/*"], "run=nowhere/* matches no run"),
        (["maps", "run=RUN", "images=a"], "images=a: "),
        (["maps", "run=RUN", "images=99"], "the test split has"),
        (["maps", "run=RUN", "head=5"], "head=5: the layer has 2 heads, 0 to 1"),
        (["maps", "run=RUN", "head=most"], "head=most: choose rollout"),
        (["maps", "run=RUN", "layer=9", "head=all"], "layer=9"),
        (["masks", "ratio=1.5"], "ratio=1.5 must be"),
        (["masks", "output=picture.bmp"], "ends in .png"),
        (["schedules", "layers=none"], "layers=none: "),
    ],
)
def test_bad_input_is_refused_in_one_line(two, words, message):
    assert message in refused(*[word.replace("RUN", two[0]) for word in words])


def test_legends_name_what_differs(tmp_path):
    configs = [
        runs.config(tmp_path, "regularizer=none"),
        runs.config(tmp_path, "regularizer.ratio=0.3", "schedule=constant"),
        runs.config(tmp_path, "regularizer.ratio=0.3", "schedule=constant", "seed=1", "trainer.epochs=5"),
    ]
    names = trained.labels(configs, seeds=False)
    assert names[0] == "no regularizer, epochs 3" and names[2] == "dropkey 0.3 constant, epochs 5"
    assert trained.labels(configs[:2], seeds=True) == ["no regularizer", "dropkey 0.3 constant"]


def test_images_are_spread_over_the_split_so_that_every_class_is_seen(two):
    opened = trained.open_run(two[0])
    size = len(opened.dataset.test)
    assert opened.spread(10**6).tolist() == list(range(size))
    some = opened.spread(4).tolist()
    assert len(set(some)) == 4 and some[0] == 0 and some[-1] >= size * 3 // 4 - 1
