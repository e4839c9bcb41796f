"""Models of one's own: attention written with nn.Softmax and einops is covered by itself, other attention by name, and
nothing that looks like attention is left out in silence."""

import copy
import pickle
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

import dropkey

WIDTH, HEADS, TOKENS = 8, 2, 5


class Attend(nn.Module):
    """Multi-head attention with a module for its softmax, as many write it after vit-pytorch."""

    heads = HEADS

    def __init__(self, dropout=0.0):
        super().__init__()
        self.scale = (WIDTH // self.heads) ** -0.5
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout))

    def heads_of(self, x):
        return (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in self.to_qkv(x).chunk(3, dim=-1))

    def forward(self, x):
        q, k, v = self.heads_of(x)
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale)
        weights = self.dropout(weights)
        return self.to_out(rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)"))


class Nested(Attend):
    """In one expression, softmax under another name, products by einops."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.normalise, self.attend = self.attend, None

    def forward(self, x):
        q, k, v = self.heads_of(x)
        logits = einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale
        return self.to_out(rearrange(self.dropout(self.normalise(logits)) @ v, "b h n d -> b n (h d)"))


class InOne(Attend):
    """Softmax and dropout in one nn.Sequential."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.attend = nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(dropout))

    def forward(self, x):
        q, k, v = self.heads_of(x)
        weights = self.attend(torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale)
        return self.to_out(rearrange(torch.einsum("b h i j, b h j d -> b h i d", weights, v), "b h n d -> b n (h d)"))


class NoDropout(Attend):
    """One head, no dropout of weights; as many tokens as channels, so that all shapes are alike."""

    heads = 1

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(self.attend(q @ k.transpose(-1, -2) * self.scale) @ v)


class Functional(Attend):
    """The softmax is a function: it could be any, so this one has to be named."""

    def forward(self, x):
        q, k, v = self.heads_of(x)
        weights = self.dropout((q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1))
        return self.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))


