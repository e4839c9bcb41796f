"""Properties of T2T-ViT: the published sizes, the released checkpoints' names, and what each part computes."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import load_checkpoint
from timm.optim import param_groups_weight_decay
from torch import nn

from dropkey.models.t2t_vit import (
    IMAGENET_SPLITS,
    SMALL_SPLITS,
    T2TViT,
    TokenPerformer,
    TokensToToken,
    TokenTransformerAttention,
    checkpoint_filter_fn,
    sinusoid_table,
)

PARAMETERS = {  # frozen included, 224 px, 1000 classes
    "t2t_vit_7": 4_310_222,
    "t2t_vit_10": 5_889_230,
    "t2t_vit_12": 6_941_902,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_24": 64_105_934,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_t_19": 39_172_942,
    "t2t_vit_t_24": 64_101_454,
}
TINY = {"img_size": 48, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}  # 3x3 tokens
BOTH_TOKENS = pytest.mark.parametrize("tokens", ["performer", "transformer"])


def tiny(**changes) -> T2TViT:
    return T2TViT(**(TINY | changes))


# ---- sizes and names


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_224_px_shrink_to_3136_784_196_tokens(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert model.tokens_to_token.grids == ((56, 56), (28, 28), (14, 14))
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[1] == 1 + 196


def affine(name, outputs, inputs=None):
    """Shapes of a Linear's weight and bias, or of a LayerNorm's when there is one width only."""
    return {f"{name}.weight": (outputs,) if inputs is None else (outputs, inputs), f"{name}.bias": (outputs,)}


def token_layer_shapes(tokens, name, width):
    shapes = affine(f"{name}.norm1", width) | affine(f"{name}.norm2", 64)
    if tokens == "performer":
        shapes |= {f"{name}.w": (32, 64)} | affine(f"{name}.kqv", 192, width) | affine(f"{name}.proj", 64, 64)
        return shapes | affine(f"{name}.mlp.0", 64, 64) | affine(f"{name}.mlp.2", 64, 64)
    shapes |= {f"{name}.attn.qkv.weight": (192, width)} | affine(f"{name}.attn.proj", 64, 64)
    return shapes | affine(f"{name}.mlp.fc1", 64, 64) | affine(f"{name}.mlp.fc2", 64, 64)


def block_shapes(name, dim, hidden):
    shapes = affine(f"{name}.norm1", dim) | affine(f"{name}.norm2", dim)
    shapes |= {f"{name}.attn.qkv.weight": (3 * dim, dim)} | affine(f"{name}.attn.proj", dim, dim)
    return shapes | affine(f"{name}.mlp.fc1", hidden, dim) | affine(f"{name}.mlp.fc2", dim, hidden)


@pytest.mark.parametrize(("name", "tokens"), [("t2t_vit_14", "performer"), ("t2t_vit_t_14", "transformer")])
def test_names_and_shapes_are_those_of_the_released_checkpoints(name, tokens):
    expected = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    expected |= token_layer_shapes(tokens, "tokens_to_token.attention1", 147)
    expected |= token_layer_shapes(tokens, "tokens_to_token.attention2", 576)
    expected |= affine("tokens_to_token.project", 384, 576)
    for i in range(14):
        expected |= block_shapes(f"blocks.{i}", 384, 1152)
    expected |= affine("norm", 384) | affine("head", 1000, 384)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


@BOTH_TOKENS
def test_every_layer_norm_has_eps_1e5(tokens):
    assert {m.eps for m in tiny(tokens=tokens).modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


@BOTH_TOKENS
def test_linear_layers_start_truncated_normal_with_zero_bias(tokens):
    for layer in (m for m in tiny(tokens=tokens).modules() if isinstance(m, nn.Linear)):
        assert abs(layer.weight.std().item() - 0.02) < 0.004
        assert layer.bias is None or not layer.bias.any()


# ---- pictures in, logits out


@BOTH_TOKENS
@pytest.mark.parametrize(
    ("img_size", "in_chans", "grid"),
    [(48, 3, (3, 3)), ((48, 80), 3, (3, 5)), ((96, 48), 1, (6, 3)), ((50, 70), 3, (3, 5))],
)
def test_any_picture_shape_gives_logits(tokens, img_size, in_chans, grid):
    model = tiny(img_size=img_size, in_chans=in_chans, tokens=tokens)
    assert model.grid_size == grid
    assert model(torch.randn(2, in_chans, *model.img_size)).shape == (2, 10)
    assert model.forward_features(torch.randn(2, in_chans, *model.img_size)).shape == (2, 1 + grid[0] * grid[1], 32)


def test_tokens_keep_their_place_on_a_non_square_picture():
    """With pointwise layers between the soft splits, a token depends on the pixels around its own place only."""
    module = TokensToToken((64, 128), 3, 16, "performer", IMAGENET_SPLITS)
    module.attention1, module.attention2 = nn.Linear(147, 64), nn.Linear(576, 64)
    picture = torch.randn(1, 3, 64, 128, requires_grad=True)
    rows, columns = module.grids[-1]
    token = 2 * columns + 5
    module(picture)[0, token].sum().backward()
    touched = picture.grad[0].abs().sum(0).nonzero().double().mean(0)
    centre = torch.tensor([2 * 64 / rows, 5 * 128 / columns])  # splits are centred on the token's upper left pixel
    assert (touched - centre).abs().max() < 8


def test_small_image_model_has_8x8_tokens_at_32_px():
    model = timm.create_model("t2t_vit_small_image", num_classes=10)
    assert model.tokens_to_token.grids == ((16, 16), (8, 8))
    assert model.tokens_to_token.attention1.norm1.normalized_shape == (27,)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.5e6, rel=0.01)


def test_too_few_tokens_are_refused_in_one_clear_line():
    with pytest.raises(
        ValueError, match=r"^image size 32x32 leaves 2x2 = 4 backbone tokens.*t2t_vit_small_image"
    ) as error:
        timm.create_model("t2t_vit_14", img_size=32)
    assert "\n" not in str(error.value)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 48\).*\(48, 48\)"):
        tiny()(torch.randn(1, 3, 32, 48))


def test_unknown_tokens_are_refused():
    with pytest.raises(ValueError, match="'convolution' is not one of performer, transformer"):
        tiny(tokens="convolution")


def test_timm_arguments_reach_the_model():
    model = timm.create_model("t2t_vit_7", num_classes=10, img_size=(48, 64), in_chans=1, drop_path_rate=0.1, depth=3)
    assert (model.num_classes, model.img_size, model.in_chans, len(model.blocks)) == (10, (48, 64), 1, 3)
    assert (model.num_features, model.embed_dim, model.num_prefix_tokens, model.grid_size) == (256, 256, 1, (3, 4))
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg["fixed_input_size"]


def test_backbone_input_is_the_class_token_then_the_tokens_plus_positions():
    model, picture = tiny(depth=0).eval(), torch.randn(1, 3, 48, 48)
    tokens = torch.cat((model.cls_token, model.tokens_to_token(picture)), dim=1)
    torch.testing.assert_close(model.forward_features(picture), model.norm(tokens + model.pos_embed))


def test_pre_logits_are_the_class_token():
    model = tiny().eval()
    features = model.forward_features(torch.randn(2, 3, 48, 48))
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])


@pytest.mark.parametrize(("num_classes", "width"), [(7, 7), (0, 32)])
def test_reset_classifier_changes_the_output_width(num_classes, width):
    model = tiny().eval()
    model.reset_classifier(num_classes)
    assert model.num_classes == num_classes
    assert model.get_classifier() is model.head
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, width)


# ---- loading weights


def released_file(path, **changes):
    """A file as T2T-ViT's authors publish them, of a t2t_vit_7 with 2 blocks; returns the weights that should load."""
    wanted = timm.create_model("t2t_vit_7", depth=2, img_size=64).state_dict()
    file = {
        "state_dict": {f"module.{key}": torch.zeros_like(value) for key, value in wanted.items()},
        "state_dict_ema": {f"module.{key}": value for key, value in wanted.items()},
    }
    torch.save(file | changes, path)
    return wanted


