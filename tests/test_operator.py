"""Every implementation of every regularizer against the paper's two lines in float64; plain cases bitwise identical."""

import pytest
import torch
import torch.nn.functional as F

from covering import pairwise
from dropkey import bernoulli, regularizers
from dropkey.config import schema
from dropkey.operator import attention, cpu, select_impl
from dropkey.operator.api import IMPLS
from dropkey.regularizers import REGULARIZERS, STRUCTURED, draw_mask

HERE = tuple(impl for impl in IMPLS if impl != "triton")  # that one: tests/test_triton.py
IMPLS_OF = {
    regularizer: HERE if REGULARIZERS[regularizer].masks_logits else ("reference",) for regularizer in REGULARIZERS
}
COMBINATIONS = [(regularizer, impl) for regularizer in REGULARIZERS for impl in IMPLS_OF[regularizer]]
EVERY = pytest.mark.parametrize(("regularizer", "impl"), COMBINATIONS)
ON_LOGITS = pytest.mark.parametrize(
    ("regularizer", "impl"), [c for c in COMBINATIONS if REGULARIZERS[c[0]].masks_logits]
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def every_with(names, *parameters):
    """Every regularizer and implementation, with all pairs of the other parameters."""
    combinations = [(*first, *others) for first, *others in pairwise(COMBINATIONS, *parameters)]
    return pytest.mark.parametrize(("regularizer", "impl", *names.split()), combinations, ids=str)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
GRIDS = {1: ((1, 1), 0), 5: ((2, 2), 1), 15: ((3, 5), 0), 49: ((7, 7), 0), 65: ((8, 8), 1), 197: ((14, 14), 1)}


def inputs(queries, keys, dtype=torch.float64, width=8):
    return [torch.randn(2, 3, n, width).to(dtype).requires_grad_() for n in (queries, keys, keys)]


def given(monkeypatch, drop):
    """Every implementation drops just this."""
    monkeypatch.setattr(regularizers, "seeded_mask", lambda *args, **kwargs: drop)
    monkeypatch.setattr(bernoulli, "draw_into", lambda out, *args: out.copy_(drop.view(out.shape)))  # in one piece
    monkeypatch.setattr(cpu, "EMPTY_CHANCE", -1.0)


def key_layout(regularizer, keys):
    grid, num_prefix = GRIDS[keys]
    return {"grid": grid, "num_prefix": num_prefix, "window": 3} if regularizer in STRUCTURED else {}


RATIO = round(0.3 * 2**32) / 2**32  # what 0.3 is in units of 2^-32


def paper(q, k, v, drop, *, regularizer="dropkey", ratio=RATIO, scale=None, bias=None, penalty=-1e12):
    """The two lines, for any regularizer, in float64: penalty on dropped logits, softmax."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + (penalty * ~bias if bias.dtype == torch.bool else bias.double())
    if REGULARIZERS[regularizer].masks_logits:
        return (logits + penalty * drop).softmax(-1) @ v
    weights = logits.softmax(-1) * ~drop
    if regularizer == "dropout":
        return weights / (1 - ratio) @ v
    total = weights.sum(-1, keepdim=True).detach()
    return weights / torch.where(total > 0, total, 1) @ v


def gradients(out, towards, tensors):
    return [g.double() for g in torch.autograd.grad((out.double() * towards).sum(), tensors)]


def assert_parity(tensors, drop, run, *, dtype=torch.float64, allowed=None, extra=(), **arguments):
    """`run()` gives the paper's values and gradients; queries without any key are 0 in both."""
    allowed = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    has_keys = (~drop & allowed).any(-1, keepdim=True).expand(*tensors[0].shape[:-1], 1)
    towards = torch.randn(has_keys.shape[:-1] + tensors[2].shape[-1:], dtype=torch.float64)
    out, wanted = run(), torch.where(has_keys, paper(*tensors, drop, **arguments), 0)
    assert out.dtype == dtype
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double(), wanted, **near)
    tensors = [*tensors, *extra]
    for ours, theirs in zip(gradients(out, towards, tensors), gradients(wanted, towards, tensors), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, **near)


# ---- the paper's two lines


@every_with("sizes dtype", [(1, 1), (5, 5), (49, 49), (65, 65), (197, 197), (1, 65), (7, 15)], DTYPES)
def test_values_and_gradients_are_those_of_the_paper(regularizer, impl, sizes, dtype):
    queries, keys = sizes
    tensors, layout = inputs(queries, keys, dtype), key_layout(regularizer, keys)
    torch.manual_seed(1)
    drop = draw_mask(regularizer, (2, 3, queries, keys), 0.3, **layout)

    def run():
        torch.manual_seed(1)
        return attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, **layout)

    assert_parity(tensors, drop, run, dtype=dtype, regularizer=regularizer)


