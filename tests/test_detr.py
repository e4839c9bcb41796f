"""DETR: the official network, compared with transformers' where that is the same."""

import pytest
import timm
import torch

import dropkey
from dropkey import patching, weights
from dropkey.models import detr
from dropkey.patching.find import find_attention_modules

SIZES = ((96, 64), (64, 128))  # height and width of two images


def padded(channels: int = 3):
    """Images of unequal size as one batch, and where it is padded."""
    torch.manual_seed(1)
    height, width = (max(size[axis] for size in SIZES) for axis in (0, 1))
    images = torch.zeros(len(SIZES), channels, height, width)
    padding = torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for image, mask, (h, w) in zip(images, padding, SIZES, strict=True):
        image[:, :h, :w] = torch.randn(channels, h, w)
        mask[:h, :w] = False
    return images, padding


def perturbed(model):
    """Norms and frozen statistics that are not the identity, and weights of an effect, so that a missing one shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 1 and value.is_floating_point():
                value += 0.2 * torch.rand(value.shape, generator=generator)
            elif value.dim() == 4:
                value *= (
                    0.75 if "layer" in name else 8 if "proj" in name else 1
                )  # without trained statistics activations would grow
            elif value.dim() == 2:
                value.copy_(torch.randn(value.shape, generator=generator) * (2 if "quer" in name else 0.35))
    return model


@pytest.fixture(scope="module")
def pair():
    """transformers' model and ours with its weights, converted."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 7}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.DetrConfig(
        **sizes, **heads, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, num_labels=5, auxiliary_loss=False
    )
    theirs = perturbed(transformers.DetrForObjectDetection(config))
    ours = detr.DETR(num_classes=5, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, num_queries=7, dropout=0.0)
    ours.load_state_dict(detr.checkpoint_filter_fn(theirs.state_dict(), ours))
    return theirs, ours