class Fused(Attend):
    def forward(self, x):
        return self.to_out(rearrange(F.scaled_dot_product_attention(*self.heads_of(x)), "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), attention, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x).relu()


class Model(nn.Module):
    """Blocks of the given attention, and a linear classifier, or what follows the mean over tokens."""

    def __init__(self, *attention, head=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(each) for each in attention)
        self.head = head or nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


STYLES = [Attend, Nested, InOne, NoDropout]
STYLE = pytest.mark.parametrize("style", STYLES)


def tokens(style=Attend):
    return torch.randn(2, WIDTH if style is NoDropout else TOKENS, WIDTH)


def apply(model, ratio=0.4, schedule="constant", **others):
    """No warning unless the test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dropkey.apply(model, "dropkey", ratio, schedule, **others)


def run(model, x, seed=1):
    torch.manual_seed(seed)
    return model(x)


def step(function, x, model):
    model.zero_grad()
    out = run(function, x)
    out.square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- softmax as a module, between two products: covered by itself


@STYLE
def test_it_is_found_by_itself(style):
    report = apply(Model(style(), style()))
    found = [("blocks.0.attn", "self", "softmax"), ("blocks.1.attn", "self", "softmax")]
    assert [(layer.name, layer.kind, layer.mechanism) for layer in report.layers] == found
    assert report.skipped == []


class MaskedSoftmax(nn.Module):
    """The paper's words: 1e12 less on dropped logits, then softmax."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks

    def forward(self, logits):
        drop = next(self.masks).view(logits.shape)
        return (logits - 1e12 * drop.double()).softmax(-1) * ~drop.all(-1, keepdim=True)


@STYLE
def test_values_and_gradients_are_those_of_masked_logits(style, drawn):
    model, x = Model(style(), style()).double(), tokens(style).double()
    plain = copy.deepcopy(model)
    apply(model)
    ours = step(model, x, model)
    assert len(drawn.masks) == 2 and all(mask.any() for mask in drawn.masks)
    masked = MaskedSoftmax(iter(drawn.masks))
    for block in plain.blocks:
        setattr(block.attn, "normalise" if style is Nested else "attend", masked)
    torch.testing.assert_close(ours, step(plain, x, plain), rtol=0, atol=1e-12)


@STYLE
def test_evaluation_and_state_dict_do_not_change(style):
    model, x = Model(style(0.5)).eval(), tokens(style)
    before, keys = model(x), list(model.state_dict())
    apply(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys


@STYLE
def test_undo_restores_class_text_and_training(style):
    model, x = Model(style(0.5)), tokens(style)
    text, before = repr(model), [value.clone() for value in step(model, x, model)]
    apply(model)
    dropkey.undo(model)
    assert repr(model) == text and type(model.blocks[0].attn) is style
    assert equal(step(model, x, model), before)


@STYLE
def test_dropout_of_weights_is_replaced_and_that_of_the_output_stays(style):
    model, x = Model(style(0.5)), tokens(style)
    wanted = copy.deepcopy(model)
    wanted.blocks[0].attn.dropout = nn.Identity()
    if style is InOne:
        wanted.blocks[0].attn.attend = nn.Softmax(dim=-1)
    apply(model, ratio=0.0)
    assert torch.equal(run(model, x), run(wanted, x))
    assert not torch.equal(run(model, x, seed=1), run(model, x, seed=2)), "the output has no dropout"


@STYLE
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_alike(style, copy_of):
    model, x = Model(style()), tokens(style)
    apply(model)
    twin = copy_of(model)
    assert equal(step(twin, x, twin), step(model, x, model))


@STYLE
def test_compiled_without_graph_breaks_it_trains_alike(style):
    model, x = Model(style()), tokens(style)
    apply(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(step(compiled, x, model), step(model, x, model))


def test_beside_a_fused_block_all_blocks_are_covered():
    report = apply(Model(Fused(), Attend(), Nested(), InOne()))
    assert [layer.mechanism for layer in report.layers] == ["fused", "softmax", "softmax", "softmax"]
    assert report.skipped == []


# ---- what is left out is listed, with the way to include it; attention with a warning


def test_half_a_model_is_covered_with_a_warning_of_one_line():
    model = Model(Fused(), Functional(), Functional(), Functional())
    with pytest.warns(UserWarning) as seen:
        report = dropkey.apply(model)
    assert [layer.name for layer in report.layers] == ["blocks.0.attn"]
    assert [name for name, _ in report.skipped] == [f"blocks.{i}.attn" for i in (1, 2, 3)]
    reason = r"it runs a softmax between two matrix products, as attention does; to include it: softmax=('Functional',)"
    assert {each for _, each in report.skipped} == {reason}
    (message,) = (str(each.message) for each in seen)
    assert message.startswith("dropkey.apply left out 3 of 4 modules that look like attention; blocks.1.attn: it runs")
    assert "\n" not in message and seen[0].filename == __file__


def test_what_the_reason_says_includes_it(drawn):
    model, x = Model(Fused(), Functional(0.5)).double(), tokens().double()
    report = apply(model, softmax=("Functional",))
    assert [layer.mechanism for layer in report.layers] == ["fused", "softmax"] and report.skipped == []
    model(x)
    assert len(drawn.masks) == 2


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        ("Functional", [0, 1, 2]),
        (("Functional",), [0, 1, 2]),
        (("blocks.1.attn",), [1]),
        (("blocks.0.attn", "blocks.2.attn"), [0, 2]),
        (("blocks.*.attn",), [0, 1, 2]),
        (["Func*"], [0, 1, 2]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*look like attention")
def test_classes_and_modules_are_named(named, taken):
    report = dropkey.apply(Model(Functional(), Functional(), Functional()), softmax=named)
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.attn" for i in taken]


@pytest.mark.parametrize("name", ["Funktional", "blocks.7.attn", "attn"])
def test_a_name_that_nothing_has_is_refused_and_the_model_stays_as_it_was(name):
    model = Model(Fused(), Functional())
    text = repr(model)
    with pytest.raises(ValueError, match=f"softmax='{name}' is neither the class nor the dotted name of a module of"):
        dropkey.apply(model, softmax=("Functional", name))
    assert repr(model) == text


def test_a_named_module_of_other_layers_is_refused():
    class CrossAttention(Functional):
        pass

    with pytest.raises(ValueError, match=r"softmax='CrossAttention': cross attention is not among layers="):
        dropkey.apply(Model(Fused(), CrossAttention()), softmax=("CrossAttention",))


def test_a_name_holds_for_one_call():
    model = Model(Fused(), Functional())
    apply(model, softmax=("Functional",))
    with pytest.warns(UserWarning, match="look like attention"):
        assert len(dropkey.apply(model).layers) == 1


def test_a_model_that_is_left_out_whole_is_refused_with_the_way_to_include_it():
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn, it runs a softmax.*to include it: softmax=\('Functional',\)"
    ):
        dropkey.apply(Model(Functional(), head=nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(dim=-1))))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x):
        shares = F.softmax(self.gate(x), dim=-1)
        return torch.einsum("be,bef->bf", shares, torch.einsum("bd,edf->bef", x, self.experts))


HEADS_WITHOUT_ATTENTION = {
    "head.1": lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(dim=-1)),
    "head": Router,
}


@pytest.mark.parametrize("name", HEADS_WITHOUT_ATTENTION)
def test_other_softmaxes_are_listed_for_what_they_are_without_a_warning(name):
    report = apply(Model(Fused(), head=HEADS_WITHOUT_ATTENTION[name]()))
    ((skipped, reason),) = report.skipped
    assert skipped == name and "of a classifier, a router or a gate" in reason
    assert f"  {name:<36} skipped: a softmax, but not" in str(report)


def test_the_softmax_of_covered_attention_is_not_listed_beside_it():
    model = Model(Functional())
    model.blocks[0].attn.attn_drop = nn.Identity()  # it is found by that; its `attend` is never called
    assert apply(model).skipped == []


class Flex(Attend):
    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        return self.to_out(rearrange(flex_attention(*self.heads_of(x)), "b h n d -> b n (h d)"))


class FlexOrNot(Attend):
    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.heads_of(x)
        out = flex_attention(q, k, v) if x.is_cuda else (q @ k.mT).softmax(-1) @ v
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class HandmadeAttention(Attend):
    def forward(self, x):
        q, k, v = self.heads_of(x)
        weights = (q @ k.transpose(-1, -2)).exp()
        return self.to_out(rearrange(weights / weights.sum(-1, keepdim=True) @ v, "b h n d -> b n (h d)"))


class OwnSoftmax(Attend):
    def __init__(self):
        super().__init__()
        self.attend = type("Sharp", (nn.Module,), {"forward": lambda self, x: torch.softmax(3 * x, -1)})()


class InHelpers(Attend):
    """Neither product nor softmax stand in forward itself."""

    def forward(self, x):
        return self.to_out(rearrange(self.mix(*self.heads_of(x)), "b h n d -> b n (h d)"))

    def mix(self, q, k, v):
        return torch.stack([softmax_of_products(q, k) @ each for each in (v,)])[0]


def softmax_of_products(q, k):
    return nn.Softmax(dim=-1)(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)).unflatten(0, q.shape[:2])