BIASES = {
    "additive": lambda: torch.randn(2, 3, 7, 15, dtype=torch.float64),
    "additive, shared by samples": lambda: torch.randn(1, 3, 7, 15, dtype=torch.float64),
    "additive, shared by all": lambda: torch.randn(7, 15, dtype=torch.float64),
    "boolean": lambda: torch.rand(2, 3, 7, 15) < 0.6,
    "boolean, padded keys": lambda: (torch.arange(15) < 11).expand(2, 1, 1, 15),
}


@every_with("bias scale", BIASES, [None, 0.7])
def test_bias_and_scale_enter_as_in_the_paper(regularizer, impl, bias, scale):
    tensors, layout, bias = inputs(7, 15), key_layout(regularizer, 15), BIASES[bias]()
    boolean = bias.dtype == torch.bool
    torch.manual_seed(1)
    drop = draw_mask(regularizer, (2, 3, 7, 15), 0.3, **layout)

    def run():
        torch.manual_seed(1)
        return attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, bias=bias, scale=scale, **layout)

    extra = () if boolean else (bias.requires_grad_(),)
    allowed = bias if boolean else None
    assert_parity(tensors, drop, run, allowed=allowed, extra=extra, regularizer=regularizer, bias=bias, scale=scale)


@ON_LOGITS
def test_a_penalty_of_a_trillionth_instead_of_a_trillion_would_be_noticed(monkeypatch, regularizer, impl):
    tensors, drop = inputs(49, 49), torch.rand(2, 3, 49, 49) < 0.3
    given(monkeypatch, drop)
    out = attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl)
    assert (out - paper(*tensors, drop, penalty=-1e-12)).abs().max() > 0.1


@ON_LOGITS
def test_a_dropped_key_has_no_influence_at_all(monkeypatch, regularizer, impl):
    """Not even the share of attention that a key of logit 0 would take."""
    (q, k, v), drop = inputs(7, 15), torch.zeros(2, 3, 7, 15, dtype=torch.bool)
    drop[..., 4] = True
    given(monkeypatch, drop)
    without = [torch.cat([x[..., :4, :], x[..., 5:, :]], dim=-2) for x in (k, v)]
    out = attention(q, k, v, regularizer=regularizer, ratio=0.3, impl=impl)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *without), rtol=0, atol=1e-12)


@ON_LOGITS
def test_attention_stays_a_probability_distribution(regularizer, impl):
    q, k, v = inputs(65, 65)
    out = attention(
        q, k, torch.ones_like(v), regularizer=regularizer, ratio=0.5, impl=impl, **key_layout(regularizer, 65)
    )
    torch.testing.assert_close(out, torch.ones_like(v), rtol=0, atol=1e-12)


@ON_LOGITS
def test_masking_before_the_softmax_is_masking_after_it_and_renormalising(regularizer, impl):
    tensors, layout = inputs(65, 65), key_layout(regularizer, 65)
    torch.manual_seed(1)
    drop = draw_mask(regularizer, (2, 3, 65, 65), 0.3, **layout)
    q, k, v = tensors
    weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1).masked_fill(drop, 0)
    after = weights / weights.sum(-1, keepdim=True) @ v
    torch.manual_seed(1)
    before = attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, **layout)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    towards = torch.randn_like(after)
    for ours, theirs in zip(gradients(before, towards, tensors), gradients(after, towards, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@EVERY
def test_each_call_draws_another_mask(regularizer, impl):
    tensors, layout = inputs(49, 49), key_layout(regularizer, 49)
    first, second = (attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, **layout) for _ in range(2))
    assert not torch.equal(first, second)


# ---- queries without keys, and other strains


def one_query_loses_all(bias_kind):
    """Mask and bias for 2 samples, 3 heads, 7 queries, 15 keys; query 2 of (0, 0) is left without a key."""
    drop, bias = torch.rand(2, 3, 7, 15) < 0.3, None
    if bias_kind is None:
        drop[0, 0, 2] = True
    else:
        bias = torch.ones(2, 3, 7, 15, dtype=torch.bool)
        bias[0, 0, 2] = False
        if bias_kind == "additive":
            bias = torch.zeros(2, 3, 7, 15).masked_fill(~bias, -torch.inf)
    return drop, bias


@every_with("bias_kind dtype", [None, "boolean", "additive", "additive with gradient"], DTYPES)
def test_a_query_without_keys_attends_to_nothing(monkeypatch, regularizer, impl, bias_kind, dtype):
    (q, k, v), (drop, bias) = inputs(7, 15, dtype), one_query_loses_all(bias_kind and bias_kind.split()[0])
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(dtype).requires_grad_(bias_kind == "additive with gradient")
    given(monkeypatch, drop)
    out = attention(q, k, v, regularizer=regularizer, ratio=0.3, impl=impl, bias=bias)
    assert not out[0, 0, 2].any()
    assert out.isfinite().all()
    trained = [q, k, v] + ([bias] if bias is not None and bias.requires_grad else [])
    grads = torch.autograd.grad(out.float().square().sum() + out.float().sum(), trained)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0, 0, 2].any()


