"""Small runs of every task, here and in the processes of a job: canvases of digits, stick figures, sets of points, and
folders of pictures."""

import contextlib
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import fault_runs
import regression_task
import runs
import task_folders
from dropkey import plotting, session, tasks
from dropkey.config.identity import run_directory
from dropkey.datasets import digit_pairs, digit_scenes, stick_figures
from dropkey.detection.pair_loss import targets
from dropkey.detection.scenes import SceneBatch
from dropkey.engine.distributed import DistContext
from dropkey.engine.evaluate import evaluate
from dropkey.engine.trainer import Trainer
from dropkey.errors import DataError, Diverged
from dropkey.mesh.samples import MeshBatch
from dropkey.records import RunDirectory

TASKS = ("detection", "interaction", "mesh")
SHORT = ("optim.clip_grad_norm=1.0", "optim.lr=1e-3", "trainer.epochs=2")  # of 3 steps
DIGITS = ("model.pretrained=false", "data.image_size=24")
FIGURES = ("model=metro_figures", "model.embed_dim=null", "model.depth=1", "data.image_size=32")
WORDS = {
    "detection": ("task=detection", "model=detr_digits", "data=digit_scenes", *DIGITS, *SHORT),
    "interaction": ("task=interaction", "model=qpic_digits", "data=digit_pairs", *DIGITS, *SHORT),
    "mesh": ("task=mesh", "data=stick_figures", *FIGURES, *SHORT),
    "regression": (*regression_task.OVERRIDES, *SHORT),
}
HELD_OUT = 13  # canvases and figures for evaluation: divides by no number of processes

# From files, with everything on; `task_folders.write` makes the files.
SIZES = "task.args={scales: [32, 40], max_size: 64, crop_scales: [32], crop_sides: [20, 30], eval_scale: 32}"
PAIRS = ("model.pretrained=false", SIZES, "regularizer.layers=[self,cross]")
OF_FILES = {
    "detection": ("task=detection", "model=detr_digits", "data=coco", "augment.hflip=0.5", *PAIRS),
    "interaction": ("task=interaction", "model=qpic_digits", "data=hico_det", "augment.hflip=0.5", *PAIRS),
    "mesh": ("task=mesh", "data=mesh_folder", "data.val_fraction=0", *FIGURES, "task.args={rotation: 20}"),
}
EVERYTHING = (
    *("data.in_memory=false", "data.num_workers=1", "data.max_train_samples=null", "trainer.batch_size=4"),
    *("trainer.grad_accum_steps=2", "trainer.ema_decay=0.9", "trainer.amp=bf16", *SHORT),
)


def few() -> contextlib.AbstractContextManager:
    """HELD_OUT images for evaluation, here and in processes that are forked from here."""
    patches = contextlib.ExitStack()
    for place in (digit_scenes, stick_figures):
        patches.enter_context(mock.patch.object(place, "HELD_OUT", HELD_OUT))
    return patches


def on_files(task: str, root: Path) -> tuple[str, ...]:
    return *OF_FILES[task], *EVERYTHING, f"data.root={root}"


@dataclass(frozen=True)
class Cell(fault_runs.Cell):
    """Its `option` is the task."""

    root: str = ""

    def config(self, output: Path):
        words = (f"regularizer={self.regularizer}", f"schedule={self.schedule}")
        return runs.config(output, *on_files(self.option, self.root), *words, f"seed={MOMENTS.index(self.moment)}")


MOMENTS = ("within an epoch", "at its end", "in evaluation")

# ------------------------------------------------------------------------------------------- in processes of a job


def prepare() -> None:
    few().__enter__()
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a program that tests did not start
    plotting.curves = lambda *args: None


def begin(cells: list[Cell], output: Path) -> None:
    prepare()
    fault_runs.begin(cells, output)


def resume(cells: list[Cell], output: Path) -> None:
    prepare()
    fault_runs.resume(cells, output)


def damage(roots: dict[str, Path], output: Path) -> None:
    """Of each task a picture for training is cut short after the first epoch."""
    prepare()
    for task, root in roots.items():
        picture = task_folders.picture(task, root)
        with changed_step(2, lambda loop, batches, file=picture: file.write_bytes(file.read_bytes()[:200])):
            try:
                runs.train(output, *on_files(task, root))
            except DataError as error:
                (output / f"{task}.txt").write_text(str(error))


def damage_for_all(task: str, root: Path, output: Path) -> None:
    """The same in a job, as train.py ends then."""
    prepare()
    picture = task_folders.picture(task, root)
    with changed_step(2, lambda loop, batches: loop.dist.is_main and picture.write_bytes(b"none")):
        fault_runs.command(output, *on_files(task, root))