def test_outputs_are_those_of_transformers_for_images_of_unequal_size(pair):
    theirs, ours = (model.eval() for model in pair)
    images, padding = padded()
    expected = theirs(images, pixel_mask=(~padding).long())
    logits, boxes = ours(images, padding)
    assert expected.logits.std(0).max() > 5e-3 and expected.logits.std(1).max() > 5e-3  # far above the tolerance
    torch.testing.assert_close(logits[0], expected.logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(boxes[0], expected.pred_boxes, rtol=0, atol=1e-5)


def test_padding_matters(pair):
    ours, (images, padding) = pair[1].eval(), padded()
    assert not torch.allclose(ours(images, padding)[0], ours(images)[0], atol=1e-3)


FROZEN = ("backbone.0.body.conv1", "backbone.0.body.layer1")  # transformers trains them, the official network does not


def test_gradients_are_those_of_transformers_but_for_what_is_frozen(pair):
    theirs, ours = (model.train() for model in pair)
    images, padding = padded()
    expected = theirs(images, pixel_mask=(~padding).long())
    (expected.logits.square().mean() + expected.pred_boxes.square().mean()).backward()
    logits, boxes = ours(images, padding)
    (logits[-1].square().mean() + boxes[-1].square().mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = detr.checkpoint_filter_fn(gradients, ours)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    gradients = {name: gradient for name, gradient in gradients.items() if not name.startswith(FROZEN)}
    assert found.keys() == gradients.keys() and any("backbone.0.body.layer2" in name for name in found)
    assert not any(".bn" in name or "downsample.1" in name for name in found)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_names_of_the_no_timm_files_are_converted_too(pair):
    """transformers' own ResNet, as in the revision no_timm of facebook/detr-resnet-50."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=7, num_labels=5
    )
    theirs = transformers.DetrForObjectDetection(config)
    ours = detr.DETR(num_classes=5, embed_dim=32, depth=1, mlp_ratio=64, num_queries=7)
    ours.load_state_dict(detr.checkpoint_filter_fn(theirs.state_dict(), ours))


def test_names_of_transformers_4_are_converted_too(pair):
    theirs, ours = pair
    older = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("backbone.model.", "backbone.conv_encoder.model.").replace("o_proj", "out_proj")
        older[name.replace("mlp.fc", "fc")] = value
    expected = detr.checkpoint_filter_fn(theirs.state_dict(), ours)
    found = detr.checkpoint_filter_fn(older, ours)
    assert found.keys() == expected.keys() == ours.state_dict().keys()


def test_official_names_and_sizes():
    """41.3 million trained parameters with the 91 classes of COCO, as the paper says (41.5 with what is frozen)."""
    model = timm.create_model("detr_r50")
    names = model.state_dict().keys()
    for name in (
        *(
            "transformer.encoder.layers.5.self_attn.in_proj_weight",
            "transformer.decoder.layers.5.multihead_attn.out_proj.bias",
        ),
        *("transformer.decoder.layers.0.norm3.weight", "transformer.decoder.norm.bias", "class_embed.weight"),
        *("bbox_embed.layers.2.bias", "query_embed.weight", "input_proj.weight", "backbone.0.body.conv1.weight"),
        *("backbone.0.body.bn1.running_mean", "backbone.0.body.layer4.2.bn3.weight"),
    ):
        assert name in names
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == 41.3
    assert detr.checkpoint_filter_fn(model.state_dict(), model).keys() == names


def small(**options) -> detr.DETR:
    torch.manual_seed(0)
    return timm.create_model("detr_small", num_classes=10, in_chans=1, **options)


def test_auxiliary_outputs_do_not_change_the_main_one():
    """transformers' auxiliary_loss=True feeds the normed state to the next layer."""
    model, (images, padding) = perturbed(small(depth=3)), padded(1)
    levels, last = model.train()(images, padding), model.eval()(images, padding)
    assert levels[0].shape == (3, 2, 8, 11) and last[0].shape == (1, 2, 8, 11)
    for of_all, of_last in zip(levels, last, strict=True):
        torch.testing.assert_close(of_all[-1:], of_last)
        assert not torch.allclose(of_all[-2], of_last[0], atol=1e-3)
    # what the levels give does not depend on the norm of the levels before them
    hidden = model.transformer.decoder
    states = []
    hidden.norm.register_forward_hook(lambda module, args, output: states.append(args[0]))
    model(images, padding)
    with torch.no_grad():
        hidden.norm.weight.fill_(3.0)
    model(images, padding)
    torch.testing.assert_close(states[:3], states[3:])


def test_dropout_of_attention_weights_is_left_to_the_regularizer():
    model = small(dropout=0.3)
    attentions = [m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert len(attentions) == 6 and all(attention.dropout == 0 for attention in attentions)
    images, padding = padded(1)
    assert not torch.equal(model.train()(images, padding)[1], model(images, padding)[1])


ENCODER = [f"transformer.encoder.layers.{i}.self_attn" for i in range(6)]
SELF = [f"transformer.decoder.layers.{i}.self_attn" for i in range(6)]
CROSS = [f"transformer.decoder.layers.{i}.multihead_attn" for i in range(6)]
DECODER = [name for pair in zip(SELF, CROSS, strict=True) for name in pair]


@pytest.mark.parametrize(
    ("layers", "names"),
    [(("self",), ENCODER + SELF), (("cross",), CROSS), (("self", "cross"), ENCODER + DECODER)],
    ids=["self", "cross", "all"],
)
@pytest.mark.parametrize("scope", ["model", "stack"])
def test_dropkey_finds_the_18_attentions_in_forward_order(layers, names, scope):
    model = small(depth=6)
    report = dropkey.apply(model, "dropkey", 0.4, layers=layers, scope=scope)
    assert [layer.name for layer in report.layers] == names
    assert not any(skip.missed for skip in find_attention_modules(model))
    ratios = [layer.ratio for layer in report.layers]
    if scope == "model":
        expected = dropkey.schedules.ratios("decreasing", 0.4, 0.0, len(names))
    else:
        ramp = dropkey.schedules.ratios("decreasing", 0.4, 0.0, 6)  # once over each stack, by the number of its block
        expected = [ramp[int(name.split(".")[3])] for name in names]
    assert ratios == pytest.approx(expected)


def test_the_order_of_the_attentions_is_that_in_which_they_run():
    model, ran = small(depth=2), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(*padded(1))
    assert ran == [found.name for found in find_attention_modules(model)]


def test_padded_keys_stay_excluded_after_dropping():
    """What padded cells hold reaches no real cell and no query, with half of all keys dropped."""
    model = small()
    dropkey.apply(model, "dropkey", 0.5, "constant", layers=("self", "cross"))
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 5:], padding[1, 10:] = True, True
    tokens, positions = torch.randn(2, 2, 12, 64)
    other = torch.where(padding[..., None], torch.randn(2, 12, 64), tokens)
    queries, found = model.query_embed.weight.expand(2, -1, -1), []
    for each in (tokens, other):
        patching.seed_masks(model, 3)
        found.append(model.train().transformer(each, positions, queries, padding)[-1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    patching.seed_masks(model, 4)
    again = model.transformer(tokens, positions, queries, padding)[-1]
    assert not torch.allclose(found[0], again)  # keys are dropped indeed


@pytest.mark.parametrize("wrapped", [True, False], ids=["official", "bare"])
def test_a_file_with_other_classes_starts_a_model(tmp_path, wrapped):
    """As `init_from` does: all weights but those of the classifier."""
    source, target = perturbed(small()), timm.create_model("detr_small", num_classes=4, in_chans=1)
    content = source.state_dict()
    torch.save({"model": content} if wrapped else content, tmp_path / "detr.pth")
    new = weights.load_weights(target, tmp_path / "detr.pth")
    assert new == ["class_embed.weight", "class_embed.bias"]
    for name, value in target.state_dict().items():
        assert name in new or torch.equal(value, content[name])
