"""A trained run as a model to use: `dropkey.load(run)`. Needs the run directory alone, not its images."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

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
from dropkey.tasks.base import Task
from dropkey.tasks.preprocessing import ImageTransform, Picture
from dropkey.weights import find_checkpoint, load_weights


@dataclass
class Predictions:
    """Of B images."""

    probabilities: Tensor  # float32 (B, classes) on the CPU; with monte_carlo the mean of the passes
    spread: Optional[Tensor]  # the same shape: standard deviation over the passes; None without monte_carlo
    classes: list[str]

    def top(self, k: int = 5) -> list[list[dict]]:
        """For each image its `k` most probable classes, the first first: {"label": ..., "score": ...}, and with
        monte_carlo "spread"."""
        scores, ids = self.probabilities.topk(min(k, len(self.classes)))
        found = []
        for row, (values, positions) in enumerate(zip(scores.tolist(), ids.tolist(), strict=True)):
            found.append([{"label": self.classes[i], "score": p} for i, p in zip(positions, values, strict=True)])
            if self.spread is not None:
                for choice, position in zip(found[-1], positions, strict=True):
                    choice["spread"] = self.spread[row, position].item()
        return found


@dataclass
class TrainedModel:
    """What `load` returns."""

    model: nn.Module  # in evaluation mode and without the regularizer: (B, C, H, W) -> logits (B, classes)
    transform: ImageTransform
    classes: list[str]  # in the order of the logits
    config: TrainConfig
    info: dict  # model.json of the run, which is what timm's config.json is
    device: torch.device
    weights: Path  # the file they are from

    @torch.inference_mode()
    def predict(
        self, images: Picture | Sequence[Picture] | Tensor, *, monte_carlo: int = 0, batch_size: int = 64
    ) -> Predictions:
        """Probabilities of the classes, computed as in the evaluation of training (with its autocast).

        Args:
            images: a path or PIL image, several of them, or what `transform` made of them: float B C H W.
            monte_carlo: the mean of this many passes with the regularizer on, 2 or more, and their spread; 0: one pass
                without it. Masks follow from the run's seed, so a second call gives the same.
        Raises:
            DataError: an image that cannot be read.
            ConfigError: monte_carlo for a run without regularizer.
        """
        if isinstance(images, Picture):
            images = [images]
        if monte_carlo == 1 or monte_carlo < 0:
            raise ConfigError(f"monte_carlo={monte_carlo} has no spread; take 2 passes or more, or 0 for one without")
        means, spreads = [], []
        with self.regularized() if monte_carlo else contextlib.nullcontext():
            for number, start in enumerate(range(0, len(images), batch_size)):
                some = images[start : start + batch_size]
                batch = some if isinstance(some, Tensor) else torch.stack([self.transform(image) for image in some])
                passes = list(self.passes(batch.to(self.device), number, monte_carlo))
                means.append(torch.stack(passes).mean(0))
                spreads.append(torch.stack(passes).std(0) if monte_carlo else None)
        if not means:
            raise DataError("predict was given no images")
        return Predictions(torch.cat(means), torch.cat(spreads) if monte_carlo else None, self.classes)

    def passes(self, batch: Tensor, number: int, monte_carlo: int) -> Iterator[Tensor]:
        """Probabilities of batch `number`: of one pass, or of so many with masks of their own."""
        for index in range(max(monte_carlo, 1)):
            if monte_carlo:
                patching.seed_masks(self.model, derive_seed(self.config.seed, "monte carlo", number, index, 0))
            with build_autocast(self.config.trainer.amp, self.device)():
                logits = self.model(batch)
            yield logits.float().softmax(-1).cpu()

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
    known = (directory.path / "model.json").exists()
    info = directory.read_json("model.json") if known else info_from_data(directory.path, cfg, root)
    require(
        "label_names" in info,
        f"{directory.path}/model.json has no label_names: it was edited, or task={cfg.task.name} "
        "does not say how its model is used (Task.model_info)",
    )
    if wrong := task.info_fault(info):
        raise StorageError(f"{directory.path / 'model.json'} is damaged: {wrong}; delete it, and it is made again")
    model = initial_model(task, info, fused=not (place.type == "cpu" and cfg.trainer.amp == "bf16"))
    if load_weights(model, file):
        raise ConfigError(f"{file} has other classes than the {len(info['label_names'])} of the run")
    if not known:
        with contextlib.suppress(StorageError, OSError):  # somebody else's run, say: it is read again next time
            write_json(directory.path / "model.json", info)
    return TrainedModel(model.to(place).eval(), task.transform(), info["label_names"], cfg, info, place, file)


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
