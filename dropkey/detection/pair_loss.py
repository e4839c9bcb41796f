"""The loss of QPIC (Tamura et al., 2021): as DETR's, but each target is a pair of boxes with an object class and verbs.
Shape letters: L levels (decoder layers), B images, Q queries, K object classes, V verbs, n pairs of an image.

All is a sum over the batch, to be divided by `normalisers` of the whole optimizer step. Officially object classes and
verbs are divided by the counts of each process's part instead. All pairs have an object here (in V-COCO some do not).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey.detection import set_loss
from dropkey.detection.scenes import SceneBatch
from dropkey.detection.set_loss import assigned, class_loss, giou, giou_loss

CLASS, VERB, L1, GIOU = 1.0, 1.0, 2.5, 1.0  # weights, of the costs of matching and of the losses
EPSILON = 1e-4


@dataclass
class Pairs:
    """Distinct pairs of an image, or of all images of a batch."""

    objects: Tensor  # int64 n
    verbs: Tensor  # float n V, 0 or 1
    subject_boxes: Tensor  # float n 4, centre, width, height as shares of the image
    object_boxes: Tensor

    def __len__(self) -> int:
        return len(self.objects)


def targets(batch: SceneBatch, verbs: int) -> list[Pairs]:
    """Of each image its distinct pairs, each with all of its verbs."""
    found = []
    for pairs, labels, boxes in zip(batch.pairs, batch.labels, batch.boxes, strict=True):
        distinct, which = pairs[:, :2].unique(dim=0, return_inverse=True)
        subjects, objects = distinct.unbind(1)
        merged = torch.zeros(len(distinct), verbs, device=pairs.device)
        merged[which, pairs[:, 2]] = 1
        found.append(Pairs(labels[objects], merged, boxes[subjects], boxes[objects]))
    return found


def normalisers(pairs: list[Pairs], queries: int) -> dict[str, float]:
    """Of the losses below: weights of the queries, positive verbs, pairs, and pairs that find a query."""
    counts = [len(one) for one in pairs]
    return {
        "object": set_loss.normalisers(counts, queries)["class"],
        "verb": float(sum(one.verbs.sum().item() for one in pairs)),
        "subject_box": float(sum(counts)),
        "object_box": float(sum(min(count, queries) for count in counts)),
    }


def pair_losses(
    objects: Tensor, verbs: Tensor, subject_boxes: Tensor, object_boxes: Tensor, pairs: list[Pairs]
) -> dict[str, Tensor]:
    """Weighted sums over images and levels, each level matched anew.

    Args:
        objects: logits L B Q K+1, the last class: no object.
        verbs: logits L B Q V.
        subject_boxes, object_boxes: L B Q 4, centre, width, height in [0, 1].
    """
    outputs = [each.float() for each in (objects, verbs, subject_boxes, object_boxes)]
    *matched, target = match(*outputs, pairs)
    matched, true = tuple(matched), together(pairs)
    objects, verbs, subject_boxes, object_boxes = outputs
    wanted = torch.zeros_like(verbs)
    wanted[matched] = true.verbs[target]
    return {
        "object": CLASS * class_loss(objects, matched, true.objects[target]),
        "verb": VERB * focal_loss(verbs, wanted),
        "subject_box": box_loss(subject_boxes[matched], true.subject_boxes[target]),
        "object_box": box_loss(object_boxes[matched], true.object_boxes[target]),
    }


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """-(1-p)² log p where wanted, -p² log(1-p) elsewhere. Logarithms of p itself would not be finite where p rounds to
    0 or 1."""
    p = logits.sigmoid()
    return -(wanted * (1 - p) ** 2 * F.logsigmoid(logits) + (1 - wanted) * p**2 * F.logsigmoid(-logits)).sum()


def box_loss(found: Tensor, true: Tensor) -> Tensor:
    return L1 * (found - true).abs().sum() + GIOU * giou_loss(found, true)


def together(pairs: list[Pairs]) -> Pairs:
    return Pairs(*(torch.cat(each) for each in zip(*(vars(one).values() for one in pairs), strict=True)))


@torch.no_grad()
def match(
    objects: Tensor, verbs: Tensor, subject_boxes: Tensor, object_boxes: Tensor, pairs: list[Pairs]
) -> tuple[Tensor, ...]:
    """The cheapest assignment of each image's pairs to its queries, at each level: level, image, query, and position
    among the pairs of all images, int64 M each. Of the two boxes of a pair the worse one counts."""
    true, costs = together(pairs), []
    has, lacks = true.verbs.T, 1 - true.verbs.T
    outputs = (objects.softmax(-1), verbs.sigmoid(), subject_boxes, object_boxes)
    for scores, p, *found in zip(*(each.flatten(1, 2) for each in outputs), strict=True):
        agreement = p @ has / (has.sum(0) + EPSILON) + (1 - p) @ lacks / (lacks.sum(0) + EPSILON)
        both = list(zip(found, (true.subject_boxes, true.object_boxes), strict=True))
        distance = torch.maximum(*(torch.cdist(*boxes, p=1) for boxes in both))
        overlap = torch.minimum(*(giou(*boxes) for boxes in both))
        costs.append(-CLASS * scores[:, true.objects] - VERB * agreement / 2 + L1 * distance - GIOU * overlap)
    return assigned(torch.stack(costs).unflatten(1, objects.shape[1:3]), [len(one) for one in pairs])
