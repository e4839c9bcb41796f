"""What only a GPU can show: run with `pytest tests/test_cuda.py` where there is one."""

import pytest
import torch
import torch.nn.functional as F

import dropkey
import runs
from dropkey import bernoulli
from dropkey.engine import trainer
from dropkey.errors import Diverged, Interrupted
from tiny_models import FAMILIES, images_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
SHAPES = [(2, 3, n, n, d) for n in (1, 5, 49, 65, 197, 577) for d in (64, 128)] + [
    (2, 3, 1, 197, 64),
    (2, 3, 65, 130, 48),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def inputs(batch, heads, queries, keys, width, dtype):
    torch.manual_seed(0)
    make = lambda n: torch.randn(batch, n, heads, width, device="cuda", dtype=dtype).transpose(1, 2)  # noqa: E731
    return [make(n).detach().requires_grad_() for n in (queries, keys, keys)]


def run(tensors, attend=dropkey.attention, **arguments):
    out = attend(*tensors, **{"ratio": 0.3, "seed": 5} | arguments)
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regularizer", ["dropkey", "dropkey_column"])
def test_values_and_gradients_are_those_of_the_reference_in_float64(regularizer, shape, dtype, impl):
    tensors = inputs(*shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = run(exact, impl="reference", regularizer=regularizer)
    for ours, theirs in zip(run(tensors, impl=impl, regularizer=regularizer), wanted, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert (ours.double() - theirs).abs().max().item() < TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shape", [(1, 3, 65, 65), (2, 3, 65, 65), (2, 1, 1, 65)], ids=str)
def test_a_trained_bias_takes_its_gradient(shape):
    tensors, bias = inputs(2, 3, 65, 65, 64, torch.float32), torch.randn(shape, device="cuda", requires_grad=True)
    found = [
        run([*tensors, bias], lambda q, k, v, b, **others: dropkey.attention(q, k, v, bias=b, **others), impl=impl)
        for impl in ("triton", "reference")
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_masks_are_those_of_the_cpu():
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    masks = [
        bernoulli.draw(bernoulli.as_seed(9, at), bernoulli.as_threshold(0.3, at), 1000, 197).cpu() for at in devices
    ]
    assert torch.equal(*masks)


def test_auto_is_triton_on_a_gpu():
    tensors = inputs(2, 3, 65, 65, 64, torch.bfloat16)
    assert dropkey.operator.select_impl("auto", "dropkey", *tensors) == "triton"


def test_runs_are_bitwise_identical():
    tensors = inputs(4, 6, 577, 577, 64, torch.bfloat16)
    first, second = run(tensors, impl="triton"), run(tensors, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_grows_with_the_tokens_not_with_their_square():
    peaks = []
    for tokens in (1024, 4096):
        tensors = inputs(1, 4, tokens, tokens, 64, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(tensors, impl="triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 4.5 * peaks[0]


def test_a_graph_that_is_replayed_draws_new_masks_and_follows_the_ratio():
    tensors, ratio = inputs(2, 3, 65, 65, 64, torch.bfloat16), torch.tensor(0.3, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                dropkey.attention(*tensors, ratio=ratio)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dropkey.attention(*tensors, ratio=ratio)
        seen = []
        for value in (0.3, 0.3, 0.0, 0.0):
            ratio.fill_(value)
            graph.replay()
            seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    plain = F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(seen[2], plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_and_draws_new_masks(mode):
    model = FAMILIES["vit"]().cuda()
    dropkey.apply(model, "dropkey", 0.3)
    compiled, images = torch.compile(model, mode=mode), images_for(model).cuda()
    outs = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            out = compiled(images)
        out.float().sum().backward()
        outs.append(out.detach().clone())
    assert not torch.equal(outs[-1], outs[-2])
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_graph_that_is_replayed_follows_a_new_seed_of_the_masks():
    model, outs = FAMILIES["vit"]().cuda(), []
    dropkey.apply(model, "dropkey", 0.3, "constant")
    images = images_for(model).cuda()
    dropkey.seed_masks(model, 1)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(images)
        for seed in (1, 2, 1):
            dropkey.seed_masks(model, seed)
            graph.replay()
            outs.append(out.clone())
            torch.testing.assert_close(outs[-1], model(images))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.amp=bf16", "trainer.ema_decay=0.9", "optim.clip_grad_norm=1", "augment.label_smoothing=0.1"],
        ["augment.mixup=0.8", "augment.cutmix=1", "augment.random_erasing=0.25", "augment.crop_padding=1"],
        ["trainer.amp=fp16", "optim=sgd", "regularizer=dropout", "trainer.grad_accum_steps=2"],
    ],
    ids=["amp", "augment", "fp16"],
)
def test_no_step_of_a_training_waits_for_the_device(tmp_path, monkeypatch, words):
    """torch raises where the host would wait: in the loader, the step, and the reading of the step before."""
    original = trainer.Trainer.train_epoch

    def train_epoch(self, steps):
        if self.state.position.epoch > 0:  # the first one makes caches and kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "train_epoch", train_epoch)
    runs.train(tmp_path, "trainer.device=cuda", "trainer.log_every=100", *words)


def test_a_training_on_a_gpu_is_resumed_bitwise_identically(tmp_path, monkeypatch):
    plain = runs.train(tmp_path / "plain", "trainer.device=cuda")
    runs.on_step(monkeypatch, 4, runs.send())
    with pytest.raises(Interrupted):
        runs.train(tmp_path / "resumed", "trainer.device=cuda")
    resumed = runs.train(tmp_path / "resumed", "trainer.device=cuda")
    assert runs.unequal(runs.state(plain), runs.state(resumed)) is None


def test_what_is_not_finite_reaches_no_weight(tmp_path, monkeypatch):
    original, before = trainer.Trainer.step, {}

    def step(self, microbatches):
        if self.state.position.global_step == 4:
            before.update({name: value.clone() for name, value in self.state.model.state_dict().items()})
            self.model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
        begun = original(self, microbatches)
        if before:
            assert runs.unequal(before, dict(self.state.model.state_dict())) is None
        return begun

    monkeypatch.setattr(trainer.Trainer, "step", step)
    with pytest.raises(Diverged, match="step 5"):
        runs.train(tmp_path, "trainer.device=cuda")