def two_at_once(cells: list[Cell], output: Path) -> None:
    """All that quick tests ask of two processes: cells that are interrupted and resumed, a run of each task, images
    that are not finite, and evaluations."""
    begin(cells, output)
    fault_runs.resume(cells, output)
    for words in WORDS.values():
        fault_runs.meet_anew()
        runs.train(output / "two", *words, *runs.ONE_EPOCH)
    for cell in cells:
        fault_runs.meet_anew()
        poisoned(cell, output / "poisoned")
    fault_runs.meet_anew()
    evaluated(output / "evaluated.json", 1, 5)


def poisoned(cell: Cell, output: Path) -> None:
    """The last process sees images that are not finite at step 5."""

    def poison(loop: Trainer, batches: list) -> None:
        if loop.dist.rank == loop.dist.world_size - 1:
            batches[0].images.fill_(float("nan"))

    with changed_step(4, poison), contextlib.suppress(Diverged):
        session.train(cell.config(output), cell.run(output))
        raise AssertionError(f"{cell} did not diverge")


def changed_step(number: int, action: Callable[[Trainer, list], None]):
    """`action` is called before the step after step `number`."""
    original = Trainer.step

    def step(self, batches):
        if self.state.position.global_step == number:
            action(self, batches)
        return original(self, batches)

    return mock.patch.object(Trainer, "step", step)


def evaluated(file: Path, *sizes: int) -> None:
    """The figures of every task with batches of these sizes, of all processes, where a model finds all, but a little
    aside."""
    figures = {}
    with few(), DistContext.start("cpu") as dist:
        for name, found in FOUND.items():
            task, data = opened(name)
            figures[name] = {
                str(size): evaluate(found, task.scores(), task.eval_loader(data, "test", dist, size), dist)
                for size in sizes
            }
        if dist.is_main:
            file.write_text(json.dumps(figures))


def opened(name: str, *words: str):
    """The task, which has seen its model, and its data."""
    task = tasks.build(runs.config(Path("nowhere"), *WORDS[name], *words))
    data = task.load_data()
    task.build_model(data, pretrained=False, fused=True)
    return task, data


def close(figures: dict, expected: dict, rel: float = 1e-12, **tolerance) -> bool:
    """Those of an evaluation, None where there is none."""
    return figures.keys() == expected.keys() and all(
        value is expected[key] if value is None else value == pytest.approx(expected[key], rel=rel, **tolerance)
        for key, value in figures.items()
    )


def directory(output: Path, *words: str) -> RunDirectory:
    return RunDirectory(run_directory(runs.config(output, *words)))


# ------------------------------------------------------------------------------- what a model would give that finds all


def boxes(batch: SceneBatch, queries: int = 8, move: float = 0.0) -> tuple[Tensor, Tensor]:
    """With its boxes moved by a share of the image."""
    probabilities, places = torch.zeros(len(batch), queries, 11), torch.full((len(batch), queries, 4), 0.5)
    probabilities[..., -1] = 1
    for row, (labels, true) in enumerate(zip(batch.labels, batch.boxes, strict=True)):
        probabilities[row, range(len(labels)), labels] = 0.9 + 0.01 * batch.ids[row] / 100
        places[row, : len(true)] = true + torch.tensor([move, 0, 0, 0])
    return probabilities, places


def paired(batch: SceneBatch, queries: int = 8, move: float = 0.0, shuffled: bool = False) -> list[Tensor]:
    """With its objects' boxes moved by a share of the image, or with the verbs of other pairs."""
    size, count = (len(batch), queries), len(digit_pairs.VERBS)
    objects, verbs = torch.zeros(*size, 11), torch.zeros(*size, count)
    places = [torch.full((*size, 4), 0.5) for _ in range(2)]
    objects[..., -1] = 1
    for image, pairs in enumerate(targets(batch, count)):
        n = range(len(pairs))
        objects[image, n, pairs.objects] = 0.9 + 0.01 * batch.ids[image] / 100
        verbs[image, n] = 0.9 * (pairs.verbs.roll(1, -1) if shuffled else pairs.verbs)
        places[0][image, n] = pairs.subject_boxes
        places[1][image, n] = pairs.object_boxes + torch.tensor([move, 0, 0, 0])
    return [objects, verbs, *places]


def off(batch: MeshBatch) -> tuple[Tensor, Tensor]:
    """Meshes that are off by another amount in each sample."""
    shape = batch.vertices.shape[1:]
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i in batch.ids.tolist()]
    return batch.vertices + 0.01 * batch.ids[:, None, None] * torch.stack(noise), torch.zeros(len(batch), 3)


FOUND: dict[str, Callable] = {
    "detection": lambda batch: boxes(batch, move=0.03),
    "interaction": lambda batch: paired(batch, move=0.06),
    "mesh": off,
    "regression": lambda batch: batch.targets + batch.ids[:, None],
}
