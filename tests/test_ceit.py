"""Properties of CeiT: the published sizes, the released checkpoints' names, and what the model computes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import load_checkpoint
from torch import nn

import dropkey
from dropkey.models.ceit import CeiT, LayerwiseClassAttention, checkpoint_filter_fn

PARAMETERS = {"ceit_tiny": 6_356_904, "ceit_small": 24_204_840, "ceit_base": 94_405_416}  # 224 px, 1000 classes
TINY = {"img_size": 24, "patch_size": 8, "num_classes": 10, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
NORM, LINEAR, CONV = ("weight", "bias"), ("weight", "bias"), ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def tiny(**changes) -> CeiT:
    torch.manual_seed(0)
    return CeiT(**(TINY | changes))


def names(prefix: str, parts: tuple[str, ...]) -> set[str]:
    return {f"{prefix}.{part}" for part in parts}


# ---- sizes and names


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_names_and_shapes_are_those_of_the_released_checkpoints():
    with torch.device("meta"):
        state = timm.create_model("ceit_tiny").state_dict()
    expected = {"cls_token", "pos_embed", "pos_layer_embed", "i2t.backbone.conv.weight"}
    expected |= names("i2t.backbone.bn", BATCH_NORM) | names("i2t.proj", CONV) | names("norm", NORM)
    expected |= names("head", LINEAR)
    for block in [f"blocks.{i}" for i in range(12)] + ["lca"]:
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj"):
            expected |= names(f"{block}.{part}", LINEAR)
        for part in ("feedforward.fc1", "feedforward.fc2") if block == "lca" else ():
            expected |= names(f"{block}.{part}", LINEAR)
        for number in (1, 2, 3) if block != "lca" else ():
            expected |= names(f"{block}.leff.conv{number}", CONV) | names(f"{block}.leff.bn{number}", BATCH_NORM)
    assert set(state) == expected
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["pos_embed"] == (1, 197, 192) and shapes["pos_layer_embed"] == (1, 12, 192)
    assert shapes["i2t.proj.weight"] == (192, 64, 4, 4) and shapes["blocks.0.attn.qkv.weight"] == (576, 192)
    assert shapes["blocks.0.leff.conv1.weight"] == (768, 192, 1, 1)
    assert shapes["blocks.0.leff.conv2.weight"] == (768, 1, 3, 3)


def test_norms_have_the_published_eps():
    kinds = {(type(m), m.eps) for m in tiny().modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))}
    assert kinds == {(nn.LayerNorm, 1e-6), (nn.BatchNorm2d, 1e-5)}


def test_linear_layers_start_truncated_normal_and_layer_positions_at_zero():
    model = timm.create_model("ceit_tiny")
    weight = model.blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and not model.blocks[0].attn.qkv.bias.any()
    assert not model.pos_layer_embed.any()


# ---- what it computes


def attend(x, state, name, heads, rows=slice(None)):
    b, n, d = x.shape
    q, k, v = (F.linear(x, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])).chunk(3, dim=-1)
    q, k, v = (t.reshape(b, n, heads, d // heads).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q[:, :, rows], k, v).transpose(1, 2).flatten(2)
    return F.linear(out, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])


def plain_logits(state: dict, images: torch.Tensor, depth: int, heads: int, side: int) -> torch.Tensor:
    """The model in evaluation mode, written down from the paper."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def batch_norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = batch_norm(conv(images, "i2t.backbone.conv", stride=2, padding=3), "i2t.backbone.bn")
    x = conv(F.max_pool2d(x, 3, 2, 1), "i2t.proj", stride=state["i2t.proj.weight"].shape[-1])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]
    rows = []
    for i in range(depth):
        name = f"blocks.{i}"
        x = x + attend(norm(x, f"{name}.norm1"), state, f"{name}.attn", heads)
        y = norm(x, f"{name}.norm2")
        grid = y[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        grid = F.gelu(batch_norm(conv(grid, f"{name}.leff.conv1"), f"{name}.leff.bn1"))
        grid = conv(grid, f"{name}.leff.conv2", padding=1, groups=grid.shape[1])
        grid = F.gelu(batch_norm(grid, f"{name}.leff.bn2"))
        grid = batch_norm(conv(grid, f"{name}.leff.conv3"), f"{name}.leff.bn3")
        x = x + torch.cat([y[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        rows.append(x[:, 0])
    rows = torch.stack(rows, 1) + state["pos_layer_embed"]
    last = rows[:, -1:] + attend(norm(rows, "lca.norm1"), state, "lca.attn", heads, slice(-1, None))
    hidden = F.gelu(linear(norm(last, "lca.norm2"), "lca.feedforward.fc1"))
    last = last + linear(hidden, "lca.feedforward.fc2")
    return linear(norm(last[:, 0], "norm"), "head")


def random_state(model: CeiT) -> None:
    """No bias, statistic or scale at a value that would hide its absence."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else torch.randn_like(value) / 4)


def test_logits_and_gradients_are_those_of_the_paper_written_down_plainly():
    model = tiny().double().eval()
    random_state(model)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    out = model(images)
    out.square().sum().backward()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    expected = plain_logits(state, images, depth=3, heads=2, side=3)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, msg=name)


def test_the_layer_over_class_tokens_has_no_drop_path():
    model = tiny(drop_path_rate=0.2)
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert not any(isinstance(module, DropPath) for module in model.lca.modules())


def test_batch_norm_learns_its_statistics_in_training_alone():
    model, images = tiny(), torch.randn(4, 3, 24, 24)
    before = model.blocks[0].leff.bn2.running_mean.clone()
    model.eval()(images)
    assert torch.equal(before, model.blocks[0].leff.bn2.running_mean)
    model.train()(images)
    assert not torch.equal(before, model.blocks[0].leff.bn2.running_mean)


def test_class_token_and_positions_are_not_decayed_but_layer_positions_are():
    assert tiny().no_weight_decay() == {"cls_token", "pos_embed"}


def test_checkpointed_activations_give_the_same_gradients():
    images = torch.randn(2, 3, 24, 24)
    gradients = []
    for enabled in (False, True):
        model = tiny().eval()
        model.set_grad_checkpointing(enabled)
        model(images).sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


# ---- shapes


@pytest.mark.parametrize(
    ("img_size", "patch_size", "in_chans", "grid"),
    [(224, 16, 3, (14, 14)), (32, 4, 3, (8, 8)), ((32, 48), 8, 1, (4, 6))],
)
def test_the_grid_follows_from_picture_and_patch(img_size, patch_size, in_chans, grid):
    model = tiny(img_size=img_size, patch_size=patch_size, in_chans=in_chans)
    assert model.grid_size == grid
    assert model(torch.randn(2, in_chans, *model.img_size)).shape == (2, 10)


@pytest.mark.parametrize(("img_size", "patch_size"), [(24, 6), (30, 4), (24, 2)])
def test_patches_that_the_stem_cannot_make_are_refused(img_size, patch_size):
    with pytest.raises(ValueError, match="a multiple of 4 that divides"):
        tiny(img_size=img_size, patch_size=patch_size)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="2x2 tokens are fewer than 9"):
        tiny(img_size=32, patch_size=16)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 32\), but the model was built for \(24, 24\)"):
        tiny()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(("num_classes", "width"), [(7, 7), (0, 32)])
def test_reset_classifier_changes_the_output_width(num_classes, width):
    model = tiny()
    model.reset_classifier(num_classes)
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, width)


# ---- released files


def test_a_released_file_loads_into_another_class_count_and_image_size(tmp_path):
    released = tiny(num_classes=1000)
    torch.save({"model": released.state_dict()}, tmp_path / "ceit.pth")
    model = tiny(img_size=48)
    head = model.head.weight.clone()
    load_checkpoint(model, tmp_path / "ceit.pth", strict=False, filter_fn=checkpoint_filter_fn)
    assert torch.equal(model.blocks[1].leff.conv2.weight, released.blocks[1].leff.conv2.weight)
    assert torch.equal(model.head.weight, head) and model.pos_embed.shape == (1, 1 + 36, 32)
    assert torch.equal(model.pos_embed[:, 0], released.pos_embed[:, 0])


def test_a_file_of_the_same_shape_loads_strictly_and_whole():
    released, model = tiny(), tiny()
    random_state(released)
    model.load_state_dict(checkpoint_filter_fn({"model": released.state_dict()}, model))
    assert all(torch.equal(value, released.state_dict()[name]) for name, value in model.state_dict().items())


# ---- DropKey


def test_dropkey_acts_in_self_attention_and_on_request_on_the_class_tokens_of_all_layers():
    layers = [layer.name for layer in dropkey.apply(tiny(), ratio=0.3).layers]
    assert layers == [f"blocks.{i}.attn" for i in range(3)]
    layers = dropkey.apply(tiny(), ratio=0.3, layers=("self", "layer"), schedule="constant").layers
    assert [(layer.name, layer.kind, layer.ratio) for layer in layers][-1] == ("lca.attn", "layer", 0.3)


def test_a_dropped_class_token_of_a_layer_gets_no_weight():
    attention = LayerwiseClassAttention(32, 2).double()
    model = nn.Sequential(attention)
    dropkey.apply(model, ratio=0.5, layers=("layer",), schedule="constant")
    seen = []
    attention.attn_drop.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    attention(torch.randn(64, 5, 32, dtype=torch.float64))
    weights, kept = seen[0]
    dropped = kept == 0
    assert 0.4 < dropped.double().mean() < 0.55
    expected = (weights * ~dropped) / (weights * ~dropped).sum(-1, keepdim=True)
    torch.testing.assert_close(kept, expected.nan_to_num())  # without any key there is no attention


def test_ratio_zero_is_the_model_itself_bit_for_bit():
    images = torch.randn(2, 3, 24, 24)
    plain, model = tiny(), tiny()
    dropkey.apply(model, ratio=0.0, layers=("self", "layer"))
    assert torch.equal(plain.train()(images), model.train()(images))
