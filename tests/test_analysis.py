"""What analysis sees is what the model computes; records and pictures come out of real runs."""

import base64
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from torch import nn

import runs
import tiny_models
from dropkey import patching
from dropkey.analysis import entropy as entropies
from dropkey.analysis import figures, map_figures, trained
from dropkey.analysis import gallery as galleries
from dropkey.analysis.answers import Answer, answers, confusions, worst
from dropkey.analysis.capture import attention_weights
from dropkey.analysis.entropy import measure_entropy, row_entropy
from dropkey.analysis.labels import file_stem, labels
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


def test_maps_of_several_runs_heads_and_layers_do_not_overwrite_one_another(two, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both, names = ",".join(two), []
    for words in (["head=all"], ["head=0"], ["head=0", "layer=0"], ["head=mean"], [], ["images=0,3"]):
        for run in (two[0], both):
            line = said(capsys, "maps", f"run={run}", *words)[-1]
            names.append(Path(line.removeprefix("picture ")))
            assert is_png(names[-1])
    assert len(set(names)) == len(names) == 12
    assert names[0] == Path(two[0]) / "maps-layer1-heads.png"  # of one run: in it
    assert names[1].match("pictures/maps-layer1-heads-*-none+dropkey_0.1-digits-s0-*.png")
    assert names[-1].match("pictures/maps-rollout-images0+3-*.png")


def shown(monkeypatch, draw, *words):
    """The figure that a command saves."""
    found = []
    monkeypatch.setattr(draw, "save", lambda figure, path: found.append(figure))
    visualize.main(list(words))
    return found[0]


def test_each_map_shows_the_predicted_class_and_a_wrong_one_the_true_class_in_red(two, monkeypatch):
    figure = shown(monkeypatch, map_figures, "maps", f"run={two[0]}", "images=0,1,2,3,4,5,6,7")
    opened = trained.open_run(two[0])
    maps = [axis for axis in figure.get_axes() if axis.get_xlabel()]
    known = [opened.dataset.classes[opened.dataset.test.targets[i]] for i in range(8)]
    right = [axis.get_xlabel() == f"✓ {true}" for axis, true in zip(maps, known, strict=True)]
    assert not all(right)  # after one epoch
    for axis, true, good in zip(maps, known, right, strict=True):
        assert good or (axis.get_xlabel().startswith("✗ ") and axis.get_xlabel().endswith(f", is {true}"))
        assert axis.spines["left"].get_visible() is not good
        assert (axis.xaxis.label.get_color() == map_figures.WRONG) is not good


@pytest.mark.parametrize("images", ["0", "0,1,2,3,4,5,6,7"])
def test_every_word_of_a_figure_of_maps_lies_within_it(images, two, monkeypatch):
    figure = shown(monkeypatch, map_figures, "maps", f"run={','.join(two)}", f"images={images}", "head=all")
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        assert not text.get_text() or figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text.get_text()


def test_compare_has_a_row_per_image_a_column_per_run_and_their_entropy(two, monkeypatch):
    figure = shown(monkeypatch, map_figures, "compare", f"run={','.join(reversed(two))}", "images=0,5,9")
    maps, beside = figure.subfigs
    assert len(maps.axes) == 3 * 3
    headings = [axis.title for axis in maps.axes[:3]]
    assert headings[1].get_text().startswith("no regularizer\ntop-1 ")  # the baseline comes first
    assert headings[2].get_text().startswith("dropkey 0.1")
    lines = [line for line in beside.axes[0].lines if line.get_linestyle() == "-"]
    assert [line.get_color() for line in lines] == [heading.get_color() for heading in headings[1:]]
    records = [json.loads((Path(run) / "entropy.json").read_text()) for run in two]
    for line, record in zip(lines, records, strict=True):
        wanted = [sum(layer["normalised"]) / len(layer["normalised"]) for layer in record["layers"]]
        assert list(line.get_ydata()) == pytest.approx(wanted)


def test_answers_are_those_of_the_summary(two):
    opened = trained.open_run(two[1])
    found = answers(opened, opened.spread(10**6))
    assert 100 * sum(one.right for one in found) / len(found) == pytest.approx(opened.run.summary()["top1"], abs=1e-3)
    assert all(one.right == (one.true == one.predicted) and 0.1 <= one.confidence <= 1 for one in found)
    assert [one.position for one in found] == list(range(len(found)))


def test_the_worst_mistakes_are_the_surest_and_confusions_are_counted():
    pairs = [("a", "b", 0.5), ("a", "a", 0.9), ("a", "b", 0.7), ("b", "a", 0.6)]
    found = [Answer(i, true, said, true == said, sure) for i, (true, said, sure) in enumerate(pairs)]
    assert [one.position for one in worst(found, 2)] == [2, 3]
    assert confusions(found, 5) == [("a", "b", 2), ("b", "a", 1)]


def heads_of(layers: int, seed: int) -> dict:
    values = torch.rand(layers, 3, generator=torch.Generator().manual_seed(seed)).tolist()
    return {"layers": [{"kind": "self", "normalised": heads} for heads in values]}


@pytest.mark.parametrize("count", [2, 4, 5, 23])
def test_entropy_of_many_runs_is_legible(count):
    names = [f"dropkey 0.{i} decreasing, t2t_vit_small_image, max_train_samples {i}" for i in range(count)]
    figure = figures.entropy_figure([[heads_of(4, i), heads_of(4, 99)] for i in range(count)], names)
    figure.draw_without_rendering()
    axes = figure.get_axes()
    if count <= 4:
        legend = figure.legends[0].get_window_extent()
        assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
        assert len({line.get_color() for line in axes[0].lines}) == count
    else:
        titles = [" ".join(axis.get_title(loc="left").split()) for axis in axes]
        assert titles == [f"{name}, 2 seeds" for name in names] and not figure.legends


TEXT = (Path(__file__).parents[1] / "docs" / "pictures.md").read_text()
LINES = re.findall(r"^python scripts/visualize.py .*$", TEXT, re.M)
COMMANDS = [shlex.split(line, comments=True)[2:] for line in LINES]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_page_on_pictures_work(words, two, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"$RUN": two[1], "runs/*-digits-*": f"{Path(two[0]).parent}/*"}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    kind, _, file = said(capsys, *words)[-1].partition(" ")
    assert kind in ("picture", "page") and Path(file).stat().st_size > 5000


def test_the_page_on_pictures_shows_every_action():
    others = {"boxes", "meshes"}  # on the pages of tests/test_detector_use.py and tests/test_mesh_use.py
    assert {words[0] for words in COMMANDS} == set(visualize.ACTIONS) - others


@pytest.mark.parametrize("words", [["masks", "ratio=0.2", "grid=7"], ["schedules", "layers=1"], ["schedules"]])
def test_pictures_without_runs(capsys, tmp_path, words):
    picture = tmp_path / "here" / "picture.svg"
    said(capsys, *words, f"output={picture}")
    first = picture.read_text()
    assert "</svg>" in first


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "an action is missing; choices: compare, maps, boxes"),
        (["entrpy"], "choices: compare, maps, boxes"),
        (["maps"], "maps takes run="),
        (["gallery"], "gallery takes run="),
        (["gallery", "run=RUN", "output=page.png"], "the name of a page ends in .html"),
        (["compare", "run=RUN", "head=all"], "compare draws one map of each run"),
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


