"""METRO: its sizes as published, its attentions, its hidden tokens."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import dropkey
import dropkey.models
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.mesh.samples import Body
from dropkey.models import metro
from dropkey.models.metro import small_backbone
from dropkey.reproduction import cost
from dropkey.weights import load_weights

transformers = pytest.importorskip("transformers")
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


# ------------------------------------------------------------------------------------------------- official weights


class OfficialBlock(nn.Module):
    """One encoder of microsoft/MeshTransformer, with transformers' BERT, and what it holds without using it."""

    def __init__(self, before: int, width: int, after: int, hidden: int):
        super().__init__()
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": hidden, "vocab_size": 30}
        config = transformers.BertConfig(hidden_size=width, max_position_embeddings=512, **sizes)
        self.bert = transformers.BertModel(config)
        self.bert.position_embeddings = nn.Embedding(512, width)
        self.bert.img_embedding = nn.Linear(before, width)
        self.cls_head, self.residual = nn.Linear(width, after), nn.Linear(before, after)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = self.bert.position_embeddings.weight[: tokens.shape[1]]
        return self.cls_head(self.bert.encoder(self.bert.img_embedding(tokens) + places)[0]) + self.residual(tokens)


class Official(nn.Module):
    """METRO_Body_Network, for few vertices."""

    def __init__(self, backbone: nn.Module, channels: int, cells: int, joints: int, levels: tuple[int, int, int]):
        super().__init__()
        few, middle, many = levels
        self.backbone, self.joints = backbone, joints
        self.trans_encoder = nn.Sequential(
            OfficialBlock(channels + 3, 64, 48, 128), OfficialBlock(48, 48, 32, 128), OfficialBlock(32, 32, 3, 128)
        )
        self.upsampling, self.upsampling2 = nn.Linear(few, middle), nn.Linear(middle, many)
        self.conv_learn_tokens = nn.Conv1d(cells, joints + few, 1)
        self.cam_param_fc, self.cam_param_fc2 = nn.Linear(3, 1), nn.Linear(few, 250)
        self.cam_param_fc3 = nn.Linear(250, 3)

    def forward(self, images: torch.Tensor, template: torch.Tensor):
        cells = self.backbone(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([template.expand(len(images), -1, -1), self.conv_learn_tokens(cells)], dim=2)
        found = self.trans_encoder(tokens)
        joints, coarse = found[:, : self.joints], found[:, self.joints :]
        camera = self.cam_param_fc3(self.cam_param_fc2(self.cam_param_fc(coarse).transpose(1, 2)))[:, 0]
        middle = self.upsampling(coarse.transpose(1, 2))
        return joints, [coarse, middle.transpose(1, 2), self.upsampling2(middle).transpose(1, 2)], camera


def resnet() -> nn.Module:
    whole = torchvision.models.resnet50()
    return nn.Sequential(*list(whole.children())[:-2])


@pytest.mark.parametrize("name", ["small", "resnet50"])
def test_official_weights_give_the_official_outputs(name, tmp_path):
    changes = {} if name == "small" else {"backbone": name, "in_chans": 3}
    ours = small(**changes).eval()
    coarse, middle, many = FEW["levels"]
    indices = range(2), range(middle), range(coarse)
    ours.set_body(body := Body(torch.randn(many, 3), torch.rand(1 + FEW["joints"], many), *indices))
    backbone = small_backbone(1) if name == "small" else resnet()
    channels, cells = ours.blocks[0].embed.in_features - 3, ours.cells.in_channels
    torch.manual_seed(1)
    theirs = Official(backbone, channels, cells, FEW["joints"], FEW["levels"]).eval()
    torch.save(theirs.state_dict(), tmp_path / "state_dict.bin")
    assert load_weights(ours, tmp_path / "state_dict.bin") == []
    images = torch.randn(2, ours.backbone[0].in_channels if name == "small" else 3, 32, 32)
    with torch.no_grad():
        wanted, found = theirs(images, body.tokens()), ours(images)
    for one, other in zip([found[0], *found[1], found[2]], [wanted[0], *wanted[1], wanted[2]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert ours.body.regressor.equal(body.regressor)


def test_names_of_the_official_hrnet_are_timm_s():
    """Its classifier, which the official code loads and does not use, is left out."""
    model = official("metro_hrnet_w64", "hrnet_w64")
    model.body = Body.blank(JOINTS, LEVELS, 0)
    names = ["stage4.2.fuse_layers.3.0.2.0.weight", "incre_modules.3.0.downsample.1.bias", "final_layer.0.bias"]
    weights = {f"backbone.{name}": torch.zeros(1) for name in [*names, "classifier.weight"]}
    weights["conv_learn_tokens.weight"] = torch.zeros(1)
    found = metro.checkpoint_filter_fn(weights, model)
    assert set(found) == {*(f"backbone.{name}" for name in names), "cells.weight"} < set(model.state_dict())


def test_the_cost_of_a_table_is_planned_without_data():
    cfg = check(compose(["experiment=stick_figures_metro"]))
    operations, parameters = cost.of_model(cfg)
    assert parameters == pytest.approx(0.4e6, rel=0.1) and 1e7 < operations < 1e8
    assert cost.samples_of(cfg) == cfg.trainer.epochs * 125 * 32
