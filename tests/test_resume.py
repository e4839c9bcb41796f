"""An interrupted run, resumed, is bitwise identical to the uninterrupted one (faults 1-6, 9)."""

import functools
import itertools
import signal
import time

import pytest
import torch

import fault_runs
import processes
import runs
from dropkey import plotting
from dropkey.config.schema import REGULARIZER_NAMES, SCHEDULES
from dropkey.engine import checkpoint, trainer
from dropkey.errors import ConfigError, Interrupted
from dropkey.records import RunDirectory

EVERYTHING = (
    "model.drop_path=0.2",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.crop_padding=1",
    "augment.random_erasing=0.25",
    "trainer.grad_accum_steps=2",
    "trainer.ema_decay=0.9",
    "optim.clip_grad_norm=1.0",
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plotting, "curves", lambda *args: None)


def assert_resumes_exactly(tmp_path, monkeypatch, step: int, *overrides: str, number: int = signal.SIGTERM) -> None:
    whole = runs.train(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        runs.on_step(patch, step, runs.send(number))
        with pytest.raises(Interrupted):
            runs.train(tmp_path / "parts", *overrides)
    parts = runs.train(tmp_path / "parts", *overrides)
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.unequal(runs.state(whole, "best.pt"), runs.state(parts, "best.pt")) is None
    assert runs.records(whole) == runs.records(parts)
    figures = ("top1", "top5", "loss", "ece", "best_top1", "best_epoch", "steps")
    assert {k: whole.summary()[k] for k in figures} == {k: parts.summary()[k] for k in figures}


# Every regularizer; both kinds of moments and all schedules among them.
CASES = [(name, (4, 6)[i % 2], SCHEDULES[i % 3]) for i, name in enumerate(REGULARIZER_NAMES)]


@pytest.mark.fault(1, 3, 4, 5, 6)
@pytest.mark.parametrize(("name", "step", "schedule"), CASES)
def test_every_regularizer_resumes_bitwise_identically_with_every_option_on(
    tmp_path, monkeypatch, name, step, schedule
):
    """After step 4 (in the second epoch) or 6 (at its end)."""
    overrides = (f"regularizer={name}", f"schedule={schedule}", *EVERYTHING)
    assert_resumes_exactly(tmp_path, monkeypatch, step, *overrides)


@pytest.mark.fault(1, full=True)
@pytest.mark.parametrize("count", [1, 2])
def test_every_cell_of_the_grid_resumes_in_a_new_process_bitwise_identically(tmp_path, count, figure):
    """Regularizers, schedules and options in all combinations; the moments of the interruption take turns."""
    grid = itertools.product(REGULARIZER_NAMES, SCHEDULES, fault_runs.OPTIONS)
    moments = itertools.cycle(fault_runs.MOMENTS)
    cells = [fault_runs.Cell(*place, next(moments)) for place in grid]
    cells = list(
        {cell.run(tmp_path).path: cell for cell in cells}.values()
    )  # without a regularizer there is no schedule
    run = processes.run if count == 1 else functools.partial(processes.torchrun, processes=count)
    for stage in (fault_runs.begin, fault_runs.resume):
        done = run(stage, cells, tmp_path, timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
    wrong = fault_runs.wrong_cells(cells, tmp_path)
    text = "every regularizer x schedule x option x 1 and 2 processes, resumed in a new process"
    figure(text, injected=len(cells), survived=len(cells) - len(wrong))
    assert not wrong


@pytest.mark.fault(15, full=True)
@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_process_and_its_workers_saves_once_whenever_it_comes(tmp_path, number, code, moment, figure):
    words = ("data.in_memory=false", "data.num_workers=2")
    done = processes.run(fault_runs.train_and_signal, tmp_path, int(number), moment, words)
    ended, (began, *saves) = time.time(), (tmp_path / "signal.txt").read_text().split()
    assert done.returncode == code, done.stderr
    assert len(saves) == (moment != "save") and "Traceback" not in done.stderr
    assert ended - float(began) < 30, "torchrun would have killed it"
    whole, parts = runs.train(tmp_path / "whole", *words), runs.train(tmp_path, *words)
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    figure("in a step, an evaluation, a save, workers on: one save, 143 or 130")


@pytest.mark.fault(1)
@pytest.mark.parametrize("option", ["trainer.amp=bf16", "trainer.amp=fp16", "optim=sgd", "data.val_fraction=0"])
def test_options_that_exclude_others_resume_bitwise_identically(tmp_path, monkeypatch, option):
    assert_resumes_exactly(tmp_path, monkeypatch, 4, option)


@pytest.mark.fault(1, 15)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_save_as_well(tmp_path, monkeypatch, number):
    assert_resumes_exactly(tmp_path, monkeypatch, 5, number=number)


@pytest.mark.fault(1)
def test_images_decoded_as_they_come_resume_bitwise_identically(tmp_path, monkeypatch):
    options = ("augment=deit", "data.in_memory=false", "data.num_workers=0")
    assert_resumes_exactly(tmp_path, monkeypatch, 4, *options)


@pytest.mark.fault(1, 3)
def test_interruption_in_evaluation_resumes_bitwise_identically(tmp_path, monkeypatch):
    """In that of the averaged weights: what is saved then are the raw ones."""
    average = "trainer.ema_decay=0.9"
    whole = runs.train(tmp_path / "whole", average)
    original = trainer.evaluate

    def interrupted(*args, **kwargs):
        runs.send()(None)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            runs.train(tmp_path / "parts", average)
    parts = runs.train(tmp_path / "parts", average)
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.records(whole) == runs.records(parts)


@pytest.mark.fault(1)
def test_three_interruptions_within_one_epoch_change_nothing(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole")
    for step in (1, 2, 3):
        with monkeypatch.context() as patch:
            runs.on_step(patch, step, runs.send())
            with pytest.raises(Interrupted):
                runs.train(tmp_path / "parts")
    parts = runs.train(tmp_path / "parts")
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.records(whole) == runs.records(parts)


@pytest.mark.fault(1, 6)
def test_a_crash_without_warning_resumes_from_the_last_checkpoint_bitwise_identically(tmp_path, monkeypatch):
    def crash(loop):
        raise MemoryError("as sudden as SIGKILL")

    whole = runs.train(tmp_path / "whole", "regularizer=dropkey_column")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 5, crash)
        with pytest.raises(MemoryError):
            runs.train(tmp_path / "parts", "regularizer=dropkey_column")
    parts = runs.train(tmp_path / "parts", "regularizer=dropkey_column")
    assert runs.unequal(runs.state(whole), runs.state(parts)) is None
    assert runs.records(whole) == runs.records(parts)


@pytest.mark.fault(2)
def test_the_sample_stream_is_that_of_the_uninterrupted_run(tmp_path, monkeypatch, figure):
    """Interrupted twice within an epoch."""
    seen = []
    original = trainer.Trainer.step

    def step(self, microbatches):
        seen.extend((self.state.position.global_step, batch.ids.tolist()) for batch in microbatches)
        return original(self, microbatches)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    runs.train(tmp_path / "whole")
    whole, seen[:] = list(seen), []
    for number in (4, 5):
        with monkeypatch.context() as patch:
            runs.on_step(patch, number, runs.send())
            with pytest.raises(Interrupted):
                runs.train(tmp_path / "parts")
    runs.train(tmp_path / "parts")
    wrong = sum(one != other for one, other in itertools.zip_longest(seen, whole))
    figure(f"{wrong} of {len(whole)} batches wrong after 2 resumes in an epoch", injected=2)
    assert seen == whole


@pytest.mark.fault(5, 14)
def test_a_worse_epoch_after_resuming_does_not_replace_the_best(tmp_path, monkeypatch):
    figures = iter([50.0, 90.0, 10.0, 20.0])
    result = {"top5": 0.0, "loss": 1.0, "ece": 0.0, "samples": 1}
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **k: {"top1": next(figures), **result})
    with monkeypatch.context() as patch:
        runs.on_step(patch, 7, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path)
    run = runs.train(tmp_path)
    assert run.summary()["best_top1"] == 90.0
    assert run.summary()["best_epoch"] == 2
    assert runs.state(run, "best.pt")["epoch"] == 2


@pytest.mark.fault(3)
def test_a_checkpoint_holds_raw_and_averaged_weights(tmp_path):
    content = runs.state(runs.train(tmp_path, "trainer.ema_decay=0.9"))
    assert content["model"].keys() == content["ema"].keys()
    assert any(not torch.equal(content["model"][k], content["ema"][k]) for k in content["model"])


@pytest.mark.fault(9)
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, capsys, figure):
    from dropkey.commands import train

    cfg = runs.config(tmp_path)
    run = runs.train(tmp_path)
    before = (run.checkpoints / "last.pt").stat().st_mtime_ns
    began = time.monotonic()
    train.train(cfg)
    figure(f"a finished run is over in {time.monotonic() - began:.1f} s")
    assert "done already" in capsys.readouterr().out
    assert (run.checkpoints / "last.pt").stat().st_mtime_ns == before


