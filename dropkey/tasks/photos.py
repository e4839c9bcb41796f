"""A trained detector in use: images from anywhere, what is said of them, and what other programs run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dropkey.data.images import to_tensor
from dropkey.detection.boxes import Sample
from dropkey.tasks.marks import Mark
from dropkey.tasks.preprocessing import Picture, opened


class LastLevel(nn.Module):
    """Logits B Q K+1 and boxes B Q 4 of a model that gives those of several levels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output[-1] for output in self.model(images))


def truths(record: dict, names: list[str], groups: bool = False) -> list[Mark]:
    """The objects of an image, or the groups of objects (iscrowd)."""
    size = torch.tensor([record["width"], record["height"]] * 2)
    chosen = [one for one in record["annotations"] if bool(one.get("iscrowd", 0)) is groups]
    boxes = torch.tensor([one["bbox"] for one in chosen], dtype=torch.float32).view(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) / size
    labels = [one["category_id"] for one in chosen]
    return [Mark(boxes[[row]], names[label], label) for row, label in enumerate(labels)]


class Detections(list):
    """For each image its objects, the surest first: {"label": ..., "score": ..., "box": [left, top, right, bottom]} in
    pixels of the image; with monte_carlo "spread", the score's standard deviation over the passes."""

    def top(self, k: Optional[int] = None) -> list[list[dict]]:
        return [objects[:k] for objects in self]


@dataclass(frozen=True)
class Photo:
    """An image as evaluation has it, not yet normalised."""

    sample: Sample
    width: int  # of the original
    height: int


@dataclass(frozen=True)
class Photos:
    """An image from anywhere, as evaluation in training would see it: converted to grey or RGB, resized."""

    channels: int
    as_evaluated: Callable[[Sample], Sample]

    def __call__(self, image: Picture) -> Photo:
        """Of a path or a PIL image. DataError names a file that cannot be read."""
        picture = opened(image, self.channels)
        sample = Sample(to_tensor(picture), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return Photo(self.as_evaluated(sample), *picture.size)


class PhotoSplit:
    """What `batched` asks of a split."""

    def __init__(self, photos: Sequence[Photo]):
        self.photos = photos
        self.records = [{"width": photo.width, "height": photo.height} for photo in photos]

    def sample(self, position: int) -> Sample:
        return self.photos[position].sample
