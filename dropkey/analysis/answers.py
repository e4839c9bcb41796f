"""What a trained classifier answers on test images, and where it is most wrong."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkey.analysis.trained import Trained
from dropkey.tasks.classification import Classification


@dataclass(frozen=True)
class Answer:
    """The answer on one test image."""

    position: int  # in the test split
    true: str
    predicted: str
    right: bool
    confidence: float  # softmax of the predicted class

    def __str__(self) -> str:
        return f"✓ {self.predicted}" if self.right else f"✗ {self.predicted}, is {self.true}"


@torch.no_grad()
def answers(trained: Trained, ids: Tensor) -> list[Answer]:
    """For each test sample at those positions; [] for a task whose answer is not one class."""
    if not isinstance(trained.task, Classification):
        return []
    classes, targets, found = trained.dataset.classes, trained.dataset.test.targets, []
    for batch in trained.batches(ids):
        sure, chosen = trained.task.predict(trained.model, batch).float().softmax(-1).max(-1)
        found += zip(chosen.tolist(), sure.tolist(), strict=True)
    return [
        Answer(position, classes[targets[position]], classes[one], one == targets[position].item(), confidence)
        for position, (one, confidence) in zip(ids.tolist(), found, strict=True)
    ]


def worst(found: list[Answer], count: int) -> list[Answer]:
    """The `count` wrong answers of highest confidence."""
    return sorted((one for one in found if not one.right), key=lambda one: -one.confidence)[:count]


def confusions(found: list[Answer], count: int) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: true class, predicted class, how often."""
    pairs = Counter((one.true, one.predicted) for one in found if not one.right)
    return [(true, predicted, number) for (true, predicted), number in pairs.most_common(count)]
