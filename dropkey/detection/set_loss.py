"""The loss of DETR (Carion et al., 2020): each target is matched to a query of its image, and all other queries are to
say "no object". Shape letters: L levels (decoder layers), B images, Q queries, K classes, n targets of an image.

All is a sum over the batch, to be divided by `normalisers` of the whole optimizer step. Officially the cross-entropy is
divided by the weights of each process's part instead, which differs only where processes have unequal numbers of boxes.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

CLASS, L1, GIOU = 1.0, 5.0, 2.0  # weights, of the costs of matching and of the losses
OBJECT = 10.0  # weight of a matched query in the cross-entropy, where another has 1: as 1 and 0.1


def normalisers(counts: list[int], queries: int) -> dict[str, float]:
    """Of the losses below, from the number of targets of each image."""
    matched = sum(min(count, queries) for count in counts)
    boxes = float(sum(counts))
    return {"class": OBJECT * matched + len(counts) * queries - matched, "l1": boxes, "giou": boxes}


def set_losses(logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    """Weighted sums over images and levels, each level matched anew.

    Args:
        logits: L B Q K+1, the last class: no object.
        boxes: L B Q 4, centre, width, height in [0, 1].
        labels, targets: int64 n and float n 4 of each image.
    """
    logits, boxes = logits.float(), boxes.float()
    level, image, query, target = match(logits, boxes, labels, targets)
    found, true = boxes[level, image, query], torch.cat(targets)[target]
    return {
        "class": CLASS * class_loss(logits, (level, image, query), torch.cat(labels)[target]),
        "l1": L1 * (found - true).abs().sum(),
        "giou": GIOU * giou_loss(found, true),
    }


def class_loss(logits: Tensor, matched: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Of logits L B Q K+1: those `matched` (level, image, query) have these labels, all others are no object."""
    wanted = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
    wanted[matched] = labels
    weight = torch.full((logits.shape[-1],), OBJECT, device=logits.device)
    weight[-1] = 1
    return F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="sum")


def giou_loss(found: Tensor, true: Tensor) -> Tensor:
    """Of boxes M 4, each with the other in its place."""
    parts = zip(found.split(512), true.split(512), strict=True)
    return len(found) - torch.stack([giou(*pair).diagonal().sum() for pair in parts]).sum()


def giou(some: Tensor, others: Tensor) -> Tensor:
    """Generalized intersection over union of all pairs, of boxes as centre, width, height."""
    return generalized_box_iou(box_convert(some, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy"))


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, ...]:
    """The cheapest assignment of each image's targets to its queries, at each level: level, image, query, and position
    among the targets of all images, int64 M each. With fewer queries than targets some targets stay without one."""
    all_labels, all_targets = torch.cat(labels), torch.cat(targets)
    costs = []
    for scores, found in zip(logits.softmax(-1).flatten(1, 2), boxes.flatten(1, 2), strict=True):
        overlap = giou(found, all_targets)
        costs.append(-CLASS * scores[:, all_labels] + L1 * torch.cdist(found, all_targets, p=1) - GIOU * overlap)
    return assigned(torch.stack(costs).unflatten(1, logits.shape[1:3]), [len(one) for one in targets])


def assigned(costs: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """As `match`, of the costs L B Q n of the targets of all images, so many of each."""
    # what is not finite is no reason to end here: the loss will not be finite either
    device, costs = costs.device, costs.nan_to_num(0).cpu()
    pairs, begin = [], 0
    for image, count in enumerate(counts):
        for level, levels in enumerate(costs[:, image, :, begin : begin + count]):
            query, target = (torch.from_numpy(side) for side in linear_sum_assignment(levels.numpy()))
            place = [torch.full_like(query, number) for number in (level, image)]
            pairs.append(torch.stack([*place, query, begin + target]))
        begin += count
    return torch.cat(pairs, dim=1).to(device).unbind()
