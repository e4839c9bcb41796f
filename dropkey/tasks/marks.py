"""What a task draws on its images: boxes with a label, for its answers and for the truth."""

from dataclasses import dataclass, replace
from typing import Optional, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

ENOUGH = 0.5  # intersection over union with the truth, from which an answer is right


@dataclass(frozen=True)
class Mark:
    boxes: Tensor  # float32 n 4 on the CPU: left, top, right, bottom as shares of the image; of a pair, two
    label: str
    group: int = 0  # by which marks are coloured where nobody knows what is right
    score: Optional[float] = None  # of an answer; None: this is the truth
    query: Optional[int] = None  # of an answer, its position among the model's queries
    right: Optional[bool] = None  # an answer that is true, a truth that was found; None: not known


def overlap(one: Mark, other: Mark) -> float:
    """Intersection over union; of pairs the smaller one."""
    return box_iou(one.boxes, other.boxes).diagonal().min().item()


def inside(one: Mark, group: Mark) -> float:
    """The share of its first box that lies in the group's."""
    low = torch.maximum(one.boxes[0, :2], group.boxes[0, :2])
    high = torch.minimum(one.boxes[0, 2:], group.boxes[0, 2:])
    return ((high - low).clamp(min=0).prod() / (one.boxes[0, 2:] - one.boxes[0, :2]).prod()).item()


def judged(answers: list[Mark], truths: list[Mark], groups: Sequence[Mark] = ()) -> list[Mark]:
    """All of them with `right`: in order of score, an answer takes that truth of its label which it overlaps most,
    unless another has it. What lies in a group of objects of its label, which are not marked one by one, is no
    mistake."""
    found, taken = [], set()
    for answer in answers:
        free = [i for i, true in enumerate(truths) if i not in taken and true.label == answer.label]
        best = max(free, key=lambda i: overlap(answer, truths[i]), default=None)
        right = best is not None and overlap(answer, truths[best]) >= ENOUGH
        taken |= {best} if right else set()
        in_group = any(inside(answer, group) >= ENOUGH for group in groups if group.label == answer.label)
        found.append(replace(answer, right=None if in_group and not right else right))
    return found + [replace(true, right=i in taken) for i, true in enumerate(truths)]


def corners(boxes: Tensor) -> Tensor:
    """Of centre, width and height, as models give them."""
    return box_convert(boxes.float().cpu(), "cxcywh", "xyxy")