def load_with_timm_pretrained(path, **arguments):
    overlay = {"file": str(path)}
    return timm.create_model("t2t_vit_7", depth=2, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def load_with_timm_checkpoint(path, **arguments):
    model = timm.create_model("t2t_vit_7", depth=2, **arguments)
    load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn, strict=False)
    return model


def load_by_hand(path, **arguments):
    model = timm.create_model("t2t_vit_7", depth=2, **arguments)
    result = model.load_state_dict(checkpoint_filter_fn(torch.load(path), model), strict=False)
    assert set(result.missing_keys) == {"head.weight", "head.bias"}
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("load", [load_with_timm_pretrained, load_with_timm_checkpoint, load_by_hand])
def test_a_released_file_loads_into_another_class_count_and_image_size(load, tmp_path):
    wanted = released_file(tmp_path / "released.pth")
    model = load(tmp_path / "released.pth", num_classes=10, img_size=96)
    torch.testing.assert_close(model.pos_embed, sinusoid_table(37, 256))
    assert model.head.weight.shape == (10, 256)
    for key, value in model.state_dict().items():
        if key != "pos_embed" and not key.startswith("head."):
            assert torch.equal(value, wanted[key]), key


def test_a_file_of_the_same_shape_loads_strictly_and_whole(tmp_path):
    wanted = released_file(tmp_path / "released.pth")
    model = timm.create_model("t2t_vit_7", depth=2, img_size=64)
    load_checkpoint(model, str(tmp_path / "released.pth"), filter_fn=checkpoint_filter_fn, strict=True)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_file_without_averaged_weights_loads_its_plain_ones(wrapper):
    source, model = tiny(), tiny()
    model.load_state_dict(checkpoint_filter_fn({"state_dict_ema": None, wrapper: source.state_dict()}, model))
    assert torch.equal(model.head.weight, source.head.weight)


# ---- token performer


def test_random_projection_is_orthogonal():
    w = TokenPerformer(147).w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)


