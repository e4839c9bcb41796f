"""Randomness: one seed per call, everything else a pure function of it, compiled or not; seeds of a model's masks."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import dropkey
from dropkey import bernoulli, regularizers
from dropkey.operator import cpu
from dropkey.patching.patch import regularized_layers
from dropkey.regularizers import REGULARIZERS, STRUCTURED
from tiny_models import FAMILIES, images_for

IMPLS = ("reference", "cpu", "sdpa")  # triton: tests/test_triton.py
EVERY = pytest.mark.parametrize(
    ("regularizer", "impl"),
    [
        (regularizer, impl)
        for regularizer in REGULARIZERS
        for impl in (IMPLS if REGULARIZERS[regularizer].masks_logits else ("reference",))
    ],
)
REGULARIZER = pytest.mark.parametrize("regularizer", REGULARIZERS)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def inputs(queries=16, keys=17):
    return [torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, keys, keys)]


def key_layout(regularizer):
    return {"grid": (4, 4), "num_prefix": 1, "window": 3} if regularizer in STRUCTURED else {}


def run(tensors, regularizer="dropkey", impl="auto", ratio=0.3, attend=dropkey.attention, **others):
    """The output and the gradients."""
    out = attend(*tensors, regularizer=regularizer, impl=impl, ratio=ratio, **key_layout(regularizer), **others)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# ---- seeds


@pytest.mark.fault(20)
@EVERY
def test_manual_seed_reproduces(regularizer, impl):
    tensors, found = inputs(), []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(run(tensors, regularizer, impl))
    assert equal(*found)


@EVERY
def test_an_explicit_seed_reproduces_and_leaves_the_generator_alone(regularizer, impl):
    tensors, before = inputs(), torch.get_rng_state()
    assert equal(run(tensors, regularizer, impl, seed=5), run(tensors, regularizer, impl, seed=5))
    assert torch.equal(torch.get_rng_state(), before)


@EVERY
def test_other_seeds_drop_other_keys(regularizer, impl):
    tensors = inputs()
    outs = [run(tensors, regularizer, impl, seed=seed)[0] for seed in (0, 1, 2, -1, 2**62)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(outs, 2))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_a_seed_may_be_a_number_or_a_tensor(seed):
    tensors = inputs()
    assert equal(run(tensors, seed=seed), run(tensors, seed=torch.tensor(seed)))


@pytest.mark.parametrize(
    "regularizer", [regularizer for regularizer in REGULARIZERS if REGULARIZERS[regularizer].masks_logits]
)
def test_every_implementation_drops_the_same_keys(regularizer):
    tensors = inputs()
    found = {impl: run(tensors, regularizer, impl, seed=5) for impl in IMPLS}
    for impl, which in itertools.product(("cpu", "sdpa"), range(4)):
        torch.testing.assert_close(found[impl][which], found["reference"][which], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (4, 6, 30, 30)])
def test_a_call_takes_one_seed_whatever_its_shape(shape):
    q = torch.randn(shape)
    torch.manual_seed(5)
    dropkey.attention(q, q, q, ratio=0.3)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    bernoulli.new_seed(q.device)
    assert torch.equal(torch.get_rng_state(), after)


@EVERY
def test_a_ratio_may_be_a_tensor(regularizer, impl):
    tensors, ratio = inputs(), torch.tensor(0.3, dtype=torch.float64)
    assert equal(run(tensors, regularizer, impl, seed=5, ratio=ratio), run(tensors, regularizer, impl, seed=5))


@EVERY
def test_a_ratio_of_zero_in_a_tensor_drops_nothing(regularizer, impl):
    tensors = inputs()
    ours, plain = run(tensors, regularizer, impl, ratio=torch.tensor(0.0)), run(tensors, "none", ratio=0.0)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- compiling


def counting():
    """A backend that traces as usual, and how often it did."""
    count = [0]

    def backend(graph, examples):
        count[0] += 1
        return aot_eager(graph, examples)

    return backend, count


@pytest.mark.parametrize(
    ("regularizer", "impl"),
    [
        ("dropkey", "cpu"),
        ("dropkey", "reference"),
        ("dropkey_block", "sdpa"),
        ("dropkey_cross", "cpu"),
        ("dropkey_column", "reference"),
        ("dropkey_block_column", "cpu"),
        ("dropkey_cross_column", "sdpa"),
        ("dropout", "reference"),
        ("dropattention", "reference"),
    ],
)
def test_compiled_attention_is_eager_attention_and_follows_ratio_and_seed_without_recompiling(regularizer, impl):
    backend, count = counting()
    tensors, compiled = inputs(), torch.compile(dropkey.attention, fullgraph=True, backend=backend)
    counts = set()
    for ratio, seed in ((0.3, 1), (0.1, 2), (0.7, 3)):
        draw = {"ratio": torch.tensor(ratio, dtype=torch.float64), "seed": torch.tensor(seed)}
        ours, eager = (
            run(tensors, regularizer, impl, attend=attend, **draw) for attend in (compiled, dropkey.attention)
        )
        for one, other in zip(ours, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        counts.add(count[0])
    assert len(counts) == 1


def test_inductor_draws_the_masks_of_eager_code_and_follows_manual_seed():
    tensors, compiled, found = inputs(), torch.compile(dropkey.attention, fullgraph=True), []
    ratio = torch.tensor(0.3, dtype=torch.float64)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(run(tensors, ratio=ratio, attend=compiled))
    assert equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])
    q, k, _ = tensors
    weights = torch.eye(17).expand(2, 3, 17, 17)  # as values: the output is the weights
    dropped = [attend(q, k, weights, ratio=ratio, seed=7) == 0 for attend in (compiled, dropkey.attention)]
    assert torch.equal(*dropped)


@REGULARIZER
def test_the_mask_operator_is_registered_well(regularizer):
    where = [4, 4, 1, 3] if regularizer in STRUCTURED else []
    arguments = (torch.tensor(5), bernoulli.as_threshold(0.3, torch.device("cpu")), regularizer, [2, 3, 5, 17], where)
    torch.library.opcheck(regularizers.mask_op, arguments)


@pytest.mark.parametrize(
    ("transposed", "biased", "masked"),
    [(False, None, False), (True, "trained", True), (False, "fixed", True), (True, "fixed", False)],
)
def test_the_cpu_operator_is_registered_well(transposed, biased, masked):
    shape = lambda n: (2, n, 3, 8) if transposed else (2, 3, n, 8)  # noqa: E731
    tensors = [torch.randn(shape(n)) for n in (6, 7, 7)]
    tensors = [(x.transpose(1, 2) if transposed else x).detach().requires_grad_() for x in tensors]
    bias = torch.randn(1, 3, 6, 7, requires_grad=biased == "trained") if biased else None
    drop = torch.rand(2, 3, 1, 7) < 0.3 if masked else None
    numbers = torch.tensor(5), bernoulli.as_threshold(0.3, torch.device("cpu")), 0.3
    torch.library.opcheck(cpu.forward_op, (*tensors, bias, drop, *numbers))


# ---- recomputing


@EVERY
def test_checkpointing_draws_the_same_mask_again(regularizer, impl):
    tensors = inputs()

    def attend(*tensors, **others):
        return checkpoint(dropkey.attention, *tensors, use_reentrant=False, **others)

    found = []
    for attend_so in (dropkey.attention, attend):
        torch.manual_seed(5)
        found.append(run(tensors, regularizer, impl, attend=attend_so))
    assert equal(*found)


def test_an_explicit_seed_serves_where_checkpointing_does_not_replay_the_generator():
    tensors = inputs()

    def attend(*tensors, **others):
        return checkpoint(dropkey.attention, *tensors, use_reentrant=False, preserve_rng_state=False, **others)

    assert equal(run(tensors, seed=5), run(tensors, seed=5, attend=attend))
    torch.manual_seed(5)
    plain = run(tensors)
    torch.manual_seed(5)
    assert not torch.equal(plain[1], run(tensors, attend=attend)[1])  # as the docstring warns


def test_second_derivatives_are_refused_rather_than_wrong():
    q, k, v = inputs()
    (grad,) = torch.autograd.grad(dropkey.attention(q, k, v, ratio=0.3, impl="cpu").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|not require grad"):
        torch.autograd.grad(grad.sum(), k)


# ---- layers of a model


def test_a_copy_has_a_ratio_of_its_own():
    model = FAMILIES["vit"]()
    dropkey.apply(model, "dropkey", 0.1, "constant")
    other = copy.deepcopy(model)
    dropkey.set_ratio(other, 0.5, "constant")
    layers = [one.blocks[0].attn.attn_drop for one in (model, other)]
    assert [bernoulli.as_ratio(layer.threshold).item() for layer in layers] == pytest.approx([0.1, 0.5])


# ---- explicit seeds of a model's masks


def seeded(regularizer="dropkey", family="vit", seed=5, **changes):
    """A model whose masks have a seed, and images for it."""
    model = FAMILIES[family](**changes)
    dropkey.apply(model, regularizer, 0.3, "constant", window=3 if regularizer in STRUCTURED else None)
    dropkey.seed_masks(model, seed)
    return model, images_for(model)


def step(model, images, forward=None):
    """The output and the gradients."""
    out = (model if forward is None else forward)(images)
    return [out, *torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])]


def layers_of(model):
    return [layer for _, layer in regularized_layers(model)]


@REGULARIZER
def test_with_a_seed_other_consumers_of_random_numbers_change_no_mask(regularizer):
    def consume(*_):
        torch.rand(7)

    model, images = seeded(regularizer)
    before = step(model, images)
    for block in model.blocks:
        block.attn.register_forward_pre_hook(consume)
    assert equal(step(model, images), before)


def test_with_a_seed_the_default_generator_is_left_alone():
    model, images = seeded()
    before = torch.get_rng_state()
    step(model, images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.fault(20)
def test_every_layer_and_every_seed_has_masks_of_its_own(drawn):
    model, images = seeded(family="volo")
    for seed in (5, 6, 5, -1, 2**70):
        dropkey.seed_masks(model, seed)
        model(images)
    masks = drawn.masks
    count = len(masks) // 5
    first, again = masks[:count], masks[2 * count : 3 * count]
    assert equal(first, again)
    others = masks[: 2 * count] + masks[3 * count :]
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in itertools.combinations(others, 2))


def test_without_a_seed_again_manual_seed_reproduces():
    (model, images), plain = seeded(), FAMILIES["vit"]()
    plain.load_state_dict(model.state_dict())
    dropkey.apply(plain, "dropkey", 0.3, "constant")
    dropkey.seed_masks(model, None)
    found = []
    for each in (model, plain):
        torch.manual_seed(5)
        found.append(step(each, images))
    assert equal(*found)


@pytest.mark.parametrize("regularizer", ["dropkey", "dropkey_cross", "dropout"])
def test_a_compiled_model_follows_seed_and_ratio_without_recompiling(regularizer):
    model, images = seeded(regularizer, depth=1)
    backend, count = counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counts, outs = set(), []
    for seed, ratio in ((5, 0.3), (6, 0.3), (7, 0.1), (5, 0.3)):
        dropkey.seed_masks(model, seed)
        dropkey.set_ratio(model, ratio)
        outs.append(step(model, images, compiled))
        torch.testing.assert_close(outs[-1], step(model, images), rtol=1e-4, atol=1e-4)
        counts.add(count[0])
    assert len(counts) == 1
    assert equal(outs[0], outs[3]) and not torch.equal(outs[0][0], outs[1][0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_recomputation_gives_the_seeded_masks_again(preserve, use_reentrant):
    model, images = seeded()
    images.requires_grad_()
    forward = functools.partial(checkpoint, model, use_reentrant=use_reentrant, preserve_rng_state=preserve)
    gradients = []
    for run_forward in (model, forward):
        model.zero_grad()
        run_forward(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_another_seed_before_the_backward_pass_changes_no_gradient(impl):
    model, images = FAMILIES["vit"](), torch.randn(1, 3, 32, 32)
    dropkey.apply(model, "dropkey", 0.3, "constant", impl=impl)
    dropkey.seed_masks(model, 5)
    wanted, out = step(model, images), model(images)
    dropkey.seed_masks(model, 6)
    found = torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert equal(found, wanted[1:])


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_the_seed_and_is_seeded_by_itself(copy_of):
    model, images = seeded()
    before, twin = step(model, images), copy_of(model)
    assert equal(step(twin, images), before)
    dropkey.seed_masks(twin, 6)
    assert equal(step(model, images), before)
    assert not torch.equal(twin(images), before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_and_new_memory_keep_ratio_and_seed(dtype):
    model, _ = seeded()
    wanted = [(round(0.3 * 2**32), layer.seed) for layer in layers_of(model)]
    for change in (lambda: model.to(dtype), lambda: model.to("meta"), lambda: model.to_empty(device="cpu")):
        change()
        assert [(layer.threshold.item(), layer.mask_seed.item()) for layer in layers_of(model)] == wanted
    assert not any("seed" in name or "threshold" in name for name in model.state_dict())


def test_seed_and_ratio_are_written_in_place():
    """A CUDA graph reads them where they were when it was captured."""
    model, _ = seeded()
    before = [tensor.data_ptr() for layer in layers_of(model) for tensor in (layer.mask_seed, layer.threshold)]
    dropkey.seed_masks(model, 6)
    dropkey.set_ratio(model, 0.1)
    assert before == [t.data_ptr() for layer in layers_of(model) for t in (layer.mask_seed, layer.threshold)]


def test_a_layer_that_runs_twice_uses_its_mask_twice(drawn):
    model, _ = seeded()
    layer, tokens = model.blocks[0].attn, torch.randn(2, 17, 32)
    assert torch.equal(layer(tokens), layer(tokens))
    assert torch.equal(*drawn.masks)
