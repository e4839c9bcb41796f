"""Small runs of the detection task, here and in the processes of a job: canvases of 24 pixels, few to evaluate."""

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import distributed_run
import fault_runs
import runs
from dropkey import evaluation
from dropkey.config.schema import EvalConfig, EvaluationConfig
from dropkey.datasets import digit_scenes
from dropkey.detection.scenes import SceneBatch
from dropkey.engine.trainer import Trainer
from dropkey.tasks.detection import Detection

WORDS = (
    *("task=detection", "model=detr_digits", "data=digit_scenes", "model.pretrained=false", "data.image_size=24"),
    *("optim.clip_grad_norm=1.0", "optim.lr=1e-3", "trainer.epochs=2", "data.max_train_samples=48"),
)  # 3 steps per epoch
EVERYTHING = (
    *("data.in_memory=false", "data.num_workers=1", "trainer.grad_accum_steps=2", "trainer.ema_decay=0.9"),
    *("trainer.amp=bf16", "augment.hflip=0.5", "task.args={scales: [24, 32], crop_sides: [14, 20], eval_scale: 28}"),
)
HELD_OUT = 13  # divides by no number of processes


def prepare() -> None:
    digit_scenes.HELD_OUT = HELD_OUT
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a program that tests did not start


def main(output: str, overrides: tuple[str, ...]) -> None:
    prepare()
    distributed_run.main(output, (*WORDS, *overrides))


@dataclass(frozen=True)
class Cell(fault_runs.Cell):
    """One run for each moment."""

    def config(self, output: Path):
        number = ("within an epoch", "at its end", "in evaluation").index(self.moment)
        words = (f"regularizer={self.regularizer}", f"schedule={self.schedule}", f"seed={number}")
        return runs.config(output, *WORDS, *EVERYTHING, "regularizer.layers=[self,cross]", *words)


def begin(cells: list[Cell], output: Path) -> None:
    prepare()
    fault_runs.begin(cells, output)


def resume(cells: list[Cell], output: Path) -> None:
    prepare()
    fault_runs.resume(cells, output)


def poisoned(output: Path) -> None:
    prepare()
    fault_runs.poisoned(output, *WORDS, *EVERYTHING)


def damaged(output: Path, words: tuple[str, ...], picture: Path) -> None:
    """A picture is cut short after step 3, the last of the first epoch."""
    prepare()
    original = Trainer.step

    def step(self, microbatches):
        if self.state.position.global_step == 2:
            picture.write_bytes(picture.read_bytes()[:200])
        return original(self, microbatches)

    Trainer.step = step
    fault_runs.command(output, *words)


def outputs(batch: SceneBatch, queries: int = 8, move: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model would give that finds all, with its boxes moved by a share of the image."""
    probabilities, boxes = torch.zeros(len(batch), queries, 11), torch.full((len(batch), queries, 4), 0.5)
    probabilities[..., -1] = 1
    for row, (labels, true) in enumerate(zip(batch.labels, batch.boxes, strict=True)):
        probabilities[row, range(len(labels)), labels] = 0.9 + 0.01 * batch.ids[row] / 100
        boxes[row, : len(true)] = true + torch.tensor([move, 0, 0, 0])
    return probabilities, boxes


def evaluated(run: Path, output: Path, sizes: tuple[int, ...]) -> None:
    """The figures of a run with batches of those sizes, of all processes of the job, to a file. In place of the model
    one that finds all, but a little aside: training takes too long."""
    prepare()
    Detection.predict = lambda self, model, batch: outputs(batch, move=0.03)
    found = {}
    for number, size in enumerate(sizes):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # the processes find each other anew
        cfg = EvalConfig(run=str(run), eval=EvaluationConfig(batch_size=size, device="cpu"))
        found[str(size)], _ = evaluation.evaluate_run(cfg, runs.config(run.parent, *WORDS), run)
    output.write_text(json.dumps(found))