@pytest.mark.fault(23)
@every_with("dtype", DTYPES)
def test_all_keys_of_all_queries_dropped_is_zero_with_zero_gradients(monkeypatch, regularizer, impl, dtype):
    tensors = inputs(7, 15, dtype)
    given(monkeypatch, torch.ones(2, 3, 7, 15, dtype=torch.bool))
    out = attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), tensors))


@every_with("ratio dtype", [0.3, 0.7, 0.95], DTYPES)
def test_peaked_attention_stays_finite(regularizer, impl, ratio, dtype):
    """Logits of some hundreds, few of them kept."""
    q, k, v = inputs(15, 15, dtype)
    out = attention(15 * q, 5 * k, v, regularizer=regularizer, ratio=ratio, impl=impl, **key_layout(regularizer, 15))
    grads = torch.autograd.grad((0.1 * out.float()).square().sum(), [q, k, v])
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@EVERY
def test_bf16_autocast_is_near_fp32(regularizer, impl):
    tensors, layout = inputs(65, 65, torch.float32), key_layout(regularizer, 65)
    bias, outs = torch.randn(1, 3, 65, 65), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, bias=bias, **layout)
        outs.append(out.float())
    torch.testing.assert_close(outs[1], outs[0], rtol=0.05, atol=0.05)


# ---- plain attention


PLAIN = {
    "ratio 0": lambda regularizer: {"regularizer": regularizer, "ratio": 0.0},
    "evaluation": lambda regularizer: {"regularizer": regularizer, "ratio": 0.3, "training": False},
    "none": lambda regularizer: {"regularizer": "none", "ratio": 0.3},
}


@pytest.mark.fault(23)
@every_with("plain dtype", PLAIN, [torch.float32, torch.bfloat16, torch.float16])
def test_plain_attention_is_torchs_bitwise(regularizer, impl, plain, dtype):
    tensors, towards = inputs(65, 65, dtype), torch.randn(2, 3, 65, 8)
    arguments = PLAIN[plain](regularizer) | ({} if plain == "none" else {"impl": impl})
    ours, wanted = attention(*tensors, **arguments), F.scaled_dot_product_attention(*tensors)
    assert torch.equal(ours, wanted)
    pairs = zip(gradients(ours, towards, tensors), gradients(wanted, towards, tensors), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("plain", "bias"), pairwise(PLAIN, BIASES))
def test_plain_attention_takes_bias_and_scale(plain, bias):
    tensors, bias = inputs(7, 15), BIASES[bias]()
    wanted = F.scaled_dot_product_attention(*tensors, attn_mask=bias, scale=0.7)
    assert torch.equal(attention(*tensors, bias=bias, scale=0.7, **PLAIN[plain]("dropkey")), wanted)


@pytest.mark.parametrize("plain", PLAIN)
def test_plain_attention_draws_no_random_numbers(plain):
    tensors, before = inputs(7, 15), torch.get_rng_state()
    attention(*tensors, **PLAIN[plain]("dropkey"))
    assert torch.equal(torch.get_rng_state(), before)


# ---- refusals and choices


@pytest.mark.fault(23)
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("training", [True, False])
def test_a_ratio_outside_zero_to_one_is_refused(ratio, training):
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        attention(*inputs(5, 5), ratio=ratio, training=training)


@pytest.mark.parametrize("arguments", [{}, {"training": False}, {"ratio": 0.0}])
def test_an_unknown_regularizer_is_refused_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match="no regularizer 'dropkeys'; choose from none, dropout, dropkey"):
        attention(*inputs(5, 5), **{"regularizer": "dropkeys", "ratio": 0.3} | arguments)


@pytest.mark.parametrize("arguments", [{}, {"training": False}, {"ratio": 0.0}])
def test_an_unknown_impl_is_refused(arguments):
    with pytest.raises(ValueError, match="no impl 'flash'; choose from auto, reference, cpu, triton, sdpa"):
        attention(*inputs(5, 5), **{"impl": "flash", "ratio": 0.3} | arguments)