LABELED = [
    (["regularizer=none"], ["regularizer.ratio=0.3"], "no regularizer", "dropkey 0.3 decreasing"),
    (["optim.lr=0.001"], ["optim.lr=0.002"], "lr 0.001", "lr 0.002"),
    (["schedule.end=0.1"], ["schedule.end=0.05"], "dropkey 0.1 decreasing to 0.1", "dropkey 0.1 decreasing to 0.05"),
    (["model.num_heads=1"], ["model.num_heads=2"], "num_heads 1", "num_heads 2"),
    (["model.depth=2"], ["model.depth=3"], "vit_2x32", "vit_3x32"),
    (["logger=none"], ["trainer.log_every=9"], "dropkey 0.1 decreasing", "dropkey 0.1 decreasing"),
]


@pytest.mark.parametrize(("one", "other", "first", "second"), LABELED, ids=lambda value: str(value))
def test_legends_name_what_differs_and_nothing_else(one, other, first, second, tmp_path):
    assert labels([runs.config(tmp_path, *one), runs.config(tmp_path, *other)], seeds=False) == [first, second]


def test_seeds_are_named_only_where_they_are_apart(tmp_path):
    configs = [runs.config(tmp_path, f"seed={seed}") for seed in (0, 1)]
    assert labels(configs, seeds=True) == ["seed 0", "seed 1"]
    assert len(set(labels(configs, seeds=False))) == 1


