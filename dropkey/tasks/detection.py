"""Object detection: boxes with classes, by DETR and the set loss."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from types import SimpleNamespace
from typing import Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dropkey import data as loaders
from dropkey import datasets
from dropkey.config.schema import AugmentConfig, ModelConfig, TrainConfig
from dropkey.data.augment import Normalize, denormalized, per_channel
from dropkey.detection.average_precision import FIGURES, average_precision
from dropkey.detection.boxes import Augment, Sample, fitted
from dropkey.detection.scenes import EvalLoader, SceneBatch, Scenes, TrainLoader, batched
from dropkey.detection.set_loss import normalisers, set_losses
from dropkey.detection.warm_up import warm_up
from dropkey.errors import ConfigError, DataError
from dropkey.metrics import Metric
from dropkey.models import constructor_arguments, create_model
from dropkey.models.detr import DETR, SmallBackbone
from dropkey.tasks.base import Task, split_sizes
from dropkey.tasks.marks import Mark, corners, judged
from dropkey.tasks.photos import Detections, LastLevel, Photo, Photos, PhotoSplit, truths
from dropkey.tasks.preprocessing import info_fault

LEAST = 0.5  # score of a box that is shown
LABELS = dict(zip(FIGURES, ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"), strict=True))


class Detection(Task):
    """
    Args:
        scales, max_size, crop_scales, crop_sides, color_jitter: augmentation, see `dropkey.detection.boxes.Augment`.
        eval_scale: pixels of the shorter side in evaluation (the longer: max_size); None: images keep their size.
        warm_up_steps: with `model.pretrained`, how long the small backbone learns to tell what each cell of the
            training images shows, before anything else is trained; a ResNet has its ImageNet weights instead.
    """

    metrics = tuple(Metric(key, label, "%") for key, label in LABELS.items())
    network = DETR

    def __init__(
        self,
        cfg: TrainConfig,
        scales: Sequence[int] = (),
        max_size: Optional[int] = None,
        crop_scales: Sequence[int] = (),
        crop_sides: Sequence[int] = (),
        eval_scale: Optional[int] = None,
        warm_up_steps: int = 800,
        color_jitter: float = 0.0,
    ):
        super().__init__(cfg)
        unused = {**asdict(cfg.augment), "hflip": 0.0}
        for key, value in asdict(AugmentConfig()).items():
            if unused[key] != value:
                raise ConfigError(
                    f"augment.{key}={unused[key]} is for classification; task={cfg.task.name} has augment.hflip and "
                    "task.args: scales, max_size, crop_scales, crop_sides, color_jitter"
                )
        self.augment = Augment(cfg.augment.hflip, scales, max_size, crop_scales, crop_sides, color_jitter)
        self.eval_scale, self.warm_up_steps = eval_scale, warm_up_steps
        self.queries = 0  # of the model, once it is built

    def load_data(self) -> Scenes:
        cfg = self.cfg.data
        read = datasets.reader(cfg.name, datasets.SCENES, arguments=2)
        return read(cfg, self.cfg.seed if cfg.split_seed == "run" else cfg.split_seed)

    def describe_data(self, data: Scenes) -> str:
        return f"{split_sizes(data)} images with objects of {len(data.categories)} categories"

    def build_model(self, data: Scenes, *, pretrained: bool, fused: bool) -> nn.Module:
        cfg = self.cfg
        sizes = {"image_size": cfg.data.image_size, "channels": cfg.data.channels, "num_classes": data.labels}
        model = create_model(self.architecture(data), **sizes, pretrained=pretrained, fused=fused)
        if not isinstance(model, self.network):
            names = self.network.__name__.lower()
            raise ConfigError(
                f"model.name={cfg.model.name} finds no boxes for task={cfg.task.name}, which takes {names}_r50, "
                f"{names}_small ..."
            )
        self.queries = model.query_embed.num_embeddings
        if pretrained and isinstance(model.backbone[0], SmallBackbone):
            warm_up(model.backbone[0], data.train, self.normalize("cpu"), data.labels, self.warm_up_steps, cfg.seed)
        return model

    def architecture(self, data: Scenes) -> ModelConfig:
        return self.cfg.model

    def normalize(self, device) -> Normalize:
        return Normalize(self.cfg.data, torch.device(device))

    @property
    def workers(self) -> Optional[int]:
        """Processes that decode: none for images that are decoded already."""
        return 0 if self.cfg.data.in_memory else self.cfg.data.num_workers

    def train_loader(self, data: Scenes, dist) -> TrainLoader | loaders.FirstBatch:
        trainer = self.cfg.trainer
        parts = {"batch_size": trainer.batch_size, "grad_accum_steps": trainer.grad_accum_steps}
        parts |= {"seed": self.cfg.seed, "dist": dist, "workers": self.workers}
        loader = TrainLoader(data.train, self.augment, self.normalize(dist.device), **parts)
        return loaders.FirstBatch(loader, trainer.grad_accum_steps) if trainer.overfit else loader

    def eval_loader(self, data: Scenes, split: str, dist, batch_size=None) -> EvalLoader:
        if getattr(data, split) is None:
            raise DataError(f"there is no {split} split: data.val_fraction=0 holds nothing out; raise it")
        size = batch_size or self.cfg.trainer.eval_batch_size
        return EvalLoader(
            getattr(data, split), self.as_evaluated, self.normalize(dist.device), size, dist, self.workers
        )

    def as_evaluated(self, sample: Sample) -> Sample:
        if self.eval_scale is None:
            return sample
        return sample.resized(*fitted(sample.size, self.eval_scale, self.augment.max_size))

    def example(self, data: Scenes, dist) -> SceneBatch:
        cfg = self.cfg.data
        images = torch.zeros(1, cfg.channels, cfg.image_size, cfg.image_size, device=dist.device)
        return SceneBatch(images, None, [], [], [], [], torch.zeros(1, dtype=torch.int64))

    def planned_data(self) -> SimpleNamespace:
        cfg = self.cfg.data
        return SimpleNamespace(labels=cfg.num_classes or 10, train_samples=datasets.TRAIN_SAMPLES.get(cfg.name))

    def normalisers(self, batch: SceneBatch) -> dict[str, float]:
        return normalisers([len(labels) for labels in batch.labels], self.queries)

    def losses(self, model: nn.Module, batch: SceneBatch) -> dict[str, Tensor]:
        return set_losses(*model(batch.images, batch.padding), batch.labels, batch.boxes)

    def predict(self, model: nn.Module, batch: SceneBatch) -> tuple[Tensor, Tensor]:
        """Probabilities B Q K+1 and boxes B Q 4."""
        logits, boxes = model(batch.images, batch.padding)
        return logits[-1].float().softmax(-1), boxes[-1].float()

    def average(self, outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Query by query."""
        return tuple(torch.stack(each).mean(0) for each in zip(*outputs, strict=True))

    def scores(self) -> "DetectionScores":
        return DetectionScores()

    def samples(self, data: Scenes, split: str, ids: Tensor, dist) -> Iterator[SceneBatch]:
        some = getattr(data, split).subset(ids.tolist())
        yield from EvalLoader(some, self.as_evaluated, self.normalize(dist.device), 1, dist)  # alone: nothing is padded

    def pictures(self, batch: SceneBatch) -> Tensor:
        return denormalized(batch.images.cpu(), self.cfg.data)

    def sample_names(self, data: Scenes, split: str, ids: Tensor) -> list[str]:
        return [f"{split} {number}" for number in ids.tolist()]

    boxes_per_answer = 1
    named_boxes = ("box",)  # of an answer

    def strength(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """B Q groups: the score of every answer that a query could give."""
        return outputs[0][..., :-1]

    def marks(self, outputs: tuple[Tensor, Tensor], batch: SceneBatch, info: dict, threshold: float = LEAST):
        names, rows = info["label_names"], []
        for probabilities, boxes, record in zip(*outputs, batch.records, strict=True):
            scores, labels = (each.tolist() for each in probabilities[:, :-1].cpu().max(-1))
            places = corners(boxes)
            answers = [
                Mark(places[[query]], names[labels[query]], labels[query], scores[query], query)
                for query in sorted(range(len(scores)), key=lambda query: -scores[query])
                if scores[query] >= threshold
            ]
            known = (truths(record, names), truths(record, names, groups=True)) if "annotations" in record else None
            rows.append(judged(answers, *known) if known else answers)
        return rows

    def grid(self, model: nn.Module, batch: SceneBatch) -> tuple[int, int]:
        return tuple(model.backbone[0](batch.images).shape[-2:])

    def info_fault(self, info: dict) -> str:
        return info_fault(info)

    def model_info(self, data: Scenes, model: nn.Module) -> dict:
        """Labels that no category has, which are among COCO's, are called N/A, as officially."""
        cfg, named = self.cfg.data, {category["id"]: category["name"] for category in data.categories}
        shape = {"num_classes": data.labels, "in_chans": cfg.channels}
        return {
            "architecture": self.cfg.model.name.split(".")[0],
            "num_classes": data.labels,
            "label_names": [named.get(label, "N/A") for label in range(data.labels)],
            "model_args": {**shape, **constructor_arguments(self.cfg.model, cfg.image_size)},
            "pretrained_cfg": {
                "num_classes": data.labels,
                "input_size": [cfg.channels, cfg.image_size, cfg.image_size],
                "fixed_input_size": False,
                "mean": per_channel(cfg.mean, cfg.channels),
                "std": per_channel(cfg.std, cfg.channels),
                "classifier": model.pretrained_cfg["classifier"],
            },
        }

    def data_facts(self, info: dict) -> SimpleNamespace:
        return SimpleNamespace(labels=info["num_classes"])

    def transform(self) -> Photos:
        return Photos(self.cfg.data.channels, self.as_evaluated)

    at_a_time = 1  # several are padded to the largest, on which their boxes then depend a little

    def collate(self, samples: Sequence[Photo], device: torch.device) -> SceneBatch:
        ids = torch.arange(len(samples))
        return batched(PhotoSplit(samples), ids, lambda sample, _: sample, self.normalize(device), device)

    def answers(self, outputs, info: dict, threshold: Optional[float] = None) -> Detections:
        found = Detections()
        for passes, batch in outputs:
            averaged = passes[0] if len(passes) == 1 else self.average(passes)
            spread = torch.stack([self.strength(one) for one in passes]).std(0) if len(passes) > 1 else None
            marked = self.marks(averaged, batch, info, LEAST if threshold is None else threshold)
            for row, (record, marks) in enumerate(zip(batch.records, marked, strict=True)):
                size = torch.tensor([record["width"], record["height"]] * 2)
                found.append([])
                for mark in marks:
                    boxes = dict(zip(self.named_boxes, (mark.boxes * size).tolist(), strict=True))
                    of_score = {} if spread is None else {"spread": spread[row, mark.query, mark.group].item()}
                    found[-1].append({"label": mark.label, "score": mark.score} | boxes | of_score)
        return found

    def exported(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        return LastLevel(model), ["logits", "boxes"]


class GatheredScores(ABC):
    """Figures over what all processes found: those that one process would have."""

    truth, named = "", ""  # under which key an image's record has what is to be found, and what that is

    def __init__(self):
        self.records: list[dict] = []  # of the images that were looked at
        self.found: list[np.ndarray] = []  # what was found in each

    @abstractmethod
    def figures(self, records: list[dict], found: list[np.ndarray]) -> dict[str, Optional[float]]:
        """Of all images, in one process."""

    def compute(self, dist) -> dict[str, Optional[float]]:
        parts = dist.gather((self.records, self.found))
        figures = None
        if dist.is_main:
            records = [record for part in parts for record in part[0]]
            if not any(record[self.truth] for record in records):
                raise DataError(f"no image of the evaluated split has {self.named}")
            figures = self.figures(records, [rows for part in parts for rows in part[1]])
            figures |= {"samples": len(records)}
        return dist.broadcast(figures)

    def correct(self, dist) -> None:
        return None


class DetectionScores(GatheredScores):
    """COCO's average precision; what was found in an image is float64 Q 7, see `average_precision`."""

    truth, named = "annotations", "a box"

    def update(self, outputs: tuple[Tensor, Tensor], batch: SceneBatch) -> None:
        """All queries count, without a threshold, each with its most probable category."""
        probabilities, boxes = (each.double().cpu() for each in outputs)
        scores, labels = probabilities[..., :-1].max(-1)
        for record, box, score, label in zip(batch.records, boxes, scores, labels, strict=True):
            box = box * torch.tensor([record["width"], record["height"]] * 2)
            rows = [torch.full_like(score, record["id"])[:, None], box[:, :2] - box[:, 2:] / 2, box[:, 2:]]
            self.found.append(torch.cat([*rows, score[:, None], label[:, None]], dim=1).numpy())
        self.records += batch.records

    def figures(self, records: list[dict], found: list[np.ndarray]) -> dict[str, Optional[float]]:
        return average_precision(records, np.concatenate(found))
