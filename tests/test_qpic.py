"""QPIC: its heads on DETR's trunk, official names and sizes, and weights of DETR."""

import pytest
import timm
import torch

import dropkey
import runs
from dropkey import weights
from dropkey.errors import ConfigError
from dropkey.models import qpic

SMALL = {"in_chans": 1, "num_classes": 10}


def small(name="qpic_small", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL, **arguments)


def test_official_names_and_sizes():
    """Of hitachi-rd-cv/qpic: DETRHOI with 80 objects, 117 verbs and 100 queries."""
    model = timm.create_model("qpic_r50")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["obj_class_embed.weight"] == (81, 256) and shapes["verb_class_embed.bias"] == (117,)
    for kind in ("sub", "obj"):
        assert [shapes[f"{kind}_bbox_embed.layers.{i}.weight"] for i in range(3)] == [(256, 256), (256, 256), (4, 256)]
    trunk = {name for name in timm.create_model("detr_r50").state_dict() if not name.startswith(("class_", "bbox_"))}
    heads = shapes.keys() - trunk
    assert trunk < shapes.keys() and {name.split(".")[0] for name in heads} == {
        *("obj_class_embed", "verb_class_embed", "sub_bbox_embed", "obj_bbox_embed")
    }
    assert timm.create_model("qpic_r101").backbone[0].num_channels == 2048


def test_all_levels_are_given_in_training_and_the_last_in_evaluation():
    model, images = small(), torch.rand(2, 1, 48, 48)
    shapes = [(2, 8, 11), (2, 8, 5), (2, 8, 4), (2, 8, 4)]
    trained, evaluated = model.train()(images), model.eval()(images)
    assert [tuple(each.shape) for each in trained] == [(2, *shape) for shape in shapes]
    for one, other, shape in zip(evaluated, trained, shapes, strict=True):
        assert tuple(one.shape) == (1, *shape)
        torch.testing.assert_close(one[0], other[1])
    assert all(box.min() > 0 and box.max() < 1 for box in trained[2:])
    assert not torch.equal(trained[2], trained[3])


def test_padding_makes_no_difference_to_what_is_found():
    model, image = small().eval(), torch.rand(1, 1, 40, 32)
    padded, padding = torch.zeros(1, 1, 48, 48), torch.ones(1, 48, 48, dtype=torch.bool)
    padded[..., :40, :32], padding[:, :40, :32] = image, False
    for one, other in zip(model(padded, padding), model(padded), strict=True):
        assert not torch.allclose(one, other, atol=1e-4)


def test_verbs_begin_as_improbable():
    assert small().verb_class_embed.bias.tolist() == [-2.0] * 5
    assert qpic.QPIC(backbone="small", depth=1).verb_class_embed.bias.abs().max() < 0.2


def test_dropkey_finds_the_18_attentions_of_detr():
    found = [dropkey.apply(small(name, depth=6), "dropkey", 0.2, layers=("self", "cross")) for name in NAMES]
    layers = [[(layer.name, layer.ratio) for layer in report.layers] for report in found]
    assert layers[0] == layers[1] and len(layers[0]) == 18


NAMES = ("qpic_small", "detr_small")

# ------------------------------------------------------------------------------------------------------- weights


def saved(model, path, **changed):
    torch.save({"model": model.state_dict() | changed}, path / "weights.pth")
    return path / "weights.pth"


def shared(model):
    """The weights that QPIC has of DETR under the same name."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(("class", "bbox"))}


def test_coco_s_classes_become_the_80_objects_in_order(tmp_path):
    source = timm.create_model("detr_small", in_chans=1, num_classes=91)
    model = timm.create_model("qpic_small", in_chans=1, num_classes=80)
    verbs = model.verb_class_embed.weight.clone()
    assert weights.load_weights(model, saved(source, tmp_path)) == ["verb_class_embed.weight", "verb_class_embed.bias"]
    # 11 follows 10, 13 is the next of COCO's ids; the last row, 91, is "no object"
    for place, row in ((0, 1), (9, 10), (10, 11), (11, 13), (79, 90), (80, 91)):
        torch.testing.assert_close(model.obj_class_embed.weight[place], source.class_embed.weight[row])
        assert model.obj_class_embed.bias[place] == source.class_embed.bias[row]
    for embed in (model.sub_bbox_embed, model.obj_bbox_embed):
        assert runs.unequal(embed.state_dict(), source.bbox_embed.state_dict()) is None
    assert all(torch.equal(model.state_dict()[name], value) for name, value in shared(source).items())
    assert torch.equal(model.verb_class_embed.weight, verbs)


def test_as_many_classes_as_objects_are_taken_as_they_are_and_others_left_out(tmp_path):
    source = saved(small("detr_small"), tmp_path)
    model, other = small(), timm.create_model("qpic_small", in_chans=1, num_classes=7)
    weights.load_weights(model, source)
    assert torch.equal(model.obj_class_embed.weight, small("detr_small").class_embed.weight)
    assert {name.split(".")[0] for name in weights.load_weights(other, source)} == {
        "obj_class_embed",
        "verb_class_embed",
    }


def test_official_weights_load_as_they_are(tmp_path):
    source, model = small(), small()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    assert weights.load_weights(model, saved(source, tmp_path)) == []
    assert runs.unequal(model.state_dict(), source.state_dict()) is None


def test_weights_of_hugging_face_s_detr_load_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 7, "num_labels": 91}
    theirs = transformers.DetrForObjectDetection(transformers.DetrConfig(**sizes, auxiliary_loss=False))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = qpic.QPIC(embed_dim=32, depth=1, mlp_ratio=64, num_queries=7)
    new = weights.load_weights(model, tmp_path / "weights.pth")
    assert new == ["verb_class_embed.weight", "verb_class_embed.bias"]
    torch.testing.assert_close(model.obj_class_embed.bias[79], theirs.class_labels_classifier.bias[90])
    torch.testing.assert_close(model.sub_bbox_embed.layers[2].bias, theirs.bbox_predictor.layers[2].bias)


def test_weights_of_another_network_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="does not fit the model"):
        weights.load_weights(small(), saved(torch.nn.Linear(3, 3), tmp_path))
    with pytest.raises(ConfigError, match="does not fit the model"):
        weights.load_weights(small("detr_small"), saved(small(), tmp_path))
