"""scope="stack": the schedule runs once over each stack of layers, such as encoder and decoder."""

import pytest
import torch
from torch import nn

import dropkey
from dropkey.patching.patch import blocks_of
from tiny_models import vit, volo

LAYERS = ("self", "class", "cross")


def applied(model, scope, ratio=0.4, schedule="decreasing", layers=LAYERS, **others):
    report = dropkey.apply(model, "dropkey", ratio, schedule, layers=layers, scope=scope, **others)
    return [(layer.name, round(layer.ratio, 3)) for layer in report.layers]


def encoder_decoder():
    return nn.Transformer(16, 2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=16)


def test_each_stack_of_a_transformer_has_its_own_ramp():
    assert applied(encoder_decoder(), "stack") == [
        ("encoder.layers.0.self_attn", 0.4),
        ("encoder.layers.1.self_attn", 0.0),
        ("decoder.layers.0.self_attn", 0.4),
        ("decoder.layers.0.multihead_attn", 0.4),  # of the same block
    ]


def test_by_default_one_ramp_runs_over_the_model():
    model = encoder_decoder()
    ratios = [ratio for _, ratio in applied(model, "model")]
    assert ratios == [0.4, 0.267, 0.133, 0.0]
    report = dropkey.apply(model, "dropkey", 0.4, layers=LAYERS)
    assert [round(layer.ratio, 3) for layer in report.layers] == ratios


def test_set_ratio_keeps_the_stacks():
    model, wanted = encoder_decoder(), encoder_decoder()
    applied(model, "stack")
    dropkey.set_ratio(model, 0.2, "increasing", end=0.1)
    dropkey.apply(wanted, "dropkey", 0.2, "increasing", end=0.1, layers=LAYERS, scope="stack")
    assert dropkey.report(model) == dropkey.report(wanted)
    assert [layer.ratio for layer in dropkey.report(model).layers] == [0.1, 0.2, 0.2, 0.2]


def test_the_report_names_the_scope():
    model = encoder_decoder()
    applied(model, "stack")
    assert str(dropkey.report(model)).startswith("dropkey (decreasing in each stack) at 4 attention layers")


def test_in_a_model_of_one_stack_both_scopes_are_one():
    assert applied(vit(), "stack") == applied(vit(), "model")


def test_class_attention_of_volo_is_a_stack():
    ratios = dict(applied(volo(), "stack"))
    assert [ratios[name] for name in ("post_network.0.attn", "post_network.1.attn")] == [0.4, 0.0]
    assert [ratio for name, ratio in ratios.items() if name.startswith("network")] == [0.4, 0.2, 0.0]


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="no scope 'stacks'; choose from model, stack"):
        applied(vit(), "stacks")


@pytest.mark.parametrize(
    ("names", "stacks"),
    [
        (["blocks.0.attn", "blocks.1.attn"], ["blocks", "blocks"]),
        (["blocks.0.attn", "decoder_blocks.0.attn"], ["blocks", "decoder_blocks"]),
        (["m.0.enc.0.attn", "m.0.enc.1.attn", "m.0.dec.0.attn"], ["m.0.enc", "m.0.enc", "m.0.dec"]),
        (["layers.0.blocks.0.attn", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"], ["layers"] * 3),
        (["encoder.attn", "decoder.attn", "decoder.cross_attn"], ["encoder", "decoder", "decoder"]),
        (["self_attn", "cross_attn"], ["", ""]),
        (["encoder.0.attn"], ["encoder.0"]),
        ([""], [""]),
    ],
)
def test_stacks_follow_from_names(names, stacks):
    found = [stack for stack, _ in blocks_of([(name, "self") for name in names], "stack")]
    assert [found.index(stack) for stack in found] == [stacks.index(stack) for stack in stacks]


@pytest.mark.parametrize(
    ("kinds", "blocks"),
    [
        ("self self self", [0, 1, 2]),
        ("self cross self cross", [0, 0, 1, 1]),
        ("cross cross", [0, 1]),
        ("self cross cross self", [0, 0, 1, 2]),
    ],
)
def test_cross_attention_belongs_to_the_block_before_it(kinds, blocks):
    layers = [(f"decoder.{number}", kind) for number, kind in enumerate(kinds.split())] + [("encoder.0", "self")]
    assert blocks_of(layers, "stack") == [*(("decoder", block) for block in blocks), ("encoder", 0)]


@pytest.mark.parametrize("part", ["encoder", "encoder.layers", "enc*", "encoder.layers.*.self_attn"])
def test_parts_of_the_model_are_named_by_words_of_their_dotted_names(part):
    report = dropkey.apply(encoder_decoder(), "dropkey", 0.4, layers=LAYERS, modules=[part])
    assert [layer.name for layer in report.layers] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert [layer.ratio for layer in report.layers] == [0.4, 0.0]  # counted are the layers taken
    reasons = {reason for name, reason in report.skipped if name.startswith("decoder")}
    assert reasons == {f"it is not within modules=['{part}']"}


def test_a_part_without_attention_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"modules='coder' holds no attention of .*; there are: encoder\.layers\.0\."):
        dropkey.apply(encoder_decoder(), modules=["encoder", "coder"])


def t5():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "dropout_rate": 0.0}
    return transformers.T5Model(transformers.T5Config(num_layers=2, num_decoder_layers=2, **sizes))


def test_stacks_of_t5(drawn):
    model = t5()
    assert applied(model, "stack", impl="reference") == [
        ("encoder.block.0.layer.0.SelfAttention", 0.4),
        ("encoder.block.1.layer.0.SelfAttention", 0.0),
        ("decoder.block.0.layer.0.SelfAttention", 0.4),
        ("decoder.block.0.layer.1.EncDecAttention", 0.4),
        ("decoder.block.1.layer.0.SelfAttention", 0.0),
        ("decoder.block.1.layer.1.EncDecAttention", 0.0),
    ]
    words = torch.randint(0, 20, (2, 7))
    model.train()(input_ids=words, decoder_input_ids=words[:, :5])
    assert [tuple(mask.shape[-2:]) for mask in drawn.masks] == [(7, 7), (5, 5), (5, 7)]


def test_stacks_of_detr():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(hidden_sizes=[8, 8], embedding_size=8, depths=[1, 1])
    backbone.out_features = ["stage2"]
    sizes = {f"{part}_{what}": 16 if what == "ffn_dim" else 2 for part in ("encoder", "decoder") for what in SIZES}
    model = transformers.DetrModel(transformers.DetrConfig(backbone_config=backbone, d_model=16, **sizes))
    ratios = [ratio for _, ratio in applied(model, "stack", layers=("self",))]
    assert ratios == [0.4, 0.0, 0.4, 0.0]


SIZES = ("layers", "ffn_dim", "attention_heads")
