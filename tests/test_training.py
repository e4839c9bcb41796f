"""What a run does besides resuming: records, divergence, locks, evaluation, fine-tuning (faults 6-9, 16, 22, 27)."""

import contextlib
import functools
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb

import fault_runs
import processes
import runs
from dropkey import evaluation, plotting, weights
from dropkey.commands import eval as evaluating
from dropkey.commands import train as training
from dropkey.config.schema import (
    REGULARIZER_NAMES,
    DataConfig,
    EvalConfig,
    EvaluationConfig,
    OptimConfig,
    TrainerConfig,
)
from dropkey.engine import distributed, tracking, trainer
from dropkey.engine.distributed import DistContext
from dropkey.engine.evaluate import evaluate
from dropkey.engine.optim import build_optimizer, build_schedule, duration, skips_by_itself
from dropkey.errors import Busy, ConfigError, Diverged, Interrupted, RunError, StorageError
from dropkey.models import create
from dropkey.operator import api
from dropkey.records import RunDirectory
from dropkey.regularizers import REGULARIZERS
from dropkey.tasks import classification

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    """A finished run with every file, not to be changed."""
    return runs.train(tmp_path_factory.mktemp("finished"), "regularizer.ratio=0.3", "trainer.ema_decay=0.9")


def evaluated(run: RunDirectory, **options) -> dict:
    keys = {k: options.pop(k) for k in ("data", "checkpoint") if k in options}
    where = {} if "checkpoint" in keys else {"run": str(run.path)}
    cfg = EvalConfig(**where, **keys, eval=EvaluationConfig(**options))
    return evaluation.evaluate_run(cfg, runs_config(run), run.path)[0]


def runs_config(run: RunDirectory):
    from dropkey.config.compose import load

    return load(run.config)


# --------------------------------------------------------------------------------------------------------- records


def test_a_run_leaves_all_its_files(finished):
    names = {path.name for path in finished.path.iterdir()}
    expected = {"config.yaml", "status.json", "metrics.jsonl", "summary.json", "checkpoints", "log.txt", "curves.png"}
    assert expected <= names
    assert finished.status()["state"] == "done"


def test_the_summary_has_every_figure_that_was_promised(finished):
    keys = "top1 top5 loss best_top1 epochs seconds samples_per_second parameters peak_memory_mib versions commit run"
    assert set(keys.split()) <= finished.summary().keys()
    assert "hardware" in finished.summary()


def test_there_is_one_record_per_epoch_and_per_step(finished):
    assert [r["epoch"] for r in finished.records("epoch")] == [1, 2, 3]
    assert [r["step"] for r in finished.records("step")] == list(range(1, 10))


def test_the_learning_rate_warms_up_and_falls_as_a_pure_function_of_the_step(finished):
    rates = [r["lr"] for r in finished.records("step")]
    cfg = runs_config(finished)
    schedule = build_schedule(build_optimizer(torch.nn.Linear(1, 1), cfg.optim), cfg.optim, 9, 3)
    assert rates == pytest.approx([schedule._get_lr(step)[0] for step in range(9)], rel=1e-6)
    assert max(rates) == rates[3] == cfg.optim.lr


def test_the_log_names_sites_with_ratio_and_what_was_skipped(tmp_path):
    words = ("model=t2t_vit_7", "model.depth=null", "model.embed_dim=null", "model.num_heads=null")
    run = runs.train(tmp_path, *words, "data.image_size=48", "data.channels=3", "data.mean=null", "data.std=null")
    log = (run.path / "log.txt").read_text()
    assert "self     fused    ratio 0.1000" in log
    assert "skipped: a performer has no softmax" in log


def test_durations_in_steps_and_epochs():
    assert duration(epochs=3, max_steps=None, per_epoch=10) == (30, 3)
    assert duration(epochs=3, max_steps=15, per_epoch=10) == (15, 2)


@pytest.mark.parametrize("kind", REGULARIZER_NAMES)
def test_the_first_20_losses_are_those_on_record(tmp_path, kind, monkeypatch):
    """tests/golden/losses.json; make it again with: python tests/golden/make.py losses"""
    from golden import make

    monkeypatch.setattr(plotting, "curves", lambda *args: None)
    assert make.losses(tmp_path, kind) == pytest.approx(GOLDEN[kind], rel=2e-4)


