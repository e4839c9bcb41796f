"""Trained runs, opened for analysis: the model as it is evaluated, and the same test images for all."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from torch import Tensor, nn

from dropkey import tasks, weights
from dropkey.build import build_regularized
from dropkey.config import compose
from dropkey.config.schema import RegularizerConfig, TrainConfig
from dropkey.engine import checkpoint
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory
from dropkey.tasks.base import Task


@dataclasses.dataclass
class Trained:
    """A run, opened: its model in evaluation mode without a regularizer, weights as they are evaluated."""

    run: RunDirectory
    cfg: TrainConfig
    model: nn.Module
    dataset: Any
    dist: DistContext
    task: Task
    position: dict[str, int]  # `epoch` and `global_step` of the checkpoint

    def batches(self, ids: Tensor) -> Iterator:
        """Batches of the task with the test samples at those positions."""
        return self.task.samples(self.dataset, "test", ids, self.dist)

    def images(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images as the model takes them, and as people see them (both B C H W, the latter in [0, 1] on the CPU)."""
        batches = list(self.batches(ids))
        return torch.cat([b.images for b in batches]), torch.cat([self.task.pictures(b) for b in batches])

    def pictures(self, ids: Tensor) -> list[Tensor]:
        """As people see them, C H W each: where images have sizes of their own."""
        return [picture for batch in self.batches(ids) for picture in self.task.pictures(batch)]

    def names(self, ids: Tensor) -> list[str]:
        return self.task.sample_names(self.dataset, "test", ids)

    def positions(self, ids: tuple[int, ...]) -> Tensor:
        """Raises ConfigError for a position that the test split does not have."""
        size = len(self.dataset.test)
        for number in ids:
            if not 0 <= number < size:
                raise ConfigError(f"images={number}: the test split has {size} images, 0 to {size - 1}")
        return torch.tensor(ids)

    def spread(self, count: int) -> Tensor:
        """Positions of `count` test images (at most all), evenly over the split: folders are sorted by class, so the
        first images would all be of one class. Not random, so that runs are compared on the same images."""
        size = len(self.dataset.test)
        return torch.arange(min(count, size)) * size // min(count, size)


def config_of(path: str | Path) -> TrainConfig:
    """The config of a run directory, without opening the run.

    Raises:
        ConfigError: there is none.
    """
    file = Path(path) / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{path} is not a run directory: it has no config.yaml")
    return compose.load(file)


def open_run(path: str | Path, root: Optional[str] = None) -> Trained:
    """The last checkpoint of a run, on a GPU if there is one.

    Args:
        root: the directory of the run's images now; None: as in training.
    Raises:
        ConfigError, DataError, StorageError: see dropkey.errors.
    """
    cfg, run = copy.deepcopy(config_of(path)), RunDirectory(Path(path))
    cfg.regularizer = RegularizerConfig(name="none")  # nothing is dropped in evaluation
    # the test split is all that is needed: runs that differ in their training images share one data set
    cfg.data = dataclasses.replace(cfg.data, root=root or cfg.data.root, max_train_samples=None, val_fraction=0.0)
    dist = DistContext.start("auto")
    task = tasks.build(cfg)
    dataset = loaded(task)
    model, _ = build_regularized(task, dataset, dist)
    file = weights.find_checkpoint(run.path)
    if weights.load_weights(model, file):
        raise ConfigError(
            f"{file} has other classes than {cfg.data.root} ({task.describe_data(dataset)}); give root=<its images>"
        )
    position = checkpoint.load(file)["position"]
    return Trained(
        run, cfg, model.eval(), dataset, dist, task, {key: position[key] for key in ("epoch", "global_step")}
    )


_latest: dict[str, Any] = {}  # only the data set loaded last


def loaded(task: Task) -> Any:
    key = repr((task.cfg.task, task.cfg.data))
    if key not in _latest:
        _latest.clear()
        _latest[key] = task.load_data()
    return _latest[key]
