"""Models of transformers: those that take their attention function from its registry, through sdpa and eager."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dropkey import patching

transformers = pytest.importorskip("transformers")

EVERY_LAYER = ("self", "class", "cross")
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BERT = WIDTHS | {"vocab_size": 20, "hidden_dropout_prob": 0.0}
DETR = {
    **{f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (("layers", 1), ("ffn_dim", 16))},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{"d_model": 16, "num_queries": 5, "dropout": 0.0},
}


def words():
    seen = torch.ones(2, 7, dtype=torch.long)
    seen[0, 4:] = 0
    return {"input_ids": torch.randint(0, 20, (2, 7)), "attention_mask": seen}


def pictures():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def vit(dropout=0.0):
    config = {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.0}
    return transformers.ViTModel(transformers.ViTConfig(**config, attention_probs_dropout_prob=dropout, **WIDTHS))


def bert(dropout=0.0):
    return transformers.BertModel(transformers.BertConfig(attention_probs_dropout_prob=dropout, **BERT))


def llama(dropout=0.0):
    """Causal, with four query heads on two heads of keys and values."""
    widths = WIDTHS | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20}
    return transformers.LlamaModel(transformers.LlamaConfig(attention_dropout=dropout, **widths))


def bart(dropout=0.0):
    config = {key: value for key, value in DETR.items() if key != "num_queries"}
    return transformers.BartModel(transformers.BartConfig(vocab_size=20, attention_dropout=dropout, **config))


def detr(dropout=0.0):
    backbone = transformers.ResNetConfig(hidden_sizes=[8, 8], embedding_size=8, depths=[1, 1])
    backbone.out_features = ["stage2"]
    config = transformers.DetrConfig(backbone_config=backbone, attention_dropout=dropout, **DETR)
    config._attn_implementation = "eager"  # its backbone has no other
    return transformers.DetrModel(config)


MODELS = {"ViT": (vit, pictures), "BERT": (bert, words), "Llama": (llama, words), "BART": (bart, words)}
MODELS["DETR"] = (detr, pictures)
KINDS = {
    "ViT": ["self"] * 2,
    "BERT": ["self"] * 2,
    "Llama": ["self"] * 2,
    "BART": ["self", "self", "cross"],
    "DETR": ["self", "self", "cross"],
}
MODEL = pytest.mark.parametrize("name", MODELS)
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def build(name, implementation="sdpa", **arguments):
    torch.manual_seed(0)
    model = MODELS[name][0](**arguments)
    for module in model.modules():  # the backbone of DETR would refuse set_attn_implementation
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train(), MODELS[name][1]()


def patched(model, ratio=0.3, **others):
    patching.apply(model, "dropkey", ratio, "constant", layers=EVERY_LAYER, impl="reference", **others)
    return model


def run(model, inputs, seed=1):
    torch.manual_seed(seed)
    return model(**inputs)[0]


def gradients(model, inputs):
    model.zero_grad()
    run(model, inputs).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@IMPLEMENTATION
@MODEL
def test_layers_kinds_and_mechanisms(name, implementation):
    model, _ = build(name, implementation)
    report = patching.apply(model, layers=EVERY_LAYER)
    mechanism = {"sdpa": "fused", "eager": "softmax"}[implementation]
    assert [(layer.kind, layer.mechanism) for layer in report.layers] == [(kind, mechanism) for kind in KINDS[name]]


@MODEL
def test_layers_are_listed_in_forward_order(name):
    model, inputs = build(name)
    order, layers = [], patching.apply(model, layers=EVERY_LAYER).layers
    for layer in layers:
        module = model.get_submodule(layer.name)
        module.register_forward_pre_hook(lambda *_, name=layer.name: order.append(name))
    run(model, inputs)
    assert order == [layer.name for layer in layers]


@IMPLEMENTATION
@MODEL
def test_evaluation_and_state_dict_are_unchanged_bitwise(name, implementation):
    model, inputs = build(name, implementation)
    before, keys = run(model.eval(), inputs), list(model.state_dict())
    patched(model)
    assert torch.equal(run(model, inputs), before)
    assert list(model.state_dict()) == keys


@IMPLEMENTATION
@MODEL
def test_without_a_ratio_training_is_that_of_the_unpatched_model_bitwise(name, implementation):
    model, inputs = build(name, implementation)
    before = run(model, inputs)
    assert torch.equal(run(patched(model, ratio=0.0), inputs), before)


def dense(masks):
    """scaled_dot_product_attention in the paper's words, each call with the next mask."""
    masks = iter(masks)

    def attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits, drop = q @ k.transpose(-2, -1) * scale, next(masks)
        allowed = torch.ones_like(drop).tril() if is_causal else torch.ones_like(drop)
        allowed = allowed & attn_mask if attn_mask is not None else allowed
        kept = allowed & ~drop
        weights = (logits - 1e12 * (~kept).double()).softmax(-1)
        return (weights * kept.any(-1, keepdim=True)) @ v

    return attention


@MODEL
def test_training_is_dropkey(monkeypatch, drawn, name):
    model, inputs = build(name)
    model = model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    plain = copy.deepcopy(model)
    out = run(patched(model), inputs)
    assert len(drawn.masks) == len(KINDS[name])
    monkeypatch.setattr(F, "scaled_dot_product_attention", dense(drawn.masks))
    torch.testing.assert_close(out, run(plain, inputs), rtol=1e-5, atol=1e-6)  # some steps of theirs are in fp32