LEFT_OUT = {
    Flex: "flex_attention takes no mask for each head and query; call scaled_dot_product_attention instead",
    FlexOrNot: "flex_attention takes no mask for each head and query; call scaled_dot_product_attention instead, or "
    "where it runs a softmax of its own: softmax=('FlexOrNot',)",
    HandmadeAttention: "it is called attention, but its forward shows neither a softmax nor a fused attention",
    OwnSoftmax: "it runs a softmax between two matrix products",
    InHelpers: "it runs a softmax between two matrix products",
}


@pytest.mark.parametrize("attention", LEFT_OUT)
def test_what_looks_like_attention_is_left_out_with_a_warning_and_a_reason(attention):
    with pytest.warns(UserWarning, match="left out 1 of 2 modules that look like attention; blocks.1.attn: "):
        report = dropkey.apply(Model(Fused(), attention()))
    ((name, reason),) = report.skipped
    assert name == "blocks.1.attn" and reason.startswith(LEFT_OUT[attention])


@pytest.mark.parametrize("attention", [OwnSoftmax, InHelpers, Functional, FlexOrNot])
def test_named_it_trains_with_masks(attention, drawn):
    model = Model(attention())
    apply(model, softmax=(attention.__name__,))
    model(tokens())
    assert len(drawn.masks) == 1


def test_a_named_module_whose_softmax_is_over_another_dimension_raises_in_training():
    class OverQueries(Attend):
        def forward(self, x):
            return (x @ x.mT).softmax(dim=1) @ x

    model = Model(OverQueries())
    apply(model, softmax=("OverQueries",))
    with pytest.raises(RuntimeError, match=r"OverQueries called neither .* nor a softmax over the last dimension"):
        model(tokens())