def test_random_features_estimate_the_softmax_kernel():
    """phi(q)·phi(k) with many rows of w from N(0, I) is exp(q·k) up to noise of about 1 %."""
    layer = TokenPerformer(147)
    layer.w = nn.Parameter(torch.randn(100_000, 64), requires_grad=False)
    q, k = (0.1 * torch.randn(2, 1, 5, 64)).unbind(0)
    estimate = layer.random_features(q) @ layer.random_features(k).transpose(1, 2)
    torch.testing.assert_close(estimate, (q @ k.transpose(1, 2)).exp(), rtol=0.05, atol=0)


def test_linear_attention_is_attention_with_the_feature_kernel():
    layer = TokenPerformer(147)
    q, k, v = (0.3 * torch.randn(3, 2, 11, 64)).unbind(0)  # short, as long ones have a kernel below the 1e-8
    weights = layer.random_features(q) @ layer.random_features(k).transpose(1, 2)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(layer.linear_attention(q, k, v), expected, rtol=1e-3, atol=1e-4)


def test_linear_attention_is_in_fp32_under_autocast():
    layer = TokenPerformer(147)
    q, k, v = (0.3 * torch.randn(3, 2, 11, 64)).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.linear_attention(q, k, v)
    assert torch.equal(out, layer.linear_attention(q, k, v))


def test_performer_takes_keys_then_queries_and_adds_the_values():
    layer = TokenPerformer(147).eval()
    nn.init.zeros_(layer.mlp[2].weight)
    nn.init.zeros_(layer.mlp[2].bias)
    x = torch.randn(2, 11, 147)
    k, q, v = layer.kqv(layer.norm1(x)).split(64, dim=-1)
    torch.testing.assert_close(layer(x), v + layer.proj(layer.linear_attention(q, k, v)))


# ---- token transformer


def test_token_attention_is_scaled_by_the_input_width_and_adds_the_values():
    layer = TokenTransformerAttention(147)
    x = torch.randn(2, 11, 147)
    q, k, v = layer.qkv(x).split(64, dim=-1)
    attended = nn.functional.scaled_dot_product_attention(q, k, v, scale=147**-0.5)
    torch.testing.assert_close(layer(x), layer.proj(attended) + v)


def test_attn_drop_receives_the_attention_weights():
    layer, seen = TokenTransformerAttention(147), []
    layer.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    layer(torch.randn(2, 11, 147))
    assert seen[0].shape == (2, 1, 11, 11)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 1, 11))


def test_token_attention_goes_through_what_replaces_attn_drop():
    class DropAll(nn.Module):
        def forward(self, attn):
            return torch.zeros_like(attn)

    layer = TokenTransformerAttention(147)
    layer.attn_drop = DropAll()
    x = torch.randn(2, 11, 147)
    torch.testing.assert_close(layer(x), layer.proj.bias + layer.qkv(x)[..., 128:])


# ---- positions, gradients, training


def test_sinusoid_table_follows_its_formula():
    table = sinusoid_table(197, 48)
    for position in (0, 1, 57, 196):
        for channel in range(48):
            angle = position / 10000 ** (2 * (channel // 2) / 48)
            wanted = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[0, position, channel].item() == pytest.approx(wanted, abs=1e-7)


@BOTH_TOKENS
def test_gradients_reach_exactly_the_trainable_parameters(tokens):
    model = tiny(tokens=tokens)
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    frozen = {"pos_embed"}
    if tokens == "performer":
        frozen |= {"tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert without == frozen
    assert all(model.get_parameter(name).grad is None for name in frozen)


def test_class_token_and_positions_are_not_decayed():
    model = tiny()
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    undecayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    assert any(p is model.cls_token for p in undecayed)


def test_drop_path_grows_linearly_to_its_rate():
    model = tiny(depth=5, drop_path_rate=0.2)
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in model.blocks]
    assert rates == [[], *([pytest.approx(rate)] * 2 for rate in (0.05, 0.1, 0.15, 0.2))]


@BOTH_TOKENS
def test_checkpointed_activations_give_the_same_gradients(tokens):
    model, picture, gradients = tiny(tokens=tokens, drop_rate=0.1), torch.randn(2, 3, 48, 48), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout in both passes
        model(picture).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointing_runs_token_layers_and_blocks_again_in_the_backward_pass():
    model, runs = tiny(), []
    layers = [model.tokens_to_token.attention1, model.tokens_to_token.attention2, *model.blocks]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    model.set_grad_checkpointing()
    model(torch.randn(1, 3, 48, 48)).sum().backward()
    assert [runs.count(layer) for layer in layers] == [2, 2, 2, 2]


@BOTH_TOKENS
def test_bf16_autocast_stays_finite(tokens):
    model = tiny(tokens=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(5 * torch.randn(2, 3, 48, 48))
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("splits", [SMALL_SPLITS, IMAGENET_SPLITS, ((4, 4, 0),)])
def test_number_of_soft_splits_is_free(splits):
    model = tiny(soft_splits=splits)
    layers = [name for name, _ in model.tokens_to_token.named_children() if name.startswith("attention")]
    assert layers == [f"attention{i}" for i in range(1, len(splits))]
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 10)