def test_a_difference_is_named_even_where_the_regularizer_tells_runs_apart(tmp_path):
    configs = [runs.config(tmp_path, "regularizer=none"), runs.config(tmp_path, "trainer.epochs=5")]
    assert labels(configs, seeds=False) == ["no regularizer, epochs 3", "dropkey 0.1 decreasing, epochs 5"]


def test_pictures_of_different_runs_have_different_names(tmp_path):
    configs = [runs.config(tmp_path, *words) for words in (["seed=1"], ["seed=2"], ["regularizer.ratio=0.2"])]
    assert file_stem(configs[:2]).startswith("vit_2x32-dropkey_0.1-digits-s1+2-")
    assert len({file_stem(chosen) for chosen in (configs, configs[:2], configs[1:], configs[::-1])}) == 4
    assert len(file_stem([runs.config(tmp_path, f"seed={seed}") for seed in range(100, 140)])) < 100


# ---------------------------------------------------------------------------------------------------------- gallery


@pytest.fixture(scope="module")
def gallery(two):
    visualize.main(["gallery", f"run={two[1]}"])
    return (Path(two[1]) / "gallery.html").read_text()


def test_the_gallery_needs_nothing_from_elsewhere_and_fits_a_phone(gallery):
    assert not re.search(r'(src|href)="(?!data:image/(jpeg|svg\+xml);base64,)', gallery) and "<script" not in gallery
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in gallery
    assert gallery.count("<table") == gallery.count('<div class="wide"><table')


def test_the_gallery_tells_config_result_and_mistakes(two, gallery):
    opened = trained.open_run(two[1])
    found = answers(opened, opened.spread(10**6))
    wrong = sum(not one.right for one in found)
    assert "<h1>dropkey 0.1 decreasing: vit_2x32 on digits, seed 0</h1>" in gallery
    assert f"<b>{opened.run.summary()['top1']:.2f} %</b><span>top-1</span>" in gallery
    assert f"{wrong} of {len(found)} test images are wrong" in gallery
    first = worst(found, 1)[0]
    mistakes = gallery.split("Worst mistakes")[1]
    assert f"<b>✗ {first.predicted}</b>, is {first.true}<br>{100 * first.confidence:.0f} % sure" in mistakes
    assert mistakes.count('<figure class="wrong">') == min(wrong, 12)


def test_pictures_of_the_gallery_are_pictures(gallery):
    svg, jpeg = (
        [base64.b64decode(text) for text in re.findall(rf"data:image/{kind};base64,([^\"]+)", gallery)]
        for kind in (r"svg\+xml", "jpeg")
    )
    assert len(svg) == 3 and all(b"</svg>" in one for one in svg)  # loss, metric, entropy
    assert len(jpeg) > 2 * 12 + 4 and all(one[:2] == b"\xff\xd8" for one in jpeg)


def test_a_gallery_without_maps_says_why(two, tmp_path, monkeypatch):
    def none(*args, **options):
        raise ConfigError("attends in windows")

    monkeypatch.setattr(galleries, "attention_maps", none)
    monkeypatch.setattr(galleries, "head_maps", none)
    galleries.write_gallery(two[0], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("attends in windows") == 2 and "Every head" not in text and "Most frequent" in text


def test_images_are_spread_over_the_split_so_that_every_class_is_seen(two):
    opened = trained.open_run(two[0])
    size = len(opened.dataset.test)
    assert opened.spread(10**6).tolist() == list(range(size))
    some = opened.spread(4).tolist()
    assert len(set(some)) == 4 and some[0] == 0 and some[-1] >= size * 3 // 4 - 1
