"""Human-object interaction detection: pairs of boxes with an object class and verbs, by QPIC."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dropkey.config.schema import ModelConfig
from dropkey.detection.interaction_precision import Triplet, interaction_precision, strongest
from dropkey.detection.interactions import Interactions
from dropkey.detection.pair_loss import normalisers, pair_losses, targets
from dropkey.detection.scenes import SceneBatch
from dropkey.errors import ConfigError, DataError
from dropkey.metrics import Metric
from dropkey.models.qpic import QPIC
from dropkey.tasks.detection import Detection

LABELS = {
    **{"full": "mAP", "rare": "mAP rare", "non_rare": "mAP non-rare"},
    **{"ko_full": "mAP KO", "ko_rare": "mAP KO rare", "ko_non_rare": "mAP KO non-rare", "recall": "max recall"},
}
PLANNED = {"digit_pairs": (5, 10)}  # verbs and objects; others: those of HICO-DET


class Interaction(Detection):
    """Arguments: those of `Detection`."""

    metrics = tuple(Metric(key, label, "%") for key, label in LABELS.items())
    network = QPIC

    def load_data(self) -> Interactions:
        data = super().load_data()
        if not isinstance(data, Interactions):
            raise ConfigError(f"data.name={self.cfg.data.name} has no interactions; take data=digit_pairs or hico_det")
        if data.sided and self.augment.hflip:
            raise ConfigError(
                f"augment.hflip={self.augment.hflip:g}: left and right are verbs of these data; set it to 0"
            )
        return data

    def describe_data(self, data: Interactions) -> str:
        classes = sum(count > 0 for count in data.instances.values())
        own = f", {len(data.possible)} verbs and {classes} kinds of interactions in training"
        return "; ".join([super().describe_data(data) + own, *data.notes])

    def build_model(self, data: Interactions, *, pretrained: bool, fused: bool) -> nn.Module:
        self.possible, self.instances = data.possible, data.instances
        return super().build_model(data, pretrained=pretrained, fused=fused)

    def architecture(self, data: Interactions) -> ModelConfig:
        return replace(self.cfg.model, args={"num_verbs": len(data.possible), **self.cfg.model.args})

    def planned_data(self) -> SimpleNamespace:
        verbs, objects = PLANNED.get(self.cfg.data.name, (117, 80))
        possible = np.ones((verbs, objects), dtype=bool)
        return SimpleNamespace(labels=objects, possible=possible, instances={}, train_samples=None)

    def normalisers(self, batch: SceneBatch) -> dict[str, float]:
        return normalisers(targets(batch, len(self.possible)), self.queries)

    def losses(self, model: nn.Module, batch: SceneBatch) -> dict[str, Tensor]:
        return pair_losses(*model(batch.images, batch.padding), targets(batch, len(self.possible)))

    def predict(self, model: nn.Module, batch: SceneBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Probabilities of objects B Q K+1 and of verbs B Q V, boxes of subjects and of objects B Q 4."""
        objects, verbs, *boxes = (each[-1].float() for each in model(batch.images, batch.padding))
        return objects.softmax(-1), verbs.sigmoid(), *boxes

    def scores(self) -> "InteractionScores":
        return InteractionScores(self.possible, self.instances)


class InteractionScores:
    """The mean average precision over what all processes found: the figure that one process would have."""

    def __init__(self, possible: np.ndarray, instances: dict[Triplet, int]):
        self.possible, self.instances = possible, instances
        self.records: list[dict] = []  # of the images that were looked at
        self.found: list[np.ndarray] = []  # of each, see `strongest`

    def update(self, outputs: tuple[Tensor, ...], batch: SceneBatch) -> None:
        """A verb's score is its probability times that of the query's most probable object."""
        outputs = (each.double().cpu() for each in outputs)
        for record, objects, verbs, *boxes in zip(batch.records, *outputs, strict=True):
            scores, labels = objects[:, :-1].max(-1)
            size = torch.tensor([record["width"], record["height"]] * 2)
            boxes = torch.cat([box_convert(each, "cxcywh", "xyxy") * size for each in boxes], dim=1)
            rows = ((verbs * scores[:, None]).numpy(), labels.numpy(), boxes.numpy(), self.possible)
            self.found.append(strongest(*rows))
        self.records += batch.records

    def compute(self, dist) -> dict[str, Optional[float]]:
        parts = dist.gather((self.records, self.found))
        figures = None
        if dist.is_main:
            records = [record for part in parts for record in part[0]]
            found = [rows for part in parts for rows in part[1]]
            if not any(record["pairs"] for record in records):
                raise DataError("no image of the evaluated split has an interaction")
            figures = interaction_precision(records, found, self.instances) | {"samples": len(records)}
        return dist.broadcast(figures)

    def correct(self, dist) -> None:
        return None
