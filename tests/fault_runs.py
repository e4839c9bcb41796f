"""What tests of faults run in processes of their own: trainings that are interrupted, poisoned or started at once."""

import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import regression_task
import runs
from data_samples import counted
from dropkey import cli, plotting, session
from dropkey.config.check import check
from dropkey.config.identity import run_directory
from dropkey.data import eval_loader
from dropkey.engine import checkpoint, trainer
from dropkey.engine.distributed import DistContext
from dropkey.engine.evaluate import evaluate
from dropkey.engine.trainer import Trainer
from dropkey.errors import Interrupted
from dropkey.records import RunDirectory
from dropkey.tasks.classification import ClassificationScores

# --------------------------------------------------------------------------- the grid of interruptions (case 1)

MOMENTS = ("within an epoch", "at its end", "after evaluation")
OPTIONS = {
    "drop-path": {"model.drop_path": 0.2},
    "mixup": {"augment.mixup": 0.8},
    "accumulation": {"trainer.grad_accum_steps": 2},
    "moving average": {"trainer.ema_decay": 0.9},
}


@dataclass(frozen=True)
class Cell:
    regularizer: str
    schedule: str
    option: str
    moment: str

    def run(self, output: Path) -> RunDirectory:
        return RunDirectory(run_directory(self.config(output)))

    def config(self, output: Path):
        """Set in the config of another cell, as composing each takes longer than its training."""
        cfg = copy.deepcopy(runs.composed(f"regularizer={self.regularizer}", "trainer.epochs=2"))
        for key, value in {"output": str(output), "schedule.name": self.schedule, **OPTIONS[self.option]}.items():
            *parents, last = key.split(".")
            setattr(getattr(cfg, parents[0]) if parents else cfg, last, value)
        return check(cfg)


def begin(cells: list[Cell], output: Path) -> None:
    """Each cell trained to its end, and again until a signal to the last process."""
    for cell in cells:
        train(cell, output / "whole")
        with stopped_by_signal(cell.moment), contextlib.suppress(Interrupted):
            train(cell, output / "parts")
            raise AssertionError(f"{cell} was not interrupted")


def resume(cells: list[Cell], output: Path) -> None:
    for cell in cells:
        train(cell, output / "parts")


def train(cell: Cell, output: Path) -> None:
    plotting.curves = lambda *args: None
    trainer.MEETING_SECONDS = 0.0  # each step
    meet_anew()
    session.train(cell.config(output), cell.run(output))


def meet_anew() -> None:
    """Before each training of several in a job: its processes find each other anew, as after a restart."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(next(MEETINGS))


MEETINGS = itertools.count()


def wrong_cells(cells: list[Cell], output: Path) -> dict[Cell, list]:
    """Those of which the resumed run is not equal to the whole one."""
    wrong = {}
    for cell in cells:
        whole, parts = cell.run(output / "whole"), cell.run(output / "parts")
        same = [runs.unequal(runs.state(whole, file), runs.state(parts, file)) for file in ("last.pt", "best.pt")]
        resumed = "resuming" in (parts.path / "log.txt").read_text()
        if any(same) or not resumed or runs.records(whole) != runs.records(parts):
            wrong[cell] = same
    return wrong


def stopped_by_signal(moment: str):
    """SIGTERM to the last process: after step 4 (the first of the second epoch) or 3 (the last of the first one), or
    in or after its evaluation."""
    name = {"in evaluation": "evaluate", "after evaluation": "finish_epoch"}.get(moment, "settle")
    original, step = getattr(Trainer, name), 4 if moment == "within an epoch" else 3

    def wrapped(self, *args, **kwargs):
        if self.state.position.global_step == step and self.dist.rank == self.dist.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    return mock.patch.object(Trainer, name, wrapped)


# ------------------------------------------------------------------------------- signals at all moments (case 15)


def train_and_signal(output: Path, number: int, moment: str, words: tuple[str, ...]) -> None:
    """train.py, with a signal to the process and its workers in a step, an evaluation or a save. Notes each save that
    begins afterwards in signal.txt."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a program that tests did not start
    signalled = []

    def with_signal(original, when):
        def wrapped(*args, **kwargs):
            if when(*args) and not signalled:
                signalled.append(time.time())
                (output / "signal.txt").write_text(f"{signalled[0]}\n")
                # from outside, as a shell or a scheduler sends it: workers obey a SIGTERM of their own parent
                subprocess.run(
                    ["kill", "-s", str(number), "--", f"-{os.getpgid(0)}"], check=True, start_new_session=True
                )
            return original(*args, **kwargs)

        return wrapped

    def save(*args, **kwargs):
        if signalled:
            with open(output / "signal.txt", "a") as file:
                file.write("save\n")
        return original_save(*args, **kwargs)

    original_save = checkpoint.save
    moments = {
        "step": (Trainer, "settle", lambda self, *_: self.state.position.global_step == 4),
        "evaluation": (trainer, "evaluate", lambda *_: True),
        "save": (checkpoint, "verify", lambda path: ".last.pt" in str(path)),  # written, not yet in its place
    }
    place, name, when = moments[moment]
    with (
        mock.patch.object(place, name, with_signal(getattr(place, name), when)),
        mock.patch.object(checkpoint, "save", save),
    ):
        command(output, *words)


