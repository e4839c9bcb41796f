"""A trained run as a model to use: `dropkey.load(run)`. Needs the run directory alone, not its images."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from dropkey import origin, patching, tasks
from dropkey.build import last_ratio, regularize
from dropkey.config import compose
from dropkey.config.check import require
from dropkey.config.run_lookup import find_run
from dropkey.config.schema import TrainConfig
from dropkey.engine.distributed import pick_device
from dropkey.engine.optim import build_autocast
from dropkey.errors import ConfigError, DataError, StorageError
from dropkey.records import RunDirectory, write_json
from dropkey.seeds import derive_seed
from dropkey.tasks.base import Batch, Task
from dropkey.tasks.preprocessing import Picture
from dropkey.weights import find_checkpoint, load_weights


@dataclass(repr=False)
class TrainedModel:
    """What `load` returns."""

    model: nn.Module  # in evaluation mode and without the regularizer; of classes: (B, C, H, W) -> logits (B, classes)
    task: Task
    transform: Callable[[Any], Any]  # makes of an image what `predict` takes; for classes: float C H W
    classes: list[str]  # in the order of the logits; of meshes the joints
    config: TrainConfig
    info: dict  # model.json of the run, which is what timm's config.json is
    device: torch.device
    weights: Path  # the file they are from

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        kind = f"{self.config.task.name} with {len(self.classes)} labels ({names})"
        return f"<TrainedModel {self.config.model.name}: {kind}, {self.device.type}, from {self.weights}>"

    @torch.inference_mode()
    def predict(
        self,
        images: Picture | Sequence[Picture] | Tensor,
        *,
        monte_carlo: int = 0,
        batch_size: Optional[int] = None,
        threshold: Optional[float] = None,
    ) -> Any:
        """Computed as in the evaluation of training (with its autocast).

        Args:
            images: a path or PIL image, several of them, or what `transform` made of them (of classes also as one
                tensor B C H W).
            monte_carlo: the mean of this many passes with the regularizer on, 2 or more, and their spread; 0: one pass
                without it. Masks follow from the run's seed, so a second call gives the same.
            batch_size: None: 64, or as many as the task says.
            threshold: of boxes, the least score; None: 0.5.
        Returns:
            `Predictions` with the probabilities of classes; of a run that finds boxes a list for each image, the surest
            first: {"label": ..., "score": ..., "box": [left, top, right, bottom]} in pixels of the image; of one that
            finds meshes `FoundMeshes`, with vertices, joints, camera, and the joints in pixels of the image.
        Raises:
            DataError: an image that cannot be read.
            ConfigError: monte_carlo for a run without regularizer; a threshold for a run of classes.
        """
        images = [images] if isinstance(images, Picture) else images
        if monte_carlo == 1 or monte_carlo < 0:
            raise ConfigError(f"monte_carlo={monte_carlo} has no spread; take 2 passes or more, or 0 for one without")
        require(threshold is None or 0 <= threshold <= 1, f"threshold={threshold} must be in [0, 1]")
        if not len(images):
            raise DataError("predict was given no images")
        with self.regularized() if monte_carlo else contextlib.nullcontext():
            outputs = self.outputs(images, monte_carlo, batch_size or self.task.at_a_time)
            return self.task.answers(outputs, self.info, threshold)

    def outputs(self, images, monte_carlo: int, batch_size: int) -> Iterator[tuple[list, Batch]]:
        """What the task predicts for each batch: once, or in so many passes with masks of their own."""
        for number, start in enumerate(range(0, len(images), batch_size)):
            some, passes = images[start : start + batch_size], []
            if not isinstance(some, Tensor):
                some = [self.transform(image) if isinstance(image, Picture) else image for image in some]
            batch = self.task.collate(some, self.device)
            for index in range(max(monte_carlo, 1)):
                if monte_carlo:
                    patching.seed_masks(self.model, derive_seed(self.config.seed, "monte carlo", number, index, 0))
                with build_autocast(self.config.trainer.amp, self.device)():
                    passes.append(self.task.predict(self.model, batch))
            yield passes, batch

    @contextlib.contextmanager
    def regularized(self) -> Iterator[None]:
        """Within, the run's regularizer is in `model` and acts, in evaluation mode, with the ratio that training ended
        with."""
        ratio = last_ratio(self.config)
        if self.config.regularizer.name == "none" or ratio == 0:
            raise ConfigError("monte_carlo: this run has no regularizer that could be left on")
        cfg = copy.deepcopy(self.config)
        cfg.regularizer.impl = "auto"  # the implementation used in training may not exist here
        regularize(self.model, cfg)
        patching.set_ratio(self.model, ratio)
        try:
            with patching.always_on(self.model):
                yield
        finally:
            patching.undo(self.model)


def load(
    run: str | Path, weights: str | Path = "last", *, device: str = "auto", root: str | Path | None = None
) -> TrainedModel:
    """The model of a trained run, ready to use.

    Args:
        run: its path, name, hash, the beginning of one, or a pattern.
        weights: last, best, or a checkpoint file of this architecture. A moving average is taken where there is one.
        device: auto (the first available of cuda, mps, cpu), or one of these.
        root: where the run's images are now; needed once for a run made before there was model.json.
    Raises:
        ConfigError: no such run or device; weights of another model; a task that does not say how its model is used.
        StorageError: no checkpoint, or a damaged one.
    """
    directory = RunDirectory(find_run(str(run)))
    cfg, place = compose.load(directory.config), pick_device(device, key="device")
    origin.require_same_config(directory, cfg)
    file, task = weights_file(directory.path, weights), tasks.build(cfg)
    info = directory.read_json("model.json")
    if not (known := "architecture" in info):
        info |= info_from_data(directory.path, cfg, root)
    require("architecture" in info, f"task={cfg.task.name} does not say how its model is used (Task.model_info)")
    if wrong := task.info_fault(info):
        raise StorageError(f"{directory.path / 'model.json'} is damaged: {wrong}; delete it, and it is made again")
    model = initial_model(task, info, fused=not (place.type == "cpu" and cfg.trainer.amp == "bf16"))
    if load_weights(model, file):
        raise ConfigError(f"{file} has other classes than the {len(info.get('label_names', []))} of the run")
    if not known:
        with contextlib.suppress(StorageError, OSError):  # somebody else's run, say: it is read again next time
            write_json(directory.path / "model.json", info)
    model, classes = model.to(place).eval(), info.get("label_names", [])
    return TrainedModel(model, task, task.transform(), classes, cfg, info, place, file)


def weights_file(directory: Path, wanted: str | Path) -> Path:
    if wanted in ("last", "best"):
        return find_checkpoint(directory, str(wanted))
    require(Path(wanted).is_file(), f"weights={wanted} is no file; it may also be last or best")
    return Path(wanted)


def initial_model(task: Task, info: dict, fused: bool = True) -> nn.Module:
    """The run's architecture with initial weights, on the CPU; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return task.build_model(task.data_facts(info), pretrained=False, fused=fused)


def info_from_data(directory: Path, cfg: TrainConfig, root: str | Path | None) -> dict:
    """model.json of a run made before there was one, with the classes of its data.

    Raises:
        ConfigError: they are not there.
    """
    cfg = copy.deepcopy(cfg)
    cfg.data = replace(cfg.data, download=False, in_memory=False, max_train_samples=None, val_fraction=0.0)
    cfg.data.root = str(root or cfg.data.root)
    task = tasks.build(cfg)
    try:
        data = task.load_data()
    except DataError as error:
        lacks = "was made before runs kept their classes in model.json; they can be read once from its images"
        raise ConfigError(f"{directory} {lacks}: root=<where these are now> ({error})") from None
    with torch.random.fork_rng(devices=[]):
        return task.model_info(data, task.build_model(data, pretrained=False, fused=True))