@MODEL
def test_eager_and_sdpa_train_alike(name):
    trained = [gradients(patched(model), inputs) for model, inputs in (build(name, "sdpa"), build(name, "eager"))]
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


@IMPLEMENTATION
@pytest.mark.parametrize("ratio", [0.0, 0.3])
@MODEL
def test_dropout_of_attention_weights_is_replaced(name, ratio, implementation):
    outs = []
    for dropout in (0.5, 0.0):
        model, inputs = build(name, implementation, dropout=dropout)
        outs.append(run(patched(model, ratio), inputs))
    assert torch.equal(*outs)


@IMPLEMENTATION
def test_a_causal_query_that_lost_all_its_keys_gives_0(drawn, implementation):
    model, inputs = build("Llama", implementation)
    del inputs["attention_mask"]
    outs = []
    attention = patched(model, 0.8).layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: outs.append(arguments[0]))
    run(model, inputs)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    lost = ~(allowed & ~drawn.masks[0]).any(-1).transpose(1, 2)  # B Q H
    out = outs[0].unflatten(-1, (4, -1))
    assert 0 < lost.sum() < lost.numel()
    assert torch.equal((out == 0).all(-1), lost)


@IMPLEMENTATION
def test_padding_stays_unseen_by_a_query_that_lost_all_its_keys(implementation):
    model, inputs = build("BERT", implementation)
    patched(model, 0.9)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][0, 4:] = (other["input_ids"][0, 4:] + 1) % 20
    assert torch.equal(run(model, inputs)[0, :4], run(model, other)[0, :4])


# ---- implementations that take no mask


def test_kernels_that_take_no_mask_are_skipped_with_the_reason():
    model, _ = build("ViT", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 takes no mask for each head and query"):
        patching.apply(model)


FUNNEL = {"vocab_size": 20, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1]}


def test_attention_outside_the_registry_is_skipped_with_the_way_to_include_it(drawn):
    model = transformers.FunnelModel(transformers.FunnelConfig(**FUNNEL)).train()
    with pytest.raises(ValueError, match=r"to include it: softmax=\('FunnelRelMultiheadAttention',\)"):
        patching.apply(model)
    report = patching.apply(model, "dropkey", 0.3, "constant", softmax=("FunnelRelMultiheadAttention",))
    model(torch.randint(0, 20, (2, 8)))
    assert len(drawn.masks) == len(report.layers) == 4 and report.skipped == []


def test_the_router_of_a_mixture_of_experts_is_listed_for_what_it_is_without_a_warning(recwarn):
    widths = WIDTHS | {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20}
    model = transformers.MixtralModel(transformers.MixtralConfig(num_local_experts=2, **widths))
    skipped = dict(patching.apply(model).skipped)
    assert list(skipped) == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    assert all("a classifier, a router or a gate" in reason for reason in skipped.values())
    assert not [each for each in recwarn if "attention" in str(each.message)]


def test_a_model_whose_attention_was_switched_after_patching_raises():
    def silent(module, query, key, value, attention_mask, **_):
        return value.transpose(1, 2), None

    transformers.AttentionInterface.register("silent", silent)
    model, inputs = build("ViT")
    patched(model)
    model.set_attn_implementation("silent")
    with pytest.raises(RuntimeError, match="ViTAttention called neither scaled_dot_product_attention nor a softmax"):
        run(model, inputs)


# ---- undone, always on, copied, compiled, checkpointed


@MODEL
def test_undo_takes_everything_back(name):
    model, inputs = build(name, dropout=0.5)
    text, before = repr(model), run(model, inputs)
    patching.undo(patched(model))
    assert repr(model) == text
    assert torch.equal(run(model, inputs), before)


@IMPLEMENTATION
@MODEL
def test_always_on_acts_in_evaluation(name, implementation):
    model, inputs = build(name, implementation)
    before = run(patched(model).eval(), inputs)
    with patching.always_on(model):
        assert not torch.equal(run(model, inputs, seed=1), run(model, inputs, seed=2))
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("name", ["ViT", "BERT"])
def test_copies_train_alike(name):
    model, inputs = build(name)
    twin = copy.deepcopy(patched(model))
    assert torch.equal(run(twin, inputs), run(model, inputs))
    assert not torch.equal(run(twin, inputs, seed=1), run(twin, inputs, seed=2))


def test_a_saved_model_loads_as_ever(tmp_path):
    model, inputs = build("ViT")
    patched(model).save_pretrained(tmp_path)
    again = transformers.ViTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again.eval(), inputs), run(model.eval(), inputs))


def test_compiled_without_graph_breaks_it_trains_alike():
    model, inputs = build("ViT")
    patched(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["ViT", "BERT"])
def test_checkpointed_it_trains_alike(name):
    model, inputs = build(name)
    before = [gradient.clone() for gradient in gradients(patched(model), inputs)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, inputs), before)


def test_transformers_is_not_imported_for_other_models(monkeypatch):
    for file in Path(patching.__file__).parent.glob("*.py"):
        assert not re.search(r"^(import|from) transformers", file.read_text(), re.MULTILINE)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises
    patching.apply(torch.nn.TransformerEncoderLayer(8, 2))