def command(output: Path, *words: str) -> None:
    from dropkey.commands import train

    plotting.curves = lambda *args: None
    sys.argv = ["train.py", *runs.SMALL, f"output={output}", *words]
    with cli.command():
        train.main()


def command_after_a_while(output: Path, seconds: float) -> None:
    """Ranks that do not start at once (case 21)."""
    time.sleep(seconds * int(os.environ["RANK"]))
    command(output)


# --------------------------------------------------------------------------------------------- other processes


def poisoned(output: Path, *words: str) -> None:
    """A loss that is not finite in the second process alone, at step 5 (case 22)."""
    original = Trainer.step

    def step(self, batches):
        if (self.state.position.global_step, self.dist.rank) == (4, 1):
            losses = self.task.losses
            self.task.losses = lambda model, batch: {k: v * float("nan") for k, v in losses(model, batch).items()}
        return original(self, batches)

    Trainer.step = step
    command(output, *words)


def evaluate_all_sizes(file: Path) -> None:
    """Test splits of 12 to 17 images in batches of 1 to 6, by all processes of the job (case 18)."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)), {}
    with DistContext.start("cpu") as dist:
        for size in range(12, 18):
            dataset, data = counted(size)
            for batch in range(1, 7):
                loader = eval_loader(
                    dataset, "test", data, batch_size=batch, rank=dist.rank, world_size=dist.world_size
                )
                scores = ClassificationScores()
                result = evaluate(lambda b: model(b.images), scores, loader, dist)
                result["correct"] = scores.correct(dist).tolist()
                found[f"{size} in {batch}"] = result
        if dist.is_main:
            file.write_text(json.dumps(found))


class SparePart(regression_task.Regression):
    """A model with parameters that no step uses (case 19)."""

    def build_model(self, data, *, pretrained: bool, fused: bool) -> nn.Module:
        model = super().build_model(data, pretrained=pretrained, fused=fused)
        model.spare = nn.Linear(4, 4)
        return model


def train_without_the_service_of_wandb(output: Path) -> None:
    """Its process is killed after step 4 (case 27)."""
    original = Trainer.step

    def step(self, microbatches):
        begun = original(self, microbatches)
        if self.state.position.global_step == 4:
            for pid in services():
                os.kill(pid, signal.SIGKILL)
                with open(output / "killed.txt", "a") as file:
                    file.write(f"{time.time()}\n")
        return begun

    Trainer.step = step
    command(output, "logger=wandb")


def services() -> list[int]:
    """The processes of W&B below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (path / "status").read_text()
            if f"PPid:\t{os.getpid()}\n" in status and b"wandb" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found