def test_a_fused_call_in_a_helper_is_found_and_regularized(drawn):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    class Delegating(Attend):
        def forward(self, x):
            return self.to_out(rearrange(attend(*self.heads_of(x)), "b h n d -> b n (h d)"))

    model = Model(Delegating())
    assert [layer.mechanism for layer in apply(model).layers] == ["fused"]
    model(tokens())
    assert len(drawn.masks) == 1


def test_code_without_a_source_file_is_read_too():
    names = {"Attend": Attend}
    exec("class Typed(Attend):\n    def forward(self, x): return (x @ x.mT).softmax(-1) @ self.to_out(x)", names)
    with pytest.warns(UserWarning, match=r"blocks\.1\.attn: it runs a softmax.*softmax=\('Typed',\)"):
        dropkey.apply(Model(Fused(), names["Typed"]()))


def test_an_overridden_forward_that_calls_no_parent_counts_alone():
    class Linear(Fused):
        def forward(self, x):
            return self.to_out(x)

    assert [layer.name for layer in apply(Model(Linear(), Fused())).layers] == ["blocks.1.attn"]


def test_attention_around_attention_is_left_out_with_a_warning(drawn):
    """One regularizer would act on the other's results."""

    class Both(Fused):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return super().forward(x) + self.inner(x, x, x)[0]

    model = Model(Both())
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn: it also contains blocks\.0\.attn\.inner"):
        assert [layer.name for layer in dropkey.apply(model).layers] == ["blocks.0.attn.inner"]
    model(tokens())
    assert len(drawn.masks) == 1


def test_a_forward_that_was_replaced_on_the_object_is_left_out_with_a_warning():
    """A subclass would never be asked."""
    model = Model(Fused(), Attend())
    attention = model.blocks[1].attn
    attention.forward = types.MethodType(Attend.forward, attention)
    with pytest.warns(UserWarning, match=r"blocks\.1\.attn: its forward is one of the object"):
        assert len(dropkey.apply(model).layers) == 1


def test_what_layers_leaves_out_is_listed_without_a_warning():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.cross_attn(x, x[:, :2], x[:, :2])[0]

    report = apply(Model(Fused(), Cross()))
    assert report.skipped == [("blocks.1.attn.cross_attn", "cross attention is not among layers=['self', 'class']")]


# ---- the report, asked again


def test_the_report_of_a_model_is_that_of_apply():
    model = Model(Fused(), Attend(), Functional(), head=Router())
    with pytest.warns(UserWarning):
        report = dropkey.apply(model, "dropkey", 0.2)
    assert dropkey.report(model) == report and str(dropkey.report(model)) == str(report)
    assert dropkey.report(copy.deepcopy(model)) == report


def test_the_report_shows_the_ratios_and_the_schedule_of_now():
    model, other = Model(Attend(), Fused(), Attend()), Model(Attend(), Fused(), Attend())
    apply(model, 0.3, "decreasing")
    dropkey.set_ratio(model, 0.1)
    assert [layer.ratio for layer in dropkey.report(model).layers] == [0.1, 0.05, 0.0]
    dropkey.set_ratio(model, 0.2, "constant")
    assert dropkey.report(model) == apply(other, 0.2, "constant")
    dropkey.set_ratio(model, 0.1)
    assert [layer.ratio for layer in dropkey.report(model).layers] == [0.1] * 3


def test_the_report_of_a_model_without_regularizer_says_so():
    model = Model(Attend())
    for change in (lambda: None, lambda: apply(model), lambda: dropkey.undo(model)):
        change()
    assert str(dropkey.report(model)) == "no regularizer: attention is unchanged" == str(dropkey.apply(model, "none"))


def test_the_report_names_layers_by_the_model_it_is_asked_for():
    model = Model(Attend(), Functional())
    apply(model, softmax=("blocks.1.attn",))
    names = [layer.name for layer in dropkey.report(nn.Sequential(model)).layers]
    assert names == ["0.blocks.0.attn", "0.blocks.1.attn"]


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "softmax=" in code]
    exec(compile(code, "extending.md", "exec"), {"__name__": "example"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] + line.split()[-1:] for line in lines[1:]] == [
        ["0", "self", "0.1000"],
        ["2", "self", "0.0000"],
    ]
