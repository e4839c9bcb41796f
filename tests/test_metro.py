"""METRO: its sizes as published, its attentions, its hidden tokens."""

import pytest
import timm
import torch
from torch import nn

import dropkey
import dropkey.models
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.mesh.samples import Body
from dropkey.reproduction import cost

JOINTS, LEVELS = 14, (431, 1723, 6890)  # of SMPL in METRO
FEW = {"img_size": 32, "in_chans": 1, "joints": 14, "levels": (20, 30, 60)}


def official(name: str, backbone: str):
    with torch.device("meta"):
        return timm.create_model(name, img_size=224, joints=JOINTS, levels=LEVELS, backbone=backbone)


def small(**changes):
    torch.manual_seed(0)
    return timm.create_model("metro_small", **FEW | changes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("backbone, millions", [("resnet50", 23.5), ("hrnet_w64", 126)])
def test_parameters_are_as_many_as_published(backbone, millions):
    """102.3 million in the encoders (paper, section 4). Of these 43 million are BERT's embeddings of words, which the
    official code holds and never uses, as its embeddings of places and of types, and its pooler. HRNet's published
    128.1 million count its classifier (2 million)."""
    model = official("metro_r50", backbone)
    widths = (1024, 256, 128)
    unused = sum((30_522 + 512 + 2 + 2) * width + width * width + width for width in widths)
    spare = sum((512 - 445) * width for width in widths)  # of the places in use
    assert count(model.blocks) + unused + spare == pytest.approx(102.3e6, rel=0.01)
    assert count(model.backbone) == pytest.approx(millions * 1e6, rel=0.01)
    assert model.cells.weight.shape == (445, 49, 1) and model.blocks[0].embed.in_features == 2048 + 3
    assert [(block.head.out_features, block.shortcut.in_features) for block in model.blocks] == [
        (256, 2051),
        (128, 256),
        (3, 128),
    ]


def test_dropkey_finds_twelve_self_attentions_in_forward_order():
    model, called = small(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            assert module.dropout == 0
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    dropkey.apply(model, ratio=0.3, schedule="decreasing")
    model(torch.randn(2, 1, 32, 32))
    layers = dropkey.report(model).layers
    assert [layer.name for layer in layers] == called and len(called) == 12
    assert {(layer.kind, layer.mechanism) for layer in layers} == {("self", "fused")}


def test_outputs_have_their_shapes_and_every_weight_learns():
    model = small()
    joints, levels, camera = model(torch.randn(2, 1, 32, 32))
    assert joints.shape == (2, 14, 3) and camera.shape == (2, 3)
    assert [level.shape for level in levels] == [(2, 20, 3), (2, 30, 3), (2, 60, 3)]
    sum(part.square().sum() for part in (joints, camera, *levels)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_tokens_know_their_place_in_the_template():
    body, (model, seen) = Body.blank(14, (20, 30, 60), 0), (small().eval(), [])
    body.template.normal_(), body.regressor.normal_(), body.coarse.copy_(torch.arange(20))
    model.set_body(body)
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.randn(2, 1, 32, 32))
    torch.testing.assert_close(seen[0][..., :3], body.tokens().expand(2, 34, 3))
    assert "template" in model.state_dict()


def test_hidden_tokens_are_replaced_as_a_whole_and_in_training_alone():
    model, seen = small(), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    images = torch.randn(8, 1, 32, 32)
    for mode in (True, False):
        torch.manual_seed(1)
        model.train(mode)(images)
    torch.manual_seed(1)
    hidden = model.hidden(8, "cpu")
    assert hidden.any() and (seen[0][hidden] == 0.01).all()
    torch.testing.assert_close(seen[0][~hidden], seen[1][~hidden])
    assert not (seen[1] == 0.01).any()


def test_up_to_three_tenths_of_joints_and_of_vertices_are_hidden():
    torch.manual_seed(0)
    hidden = small().hidden(20_000, "cpu")
    joints, vertices = hidden[:, :14].sum(1), hidden[:, 14:].sum(1)
    # floor(0.3 x 14 u) and floor(0.3 x 20 u): 0 to 3 and 0 to 5 are equally frequent
    torch.testing.assert_close(
        torch.bincount(joints) / 20_000, torch.tensor([1, 1, 1, 1, 0.2]) / 4.2, atol=0.015, rtol=0
    )
    torch.testing.assert_close(torch.bincount(vertices) / 20_000, torch.full((6,), 1 / 6), atol=0.015, rtol=0)
    assert abs(torch.corrcoef(torch.stack([joints, vertices]).float())[0, 1]) < 0.03
    torch.testing.assert_close(
        hidden[:, :14].float().mean(0), hidden[:, :14].float().mean().expand(14), atol=0.015, rtol=0
    )


def test_the_cost_of_a_table_is_planned_without_data():
    cfg = check(compose(["experiment=stick_figures_metro"]))
    operations, parameters = cost.of_model(cfg)
    assert parameters == pytest.approx(0.4e6, rel=0.1) and 1e7 < operations < 1e8
    assert cost.samples_of(cfg) == cfg.trainer.epochs * 125 * 32