def test_each_regularizer_has_its_own_losses():
    assert len({tuple(GOLDEN[kind]) for kind in REGULARIZER_NAMES}) == len(REGULARIZER_NAMES) == len(REGULARIZERS) + 1


def test_overfit_learns_one_batch_by_heart(tmp_path):
    run = runs.train(
        tmp_path, "debug=overfit", "trainer.epochs=150", "optim.lr=0.01", "trainer.eval_every=150", "regularizer=none"
    )
    assert run.records("epoch")[-1]["train_loss"] < 0.05


def test_profile_leaves_a_trace(tmp_path):
    run = runs.train(tmp_path, "debug=profile", "trainer.epochs=4")
    assert "traceEvents" in (run.path / "trace.json").read_text()[:20000]


def test_compiled_training_gives_the_losses_of_eager_training(tmp_path, monkeypatch):
    """Traced and differentiated as by default, without the code generation that takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    words = ("trainer.max_steps=4", "model.depth=1", "regularizer=none")
    eager = runs.train(tmp_path, *words)
    compiled = runs.train(tmp_path, *words, "trainer.compile=true")
    losses = [[r["loss"] for r in run.records("step")] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs.state(eager)["model"].keys() == runs.state(compiled)["model"].keys()


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that make the host wait for a device: those that read a number from a tensor."""

    READING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "item")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.READING:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [[], ["trainer.ema_decay=0.9", "optim.clip_grad_norm=1"], ["optim=sgd"]], ids=str)
def test_a_step_waits_neither_for_the_device_nor_for_other_processes(tmp_path, monkeypatch, words):
    """It would keep a fast device idle. What a step must know it reads when the next one has begun."""
    seen, original = [], trainer.Trainer.step

    def step(self, microbatches):
        with monkeypatch.context() as forbidden, Waits() as waits:
            for kind, name in ((torch.Tensor, "tolist"), (DistContext, "max"), (DistContext, "sum")):
                call = getattr(kind, name)
                counted = lambda *args, call=call, name=name: (waits.seen.update([name]), call(*args))[1]  # noqa: E731
                forbidden.setattr(kind, name, counted)
            begun = original(self, microbatches)
        seen.append(dict(waits.seen))
        return begun

    monkeypatch.setattr(trainer.Trainer, "step", step)
    runs.train(tmp_path, "regularizer=none", "trainer.max_steps=4", "trainer.grad_accum_steps=2", *words)
    assert seen[1:] == [{}] * 3  # the first adds up how many samples a batch has


def test_an_optimizer_that_cannot_skip_a_step_is_waited_for(tmp_path, monkeypatch):
    """So that what is not finite never reaches the weights."""
    assert not skips_by_itself(build_optimizer(torch.nn.Linear(2, 2), OptimConfig(name="lamb")))
    with pytest.raises(Diverged, match="step 1"):
        train_with_nan_gradients(tmp_path, monkeypatch, "optim.name=lamb")


def test_the_processes_agree_about_once_a_second(tmp_path, monkeypatch):
    meetings = []
    monkeypatch.setattr(DistContext, "max", lambda self, *values: meetings.append(values[-1]) or list(values))
    loop = SimpleNamespace(
        dist=DistContext(0, 2, torch.device("cpu")),
        state=SimpleNamespace(position=SimpleNamespace(global_step=0)),
        options=TrainerConfig(),
        **{"stop": SimpleNamespace(number=0), "saved_at": time.monotonic(), "fault": None},
        **{"step_seconds": 0.1, "meets_at": 0},
    )
    for step in range(1, 101):
        loop.state.position.global_step = step
        assert trainer.Trainer.meet(loop) == (False, False)
    assert len(meetings) == 10


# -------------------------------------------------------------------------------------------------- things go wrong


