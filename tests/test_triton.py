"""The Triton kernels: the mask as defined, attention and its gradients as in the paper's two lines.

Without a GPU they run under Triton's interpreter (`conftest.py` asks for it); with one, the same tests run on it,
compiled.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from dropkey import bernoulli
from dropkey.operator import triton_ops
from dropkey.operator.tiling import CANDIDATES, HOPPER, NEVER, ROOMY, Tile, Tiling, tiling_for, using

pytest.importorskip("triton")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tile(16, 16, 2, 2)
TILINGS = {
    "several blocks of keys": Tiling(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), SMALL),
    "one block of keys": Tiling(Tile(64, 128, 4, 2), SMALL, Tile(32, 128, 4, 2), Tile(32, 128, 4, 2)),
}
EVERY_TILING = pytest.mark.parametrize("tiling", TILINGS)


# ---- helpers


def seed_of(number=1234567890123456789):
    return torch.tensor(number, device=DEVICE)


def threshold_of(ratio):
    return torch.tensor(min(round(ratio * 2**32), 2**32 - 1), device=DEVICE)


def inputs(batch, heads, queries, keys, width, dtype=torch.float32):
    torch.manual_seed(0)
    counts = (queries, keys, keys)
    return [torch.randn(batch, heads, n, width).to(DEVICE, dtype).requires_grad_() for n in counts]


def dropped(q, k, ratio, seed=None, column=False):
    """The mask that the kernels are to draw, by torch: B H Q K."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    rows = batch * heads * (1 if column else queries)
    mask = bernoulli.draw(seed_of() if seed is None else seed, threshold_of(ratio), rows, keys)
    return mask.view(batch, heads, -1, keys).expand(batch, heads, queries, keys)


def paper(q, k, v, drop, scale, bias=None):
    """In float64; a query without keys attends to nothing."""
    logits = scale * q.double() @ k.double().transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias.double()
    logits = logits.masked_fill(drop, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v.double()


TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_parity(tensors, ratio=0.3, bias=None, scale=0.25, column=False):
    """Values and gradients are the paper's under the same mask; returns the output and its gradients."""
    q, k, v = tensors
    out = triton_ops.triton_attention(q, k, v, seed_of(), threshold_of(ratio), scale=scale, bias=bias, column=column)
    wanted = paper(q, k, v, dropped(q, k, ratio, column=column), scale, bias)
    near = {"rtol": TOLERANCE[q.dtype], "atol": TOLERANCE[q.dtype]}
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), wanted, **near)
    trained = [*tensors, *([bias] if bias is not None and bias.requires_grad else [])]
    towards = torch.randn(out.shape).to(out)
    ours = torch.autograd.grad(out, trained, towards)
    theirs = torch.autograd.grad(wanted, trained, towards.double())
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, **near)
    return out, ours


# ---- the mask


@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(67, 40), (5, 300), (1, 1), (130, 65)])
def test_draws_are_those_of_torch(shape, ratio):
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        arguments = seed_of(seed), threshold_of(ratio), *shape
        found = triton_ops.draw(*arguments, first_column=7)
        assert torch.equal(found, bernoulli.draw(*arguments, first_column=7))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_draws(shape):
    assert triton_ops.draw(seed_of(), threshold_of(0.3), *shape).shape == shape


@pytest.mark.parametrize("column", [False, True], ids=["each query", "column"])
@EVERY_TILING
def test_the_keys_dropped_within_attention_are_those_of_the_mask(tiling, column):
    """With the unit matrix as values the output is the weights; with it as their gradient too, dv is, transposed."""
    q, k, v = inputs(1, 2, 64, 64, 64)
    v = torch.eye(64, device=DEVICE).expand(1, 2, 64, 64).clone().requires_grad_()
    with using(TILINGS[tiling]):
        weights = triton_ops.triton_attention(q, k, v, seed_of(), threshold_of(0.3), scale=0.01, column=column)
        (backward,) = torch.autograd.grad(weights, v, v.detach())
    drop = dropped(q, k, 0.3, column=column)
    assert torch.equal(weights == 0, drop)
    assert torch.equal(backward.transpose(-2, -1) == 0, drop)


# ---- the paper's two lines


SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 5, 5, 16),
    (1, 2, 49, 49, 48),
    (2, 1, 65, 65, 64),
    (1, 2, 1, 197, 32),
    (1, 1, 33, 70, 128),
    (1, 2, 40, 33, 24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_paper(shape):
    assert_parity(inputs(*shape))


@EVERY_TILING
@pytest.mark.parametrize("shape", [(1, 2, 5, 65, 16), (1, 2, 65, 5, 16)], ids=str)
def test_the_tiling_changes_nothing_but_rounding(shape, tiling):
    with using(TILINGS[tiling]):
        assert_parity(inputs(*shape))


def test_many_keys():
    tile = Tile(128, 128, 4, 2)
    with using(Tiling(tile, tile, tile, tile)):
        assert_parity(inputs(1, 1, 257, 577, 16))


HALVES = [torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]  # the interpreter's bf16 is wrong


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EVERY_TILING
def test_half_precision(tiling, dtype):
    with using(TILINGS[tiling]):
        assert_parity(inputs(1, 2, 65, 65, 64, dtype), scale=0.125)


@pytest.mark.parametrize(("ratio", "tiling"), list(zip([0.0, 0.05, 0.95], [*TILINGS, *TILINGS], strict=False)))
def test_every_ratio(tiling, ratio):
    with using(TILINGS[tiling]):
        assert_parity(inputs(1, 2, 20, 20, 16), ratio=ratio)


@EVERY_TILING
def test_column_dropping(tiling):
    with using(TILINGS[tiling]):
        assert_parity(inputs(2, 2, 20, 40, 16), column=True)


@pytest.mark.parametrize(("scale", "tiling"), list(zip([-0.5, 0.0, 2.0], [*TILINGS, *TILINGS], strict=False)))
def test_every_scale(tiling, scale):
    with using(TILINGS[tiling]):
        assert_parity(inputs(1, 2, 20, 20, 16), scale=scale)


BIASES = {
    "additive, shared by samples": lambda: torch.randn(1, 2, 20, 40),
    "additive, shared by all": lambda: torch.randn(20, 40),
    "additive, shared by heads and queries": lambda: torch.randn(2, 1, 1, 40),
    "additive, of each query": lambda: torch.randn(2, 2, 20, 1),
    "additive, one number": lambda: torch.randn(1),
    "boolean": lambda: torch.rand(2, 2, 20, 40) < 0.6,
    "boolean, padded keys": lambda: (torch.arange(40) < torch.tensor([[11], [40]])).view(2, 1, 1, 40),
    "boolean, expanded": lambda: (torch.arange(40) < 21).expand(2, 1, 1, 40),
}


# Each with one tiling; where the bias has a dimension or lacks it, with both.
BIAS_AND_TILING = list(zip(BIASES, itertools.cycle(TILINGS), strict=False))
BIAS_AND_TILING += [("additive, shared by all", "several blocks of keys"), ("boolean", "several blocks of keys")]


@pytest.mark.parametrize(("name", "tiling"), BIAS_AND_TILING)
def test_bias_and_its_gradient(name, tiling):
    torch.manual_seed(1)
    bias = BIASES[name]().to(DEVICE)
    if bias.dtype != torch.bool:
        bias.requires_grad_()
    with using(TILINGS[tiling]):
        assert_parity(inputs(2, 2, 20, 40, 16), bias=bias)


def test_the_gradient_of_a_transposed_bias():
    bias = torch.randn(40, 20, device=DEVICE).t().requires_grad_()
    assert_parity(inputs(2, 2, 20, 40, 16), bias=bias)


# ---- queries without keys, and other strains


@EVERY_TILING
def test_queries_that_lose_all_keys_give_zero_and_take_no_gradient(tiling):
    tensors = inputs(2, 2, 40, 3, 16)
    drop = dropped(*tensors[:2], 0.7)
    assert drop.all(-1).sum() > 20
    with using(TILINGS[tiling]):
        out, (dq, _, _) = assert_parity(tensors, ratio=0.7)
    assert torch.equal((out == 0).all(-1), drop.all(-1))
    assert not dq[drop.all(-1)].any()


@EVERY_TILING
def test_all_keys_of_all_queries_dropped_is_zero_with_zero_gradients(tiling):
    tensors = inputs(1, 2, 20, 40, 16)
    with using(TILINGS[tiling]):
        out = triton_ops.triton_attention(*tensors, seed_of(), threshold_of(1.0), scale=0.25)
        assert not out.any()
        assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("boolean", [True, False])
@EVERY_TILING
def test_a_query_that_may_attend_to_nothing(tiling, boolean):
    bias = torch.ones(1, 1, 20, 40, dtype=torch.bool, device=DEVICE)
    bias[0, 0, 3] = False
    bias[0, 0, 5, :33] = False  # its first blocks of keys are empty
    if not boolean:
        bias = torch.zeros(bias.shape, device=DEVICE).masked_fill(~bias, -torch.inf).requires_grad_()
    with using(TILINGS[tiling]):
        out, _ = assert_parity(inputs(1, 2, 20, 40, 16), bias=bias)
    assert not out[:, :, 3].any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in rows of keys that do not exist, never stored
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_peaked_attention_stays_finite(dtype):
    """Logits of some hundreds, few of them kept: the greatest logit must be sought among those."""
    tensors = [10 * x.detach() for x in inputs(1, 2, 30, 30, 16, dtype)]
    tensors = [x.requires_grad_() for x in tensors]
    out = triton_ops.triton_attention(*tensors, seed_of(), threshold_of(0.9), scale=0.25)
    wanted = paper(*tensors, dropped(*tensors[:2], 0.9), 0.25)
    torch.testing.assert_close(out.double(), wanted, rtol=0.02, atol=0.02 if dtype != torch.bfloat16 else 0.2)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # likewise
@EVERY_TILING
def test_logits_far_below_zero(tiling):
    """What lies beyond the last key has logit 0: on that scale infinitely more weight than any key."""
    q, k, v = inputs(1, 2, 20, 20, 16)
    q, k = ((x.detach() + shift).requires_grad_() for x, shift in ((q, 8), (k, -8)))
    with using(TILINGS[tiling]):
        out = triton_ops.triton_attention(q, k, v, seed_of(), threshold_of(0.3), scale=0.25)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(out.double(), paper(q, k, v, dropped(q, k, 0.3), 0.25), rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in grads)


def test_no_queries_and_no_keys():
    q, k, v = inputs(1, 2, 3, 0, 16)
    out = triton_ops.triton_attention(q, k, v, seed_of(), threshold_of(0.3), scale=1.0)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    assert triton_ops.triton_attention(*inputs(1, 2, 0, 3, 16), seed_of(), threshold_of(0.3), scale=1.0).shape == (
        1,
        2,
        0,
        16,
    )


# ---- without dropping


@EVERY_TILING
def test_without_a_seed_it_is_plain_attention(tiling):
    q, k, v = inputs(1, 2, 20, 40, 16)
    results = []
    with using(TILINGS[tiling]):
        for mask in ((None, None), (seed_of(), threshold_of(0.0))):
            out = triton_ops.triton_attention(q, k, v, *mask, scale=0.25)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(results[0][0], wanted, rtol=1e-5, atol=1e-5)


# ---- as an operator of torch


def test_tensors_as_a_vision_transformer_makes_them():
    """q, k and v lie interleaved in the output of one linear layer; the output is reshaped without a copy."""
    qkv = torch.randn(2, 20, 3 * 2 * 16, device=DEVICE, requires_grad=True)
    q, k, v = qkv.reshape(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    out = triton_ops.triton_attention(q, k, v, seed_of(), threshold_of(0.3), scale=0.25)
    wanted = paper(q, k, v, dropped(q, k, 0.3), 0.25)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-5, atol=2e-5)
    assert out.transpose(1, 2).is_contiguous()
    ours, theirs = (torch.autograd.grad(x.sum(), qkv)[0] for x in (out, wanted))  # the gradient of sum has no strides
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_tensors_whose_last_dimension_is_strided():
    q, k, v = (x.detach().transpose(-2, -1).contiguous().transpose(-2, -1) for x in inputs(1, 2, 20, 20, 16))
    assert_parity([x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("tiling", ["several blocks of keys"])
def test_gradients_are_bitwise_reproducible(tiling):
    bias = torch.randn(1, 2, 20, 1, device=DEVICE, requires_grad=True)
    tensors, results = [*inputs(2, 2, 20, 40, 16), bias], []
    for _ in range(2):
        with using(TILINGS[tiling]):
            out = triton_ops.triton_attention(*tensors[:3], seed_of(), threshold_of(0.3), scale=0.25, bias=bias)
            results.append(torch.autograd.grad(out.square().sum(), tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_seed_decides():
    tensors = inputs(1, 2, 20, 20, 16)
    outs = [triton_ops.triton_attention(*tensors, seed_of(seed), threshold_of(0.3), scale=0.25) for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_it_compiles_without_a_break():
    def run(q, k, v, seed, threshold, bias):
        return (
            triton_ops.triton_attention(2 * q, k, v, seed, threshold, scale=0.25, bias=bias).transpose(1, 2).flatten(2)
            + 1
        )

    tensors = [*inputs(1, 2, 5, 7, 16), torch.randn(1, 2, 5, 7, device=DEVICE, requires_grad=True)]
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = function(*tensors[:3], seed_of(), threshold_of(0.3), tensors[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("biased", [True, False])
def test_torch_accepts_the_operators(biased):
    q, k, v = inputs(1, 2, 5, 7, 16)
    bias, drawn = (torch.randn(1, 2, 5, 7, device=DEVICE), (seed_of(), threshold_of(0.3))) if biased else (None,) * 2
    drawn = drawn or (None, None)
    out, lse = (x.detach() for x in triton_ops.forward(q, k, v, bias, *drawn, 0.25, False))
    given = (torch.ones_like(out), *(x.detach() for x in (q, k, v)), bias, *drawn, out, lse, 0.25, False)
    torch.library.opcheck(triton_ops.backward, given)
    if biased:
        torch.library.opcheck(triton_ops.backward_bias, given)
        bias.requires_grad_()
    torch.library.opcheck(triton_ops.forward, (q, k, v, bias, *drawn, 0.25, False))


def test_torch_accepts_draws():
    torch.library.opcheck(triton_ops.draw, (seed_of(), threshold_of(0.3), 5, 7))


# ---- what it supports


REFUSED = {
    "float64": (lambda x: x.double(), "float64"),
    "a head too wide": (lambda x: x.repeat(1, 1, 1, 20), "256 wide, not 320"),
    "three dimensions": (lambda x: x[0], "B H Q D"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_compute_is_refused_with_a_reason(case):
    change, words = REFUSED[case]
    tensors = [change(x) for x in inputs(1, 2, 5, 5, 16)]
    assert words in triton_ops.triton_unsupported_reason(*tensors)
    with pytest.raises(ValueError, match=words):
        triton_ops.triton_attention(*tensors, seed_of(), threshold_of(0.3), scale=1.0)


def test_values_of_another_width_or_dtype_are_refused():
    q, k, v = inputs(1, 2, 5, 5, 16)
    assert "(1, 2, 5, 8)" in triton_ops.triton_unsupported_reason(q, k, v[..., :8])
    assert "one dtype" in triton_ops.triton_unsupported_reason(q, k, v.half())
    assert triton_ops.triton_unsupported_reason(q, k, v) is None


def test_without_triton_or_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(triton_ops, "interpreted", lambda: False)
    assert "not on cpu" in triton_ops.triton_unsupported_reason(*(x.cpu() for x in inputs(1, 2, 5, 5, 16)))
    monkeypatch.setattr(triton_ops, "triton_missing", lambda: True)
    assert "not installed" in triton_ops.triton_unsupported_reason(*inputs(1, 2, 5, 5, 16))


@pytest.mark.parametrize("shared_memory", [HOPPER, ROOMY - 1])
def test_every_call_has_a_tiling(shared_memory):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for keys, width, dtype in itertools.product((1, 65, 197, 1025, 4096), (16, 64, 80, 128, 256), dtypes):
        tiling = tiling_for(keys, keys, width, dtype, shared_memory)
        for name in CANDIDATES:
            assert power_of_two(getattr(tiling, name).rows)
            assert power_of_two(getattr(tiling, name).columns) or getattr(tiling, name) is NEVER


def power_of_two(size):
    return size >= 16 and size & (size - 1) == 0


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_are_tiles_for_a_kernel_each(name):
    tiling = replace(TILINGS["several blocks of keys"], **{name: CANDIDATES[name][1]})
    assert len(set(CANDIDATES[name])) == len(CANDIDATES[name]) > 5
    with using(tiling):
        assert_parity(inputs(1, 1, 40, 60, 16))