@pytest.mark.parametrize("arguments", [{}, {"training": False}, {"ratio": 0.0}])
@pytest.mark.parametrize(
    "regularizer", [regularizer for regularizer in REGULARIZERS if not REGULARIZERS[regularizer].masks_logits]
)
def test_an_impl_asked_for_and_impossible_is_refused(regularizer, arguments):
    with pytest.raises(ValueError, match=f"impl=sdpa masks logits, but {regularizer}"):
        attention(*inputs(5, 5), **{"regularizer": regularizer, "impl": "sdpa", "ratio": 0.3} | arguments)


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_structured_regularizers_without_a_grid_are_refused(regularizer):
    with pytest.raises(ValueError, match="needs grid"):
        attention(*inputs(5, 5), regularizer=regularizer, ratio=0.3, window=3)


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_structured_masks_are_left_to_sdpa_where_triton_is_asked_for(regularizer):
    with pytest.raises(ValueError, match="impl=triton draws dropkey and dropkey_column only; use impl=sdpa"):
        attention(*inputs(5, 5), regularizer=regularizer, ratio=0.3, impl="triton", **key_layout(regularizer, 5))


@pytest.mark.parametrize(
    ("regularizer", "impl"), [(name, impl) for name, impl in COMBINATIONS if name in STRUCTURED], ids=str
)
def test_a_relative_window_is_that_number_of_cells(regularizer, impl):
    tensors, found = inputs(7, 50), []
    for window in (0.4, 3):  # of 7 x 7
        layout = {"grid": (7, 7), "num_prefix": 1, "window": window}
        out = attention(*tensors, regularizer=regularizer, ratio=0.3, impl=impl, seed=5, **layout)
        found.append([out, *gradients(out, torch.ones_like(out), tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("regularizer", STRUCTURED)
def test_a_relative_window_of_a_single_cell_is_refused(regularizer):
    with pytest.raises(ValueError, match=r"window=0\.4 of a grid of 2 x 2 is a single cell"):
        attention(*inputs(5, 5), regularizer=regularizer, ratio=0.3, grid=(2, 2), num_prefix=1, window=0.4)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_auto_stands_for_an_impl_that_can(regularizer):
    assert select_impl("auto", regularizer, *inputs(5, 5)) in IMPLS_OF[regularizer]


@pytest.mark.parametrize(
    ("keys", "dtype", "wanted"),
    [(197, torch.float32, "cpu"), (577, torch.float32, "sdpa"), (577, torch.bfloat16, "cpu")],
    ids=str,
)
def test_auto_takes_what_is_fastest_on_a_cpu(keys, dtype, wanted):
    assert select_impl("auto", "dropkey", *inputs(1, keys, dtype)) == wanted


def test_the_impls_are_those_of_the_config():
    assert ("auto", *IMPLS) == schema.IMPLS


# ---- the CPU's ways through memory


ORDERS = pairwise(
    [1, 2 * 7 * 15 * 4, 1 << 20],
    [(2, 3), (3, 2)],
    [False, True],
    ["dropkey", "dropkey_column", "dropkey_block_column"],
    [None, *BIASES],
)


@pytest.mark.parametrize(("cache", "sizes", "transposed", "regularizer", "bias"), ORDERS)
def test_the_order_of_computation_changes_nothing(monkeypatch, cache, sizes, transposed, regularizer, bias):
    """All at once, or a few samples of a head at a time, or a few heads of a sample."""
    batch, heads = sizes
    shapes = [(batch, heads, n, 8) for n in (7, 15, 15)]
    if transposed:
        tensors = [torch.randn(b, n, h, d, dtype=torch.float64).transpose(1, 2) for b, h, n, d in shapes]
    else:
        tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors = [x.detach().requires_grad_() for x in tensors]
    trained, bias = list(tensors), BIASES[bias]() if bias else None
    if bias is not None and bias.dim() == 4 and bias.shape[:2] != (1, 1):
        bias = bias[:1, :, :].expand(1, 3, 7, 15)[:, :heads].contiguous()
    if bias is not None and bias.dtype != torch.bool:
        trained.append(bias.requires_grad_())
    towards, found = torch.randn(batch, heads, 7, 8, dtype=torch.float64), []
    for small in (1 << 30, 0):
        monkeypatch.setattr(cpu, "JOIN_BYTES", small)
        monkeypatch.setattr(cpu, "CACHE_BYTES", cache)
        monkeypatch.setattr(cpu, "DRAWS", 1 << 17 if small else cache // 8)
        layout = key_layout(regularizer, 15)
        out = attention(*tensors, regularizer=regularizer, ratio=0.3, impl="cpu", bias=bias, seed=5, **layout)
        found.append([out, *gradients(out, towards, trained)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