@pytest.mark.fault(22)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_leaves_evidence(tmp_path, monkeypatch):
    original, before = trainer.Trainer.step, {}

    def poisoned(self, batches):
        healthy = self.task.losses
        if self.state.position.global_step == 4:
            before.update({k: v.clone() for k, v in self.state.model.state_dict().items()})
            self.task.losses = lambda model, batch: {"cross_entropy": model(batch.images).sum() * float("nan")}
        begun = original(self, batches)
        self.task.losses = healthy
        if before:  # this step, and the next one, which has begun before the host knows
            assert runs.unequal(before, dict(self.state.model.state_dict())) is None
        return begun

    monkeypatch.setattr(trainer.Trainer, "step", poisoned)
    with pytest.raises(Diverged, match=r"epoch 2, step 5") as error:
        runs.train(tmp_path)
    assert error.value.exit_code == 4
    (path,) = tmp_path.iterdir()
    run = RunDirectory(path)
    assert run.status()["state"] == "diverged"
    assert len(json.loads((path / "diverged.json").read_text())["processes"][0]["sample_ids"]) == 16
    assert runs.state(run)["position"]["epoch"] == 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("clip", ["null", "1.0"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_gradient_that_is_not_finite_stops_too_although_the_loss_is_finite(tmp_path, monkeypatch, clip, amp):
    with pytest.raises(Diverged, match=r"loss \d.*, gradient norm nan in epoch 1, step 1"):  # not a step later
        train_with_nan_gradients(tmp_path, monkeypatch, f"optim.clip_grad_norm={clip}", f"trainer.amp={amp}")


@pytest.mark.fault(22)
def test_fp16_that_only_skips_steps_is_called_diverged(tmp_path, monkeypatch):
    with pytest.raises(Diverged):
        train_with_nan_gradients(tmp_path, monkeypatch, "trainer.amp=fp16", "trainer.epochs=20")


def train_with_nan_gradients(output, monkeypatch, *words):
    original = trainer.Trainer.step

    def step(self, batches):
        for parameter in self.state.model.parameters():
            if not parameter._backward_hooks:
                parameter.register_hook(lambda gradient: gradient * float("nan"))
        return original(self, batches)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    return runs.train(output, *words)


def test_gradients_are_clipped_after_unscaling(tmp_path, monkeypatch):
    norms, original = {}, torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):
        norms.setdefault(amp, []).append(float(original(parameters, limit)))
        return torch.tensor(norms[amp][-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for amp in ("none", "fp16"):
        runs.train(tmp_path, f"trainer.amp={amp}", "optim.clip_grad_norm=1", "trainer.max_steps=3", "optim=sgd")
    assert norms["fp16"] == pytest.approx(norms["none"], rel=0.05)


def test_weight_decay_spares_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_raw_weights_are_scored_beside_their_moving_average(finished):
    """Recipes differ in which they publish."""
    summary, state = finished.summary(), runs.state(finished)
    bare = weights.find_checkpoint(finished.path).with_name("raw.pt")
    torch.save({"model": state["model"]}, bare)
    try:
        raw = evaluated(finished, checkpoint=str(bare))
    finally:
        bare.unlink()
    assert all(summary["raw"][key] == raw[key] for key in ("top1", "top5", "loss", "ece"))
    assert summary["raw"]["loss"] != summary["loss"]


@pytest.mark.parametrize("warmup", [True, False])
def test_without_a_warm_up_the_average_has_its_full_length_from_the_first_steps(tmp_path, monkeypatch, warmup):
    decays = []

    class Watched(trainer.ModelEmaV3):
        def get_decay(self, step=None):
            decays.append(super().get_decay(step))
            return decays[-1]

    monkeypatch.setattr(trainer, "ModelEmaV3", Watched)
    runs.train(tmp_path, "trainer.ema_decay=0.9", f"trainer.ema_warmup={warmup}", "trainer.max_steps=3")
    assert (decays[-1] == 0.9) != warmup


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no font cache")

    monkeypatch.setattr(plotting, "curves", fail)
    run = runs.train(tmp_path)
    assert run.status()["state"] == "done"
    assert "no curves.png: OSError: no font cache" in (run.path / "log.txt").read_text()


def test_a_full_disk_ends_with_its_own_exit_code(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device", str(self.metrics))

    monkeypatch.setattr(RunDirectory, "append", full)
    with pytest.raises(StorageError, match=r"No space left on device: '.*metrics.jsonl'") as error:
        runs.train(tmp_path)
    assert error.value.exit_code == 5


def test_memory_that_is_short_names_the_key_that_halves_it(tmp_path, monkeypatch):
    def short(loop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    runs.on_step(monkeypatch, 1, short)
    with pytest.raises(RunError, match=r"trainer\.grad_accum_steps=2 takes about half the memory"):
        runs.train(tmp_path)


def test_block_on_a_model_without_a_known_grid_is_refused_before_training(tmp_path):
    words = ("model=timm", "model.name=swin_tiny_patch4_window7_224", "data.image_size=64", "data.channels=3")
    words += ("model.depth=null", "model.embed_dim=null", "model.num_heads=null", "+model.args.window_size=[4,2]")
    with pytest.raises(ConfigError, match="8 keys fit neither"):
        runs.train(tmp_path, *words, "regularizer=dropkey_block")


def test_a_resumed_run_does_not_fetch_published_weights_again(tmp_path, monkeypatch):
    asked = []
    original = classification.create_model

    def building(model, *, pretrained, **sizes):
        asked.append(pretrained)
        return original(model, **sizes)  # there is no network here

    monkeypatch.setattr(classification, "create_model", building)
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, "model.pretrained=true")
    run = runs.train(tmp_path, "model.pretrained=true")
    evaluated(run)
    assert asked == [True, False, False]


def test_a_diverged_run_is_not_repeated_unless_asked_for(tmp_path, monkeypatch):
    cfg = runs.config(tmp_path)
    run = RunDirectory(training.run_directory(cfg))
    run.path.mkdir()
    run.set_status("diverged", reason="loss nan")
    with pytest.raises(Diverged, match="overwrite=true trains it again"):
        training.train(cfg)


def test_a_failure_is_recorded_with_its_reason(tmp_path, monkeypatch):
    def crash(loop):
        raise MemoryError("no room")

    runs.on_step(monkeypatch, 2, crash)
    with pytest.raises(MemoryError):
        runs.train(tmp_path)
    (path,) = tmp_path.iterdir()
    assert RunDirectory(path).status()["state"] == "failed"
    assert "no room" in RunDirectory(path).status()["reason"]


@pytest.mark.fault(21)
def test_one_process_at_a_time_trains_a_run(tmp_path):
    run = RunDirectory(training.run_directory(runs.config(tmp_path)))
    with run.lock(), pytest.raises(Busy, match="is being trained by process"):
        runs.train(tmp_path)


def test_workers_that_outlive_an_error_do_not_keep_the_lock(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with contextlib.suppress(ValueError), run.lock():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        raise ValueError
    with run.lock():
        assert worker.is_alive()
    worker.kill()


@pytest.mark.fault(7)
def test_a_run_whose_config_was_edited_is_refused_with_the_difference(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.on_step(patch, 1, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path)
    (path,) = tmp_path.iterdir()
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("epochs: 3", "epochs: 5"))
    with pytest.raises(ConfigError, match=r"trainer\.epochs: 5 -> 3"):
        runs.train(tmp_path)


@pytest.mark.fault(7)
def test_harmless_keys_may_change_between_sessions(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Exception, match="interrupted"):
            runs.train(tmp_path / "parts")
    parts = runs.train(tmp_path / "parts", "data.num_workers=0", "logger.project=other")
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None


def test_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=0", "overwrite=true", "logger.tags=[a b]"])
    runs.on_step(monkeypatch, 2, runs.send(2))
    with (
        pytest.raises(Interrupted, match=r"all saved in .*; go on with: python train.py seed=0 'logger.tags=") as error,
        training.way_on(),
    ):
        training.train(runs.config(tmp_path))
    assert "overwrite" not in str(error.value)
    assert error.value.exit_code == 130


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"trainer.device=cuda: torch finds no such device here, only cpu"):
        distributed.pick_device("cuda")


# ------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_eval_repeats_the_figures_of_training_at_any_batch_size(finished, batch_size):
    result = evaluated(finished, batch_size=batch_size)
    summary = finished.summary()
    assert round(result["top1"], 4) == summary["top1"]
    assert round(result["top5"], 4) == summary["top5"]
    assert round(result["loss"], 4) == round(summary["loss"], 4)


def test_eval_with_the_batch_size_of_training_repeats_it_to_the_last_digit(finished):
    result, summary = evaluated(finished), finished.summary()
    assert [round(result["loss"], 6), round(result["ece"], 4)] == [summary["loss"], summary["ece"]]


def right(run: RunDirectory, result: str) -> np.ndarray:
    """Which test samples are right, from the bits beside a result."""
    bits = np.frombuffer(run.correct(result), dtype=np.uint8)
    return np.unpackbits(bits, count=run.read_json(result)["samples"])


def test_a_run_keeps_a_bit_for_each_test_sample_that_says_whether_it_was_right(finished):
    assert 100 * right(finished, "summary.json").mean() == pytest.approx(finished.summary()["top1"], abs=1e-4)
    assert len(finished.correct("summary.json")) == -(-finished.summary()["samples"] // 8)


@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_bits_of_an_evaluation_are_in_the_order_of_the_split(finished, batch_size):
    evaluated(finished, batch_size=batch_size)
    assert (right(finished, "eval-test.json") == right(finished, "summary.json")).all()


def test_figures_are_those_of_a_plain_computation():
    torch.manual_seed(0)
    logits, targets = torch.randn(53, 8), torch.randint(0, 8, (53,))
    batches = [fit_batch(logits[i : i + 10], targets[i : i + 10]) for i in range(0, 53, 10)]
    world = distributed.DistContext(0, 1, torch.device("cpu"))
    result = evaluate(lambda batch: batch.images, classification.ClassificationScores(), batches, world)
    probabilities = logits.softmax(-1).double()
    confidence, predicted = probabilities.max(-1)
    right = (predicted == targets).double()
    gap = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            gap += inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs()
    assert result["top1"] == pytest.approx(100 * right.mean().item())
    assert result["loss"] == pytest.approx(-probabilities[range(53), targets].log().mean().item(), rel=1e-6)
    assert result["ece"] == pytest.approx(100 * float(gap), abs=1e-4)
    fifth = probabilities.sort(-1).values[:, -5]
    assert result["top5"] == pytest.approx(100 * (probabilities[range(53), targets] >= fifth).double().mean().item())


def fit_batch(images, targets):
    from dropkey.data import ImageBatch

    return ImageBatch(images, targets, torch.arange(len(targets)))


def test_monte_carlo_differs_from_one_pass_and_repeats_itself(finished):
    plain, first, second = (evaluated(finished, monte_carlo=n) for n in (0, 4, 4))
    assert first["loss"] != plain["loss"]
    assert first["loss"] == second["loss"]


def test_more_monte_carlo_passes_come_closer_to_their_limit(finished):
    limit = evaluated(finished, monte_carlo=64)["loss"]
    distances = [abs(evaluated(finished, monte_carlo=n)["loss"] - limit) for n in (1, 32)]
    assert distances[1] < distances[0]


def test_monte_carlo_without_a_regularizer_is_refused(tmp_path):
    run = runs.train(tmp_path, "regularizer=none", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match="no regularizer to keep on"):
        evaluated(run, monte_carlo=4)


def test_validation_split_and_best_weights_can_be_evaluated(finished):
    result = evaluated(finished, split="val", weights="best")
    assert round(result["top1"], 4) == finished.summary()["best_top1"]


def test_a_checkpoint_file_can_be_evaluated(finished):
    result = evaluated(finished, checkpoint=str(finished.checkpoints / "last.pt"))
    assert round(result["top1"], 4) == finished.summary()["top1"]


def test_another_data_set_of_the_same_classes_can_be_evaluated(finished, tmp_path):
    from data_samples import write_images

    for name in "0123456789":
        write_images(tmp_path / "test" / name, 2, size=(28, 28))
        write_images(tmp_path / "train" / name, 2, size=(28, 28))
    other = DataConfig(name="folder", root=str(tmp_path), in_memory=False, num_workers=0, image_size=224)
    result = evaluated(finished, data=other)
    assert (result["samples"], result["data"]) == (20, "folder")


def test_data_that_has_moved_is_found_with_root(finished):
    cfg = EvalConfig(run=str(finished.path), root="elsewhere", eval=EvaluationConfig())
    assert evaluation.evaluate_run(cfg, runs_config(finished), finished.path)[0]["root"] == "elsewhere"


def test_eval_writes_its_result_beside_the_run_and_on_the_screen(finished, capsys):
    evaluating.evaluate(EvalConfig(run=str(finished.path), eval=EvaluationConfig(split="val")))
    out = capsys.readouterr().out
    file = finished.path / "eval-val.json"
    assert str(file) in out
    assert f"top-1 {json.loads(file.read_text())['top1']:.2f} %" in out


@pytest.mark.parametrize("cfg", [EvalConfig(), EvalConfig(run="a", checkpoint="b")], ids=["neither", "both"])
def test_eval_needs_a_run_or_a_checkpoint(cfg):
    with pytest.raises(ConfigError, match="takes either run="):
        evaluating.evaluate(cfg)


# ----------------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_starts_from_the_weights_of_a_run(finished, tmp_path):
    words = (f"init_from={finished.path}", "regularizer=none", "optim.lr=1e-12", "optim.warmup_lr=0", "optim.min_lr=0")
    run = runs.train(tmp_path, *words, *runs.ONE_EPOCH, "optim.weight_decay=0")
    assert run.summary()["top1"] == finished.summary()["top1"]
    assert run.summary()["loss"] == pytest.approx(finished.summary()["loss"], abs=1e-5)


def test_fine_tuning_is_another_run_and_starts_its_counters_anew(finished, tmp_path):
    run = runs.train(tmp_path, f"init_from={finished.path}", *runs.ONE_EPOCH)
    assert run.summary()["epochs"] == 1
    assert run.path.name != finished.path.name


def test_fine_tuning_to_other_classes_gets_a_new_head_and_says_so(finished, tmp_path):
    from data_samples import write_images

    for name in "abc":
        write_images(tmp_path / "images" / name, 12, size=(8, 8))
    words = (
        "data=folder",
        f"data.root={tmp_path}/images",
        "data.in_memory=true",
        "data.crop_pct=1",
        "data.image_size=8",
    )
    words += (
        "data.channels=1",
        "data.mean=null",
        "data.std=null",
        "data.max_train_samples=null",
        "trainer.batch_size=8",
    )
    run = runs.train(tmp_path / "runs", *words, f"init_from={finished.path}", *runs.ONE_EPOCH)
    assert "new: head.weight, head.bias" in (run.path / "log.txt").read_text()
    assert runs.state(run)["model"]["head.weight"].shape[0] == 3


def test_weights_of_another_architecture_are_refused_by_name(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"does not fit the model: .* first "):
        runs.train(tmp_path, f"init_from={finished.path}", "model.embed_dim=48")


def test_position_embeddings_follow_the_image_size(finished, tmp_path):
    words = ("data.image_size=16", "model.patch_size=2", "trainer.max_steps=1")
    run = runs.train(tmp_path, f"init_from={finished.path}", *words)
    assert runs.state(run)["model"]["pos_embed"].shape[1] == 65


@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict", "model", None])
def test_checkpoints_of_other_programs_load(finished, tmp_path, key):
    import argparse

    saved = {f"module.{k}": v for k, v in runs.state(finished)["ema"].items()}
    content = saved if key is None else {key: saved, "args": argparse.Namespace(lr=1.0), "epoch": 7}
    torch.save(content, tmp_path / "official.pth.tar")
    found = weights.read_weights(tmp_path / "official.pth.tar")
    assert runs.unequal(found, dict(runs.state(finished)["ema"])) is None


def test_safetensors_load(finished, tmp_path):
    from safetensors.torch import save_file

    saved = dict(runs.state(finished)["ema"])
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "weights.safetensors")
    assert runs.unequal(weights.read_weights(tmp_path / "weights.safetensors"), saved) is None


def test_published_weights_that_cannot_be_fetched_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cfg = runs.config(tmp_path, "model.pretrained=true")
    with pytest.raises(ConfigError, match="is there a network"):
        create.create_model(cfg.model, image_size=8, channels=1, num_classes=10, pretrained=True)


# -------------------------------------------------------------------------------------------------------- tracking


def test_offline_tracking_mirrors_the_run_under_its_hash(tmp_path):
    run = runs.train(tmp_path, "logger=wandb", "trainer.max_steps=2")
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run.summary()["hash"])
    assert run.summary()["group"] != run.summary()["hash"]


@pytest.mark.fault(27)
@pytest.mark.parametrize("key", ["", "0" * 40])
def test_a_server_that_cannot_be_reached_neither_delays_nor_fails(tmp_path, key):
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "HOME": str(tmp_path)}
    overrides = ("logger=wandb", "logger.mode=online", *runs.ONE_EPOCH)
    done = processes.run(runs.train, tmp_path / "runs", *overrides, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("W&B is offline: Failed" if key else "W&B is offline: No API key") in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert len(RunDirectory(run).records("epoch")) == 1


@pytest.mark.fault(27, full=True)
def test_a_training_goes_on_when_the_service_of_wandb_is_killed_and_is_one_wandb_run(tmp_path, monkeypatch, figure):
    with monkeypatch.context() as patch:
        runs.on_step(patch, 2, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, "logger=wandb")
        wandb.teardown()
    done = processes.run(fault_runs.train_without_the_service_of_wandb, tmp_path)
    ended, killed = time.time(), [float(line) for line in (tmp_path / "killed.txt").read_text().split()]
    assert killed and done.returncode == 0 and "Traceback" not in done.stderr
    (path,) = tmp_path.glob("vit*")
    assert len(RunDirectory(path).records("epoch")) == 3 and RunDirectory(path).finished
    tracked = [place.name for place in (path / "wandb").glob("offline-run-*")]
    assert len(tracked) == 2 and len({name.rsplit("-", 1)[1] for name in tracked}) == 1
    assert ended - killed[0] < 60
    figure(f"its service killed: over {ended - killed[0]:.0f} s later")


@pytest.mark.fault(27)
def test_training_works_without_the_wandb_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = runs.train(tmp_path, "logger=wandb", "trainer.max_steps=1")
    assert "wandb is not installed" in (run.path / "log.txt").read_text()


@pytest.mark.fault(27)
def test_a_tracker_that_fails_does_not_fail_the_run(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(tracking, "Wandb", refuse)
    run = runs.train(tmp_path, "logger=wandb", "trainer.max_steps=1")
    assert run.status()["state"] == "done"
    assert "W&B is off for this run: quota exceeded" in (run.path / "log.txt").read_text()


# ---- implementations of attention


@pytest.mark.parametrize("impl", ["reference", "cpu", "sdpa"])
def test_every_implementation_trains_the_same_model(tmp_path, impl):
    losses = {}
    for name in ("auto", impl):
        run = runs.train(tmp_path, "regularizer.ratio=0.3", f"regularizer.impl={name}", "trainer.max_steps=4")
        losses[name] = [record["loss"] for record in run.records("step")]
    assert losses[impl] == pytest.approx(losses["auto"], rel=1e-4)


def test_an_implementation_that_cannot_be_had_here_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "triton_unsupported_reason", lambda *tensors: "needs a GPU")
    with pytest.raises(ConfigError, match="impl=triton needs a GPU"):
        runs.train(tmp_path, "regularizer.impl=triton")


def test_a_run_of_another_machines_implementation_can_be_evaluated(tmp_path):
    run = runs.train(tmp_path, "regularizer.ratio=0.3", "trainer.max_steps=2")
    settings = runs_config(run)
    settings.regularizer.impl = "triton"
    cfg = EvalConfig(run=str(run.path), eval=EvaluationConfig(monte_carlo=2))
    assert evaluation.evaluate_run(cfg, settings, run.path)[0]["top1"] >= 0