def test_overwrite_starts_over(tmp_path, monkeypatch):
    whole = runs.train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path / "again")
    again = runs.train(tmp_path / "again", "overwrite=true")
    assert "resuming" not in (again.path / "log.txt").read_text()
    assert runs.records(again) == runs.records(whole)


@pytest.mark.fault(17)
def test_torchruns_restart_does_not_start_over_although_asked_to_overwrite(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        runs.on_step(patch, 4, runs.send())
        with pytest.raises(Interrupted):
            runs.train(tmp_path, "overwrite=true")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = runs.train(tmp_path, "overwrite=true")
    assert "resuming after 1 epochs and 1 of 3 steps" in (run.path / "log.txt").read_text()


def test_a_regularizer_does_not_change_initialisation_or_data_order(tmp_path, monkeypatch):
    starts, original = [], trainer.Trainer.step

    def step(self, microbatches):
        weights = {k: v.clone() for k, v in self.state.model.state_dict().items()}
        starts.append((weights, microbatches[0].ids.tolist()))
        return original(self, microbatches)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    for kind in ("none", "dropkey"):
        runs.train(tmp_path, f"regularizer={kind}", "trainer.max_steps=1")
    assert runs.unequal(starts[0], starts[1]) is None


def test_other_consumers_of_random_numbers_do_not_change_the_masks(tmp_path, monkeypatch):
    plain = runs.train(tmp_path / "plain")
    original = trainer.Trainer.step

    def draw_something_else(*_):
        torch.rand(3)

    def step(self, microbatches):
        handle = self.model.patch_embed.register_forward_hook(draw_something_else)
        loss = original(self, microbatches)
        handle.remove()
        return loss

    monkeypatch.setattr(trainer.Trainer, "step", step)
    disturbed = runs.train(tmp_path / "disturbed")
    assert runs.unequal(runs.state(plain), runs.state(disturbed)) is None


def test_a_long_epoch_is_saved_within_too(tmp_path, monkeypatch):
    def crash(loop):
        raise MemoryError

    runs.on_step(monkeypatch, 5, crash)
    with pytest.raises(MemoryError):
        runs.train(tmp_path, "trainer.checkpoint_minutes=1e-9")
    (path,) = tmp_path.iterdir()
    assert runs.state(RunDirectory(path))["position"]["global_step"] == 4  # the second epoch's first step


def test_a_checkpoint_of_another_version_s_model_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        runs.on_step(patch, 2, runs.send())
        runs.train(tmp_path)
    (path,) = tmp_path.iterdir()
    kept = checkpoint.load(path / "checkpoints" / "last.pt")
    kept["model"] = {name: value for name, value in kept["model"].items() if "norm" not in name}
    checkpoint.save(kept, path / "checkpoints" / "last.pt")
    with pytest.raises(ConfigError, match=r"another version .* Missing key.*norm.*overwrite=true") as told:
        runs.train(tmp_path)
    assert "\n" not in str(told.value)
