"""Human-object interaction detection: pairs of boxes with an object class and verbs, by QPIC."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dropkey import shapes
from dropkey.config.schema import ModelConfig
from dropkey.detection.interaction_precision import Triplet, interaction_precision, strongest
from dropkey.detection.interactions import Interactions
from dropkey.detection.pair_loss import normalisers, pair_losses, targets
from dropkey.detection.scenes import SceneBatch
from dropkey.errors import ConfigError
from dropkey.metrics import Metric
from dropkey.models.qpic import QPIC
from dropkey.tasks.detection import LEAST, Detection, GatheredScores
from dropkey.tasks.marks import Mark, corners, judged
from dropkey.tasks.photos import LastLevel, truths

LABELS = {
    **{"full": "mAP", "rare": "mAP rare", "non_rare": "mAP non-rare"},
    **{"ko_full": "mAP KO", "ko_rare": "mAP KO rare", "ko_non_rare": "mAP KO non-rare", "recall": "max recall"},
}
MOST = 100  # answers of an image that are looked at
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
        samples = super().planned_data().train_samples
        return SimpleNamespace(labels=objects, possible=possible, instances={}, train_samples=samples)

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

    boxes_per_answer = 2
    named_boxes = ("subject", "object")

    def strength(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """B Q V: of each verb with the query's most probable object; 0 where these cannot go together."""
        scores, labels = outputs[0][..., :-1].max(-1)
        possible = torch.as_tensor(self.possible, device=labels.device).T[labels]
        return outputs[1] * scores[..., None] * possible

    def marks(self, outputs: tuple[Tensor, ...], batch: SceneBatch, info: dict, threshold: float = LEAST):
        objects, verbs, rows = info["label_names"], info["verb_names"], []
        labels = outputs[0][..., :-1].argmax(-1).tolist()
        pairs = torch.stack([corners(boxes) for boxes in outputs[2:]], dim=2)  # B Q 2 4
        for strength, label, boxes, record in zip(self.strength(outputs), labels, pairs, batch.records, strict=True):
            best = strength.flatten().cpu().topk(min(MOST, strength.numel()))
            answers = [
                Mark(boxes[query], f"{verbs[verb]} {objects[label[query]]}", verb, score, query)
                for score, (query, verb) in zip(
                    best.values.tolist(), (divmod(place, len(verbs)) for place in best.indices.tolist()), strict=True
                )
                if score >= threshold
            ]
            rows.append(judged(answers, true_pairs(record, objects, verbs)) if "pairs" in record else answers)
        return rows

    def info_fault(self, info: dict) -> str:
        wrong = super().info_fault(info) or shapes.problem(info, {"verb_names": [str], "verbs_of": [[int]]})
        if wrong:
            return wrong
        same = len(info["verbs_of"]) == len(info["label_names"])
        known = {verb for verbs in info["verbs_of"] for verb in verbs} <= {*range(len(info["verb_names"]))}
        return "" if same and known else "its verbs_of does not fit its verb_names and label_names"

    def model_info(self, data: Interactions, model: nn.Module) -> dict:
        """Besides what a detector has: the names of verbs, and the positions of those that each object can have."""
        verbs = [np.flatnonzero(column).tolist() for column in data.possible.T]
        return super().model_info(data, model) | {"verb_names": list(data.verbs), "verbs_of": verbs}

    def data_facts(self, info: dict) -> SimpleNamespace:
        possible = np.zeros((len(info["verb_names"]), len(info["verbs_of"])), dtype=bool)
        for column, verbs in enumerate(info["verbs_of"]):
            possible[verbs, column] = True
        return SimpleNamespace(labels=info["num_classes"], possible=possible, instances={})

    def exported(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        return LastLevel(model), ["object_logits", "verb_logits", "subject_boxes", "object_boxes"]


def true_pairs(record: dict, objects: list[str], verbs: list[str]) -> list[Mark]:
    """One for each verb of each pair."""
    marks = truths(record, objects)
    return [
        Mark(torch.cat([marks[subject].boxes, marks[other].boxes]), f"{verbs[verb]} {marks[other].label}", verb)
        for subject, other, verb in record["pairs"]
    ]


class InteractionScores(GatheredScores):
    """Mean average precisions; for what was found in an image see `strongest`."""

    truth, named = "pairs", "an interaction"

    def __init__(self, possible: np.ndarray, instances: dict[Triplet, int]):
        super().__init__()
        self.possible, self.instances = possible, instances

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

    def figures(self, records: list[dict], found: list[np.ndarray]) -> dict[str, Optional[float]]:
        return interaction_precision(records, found, self.instances)
