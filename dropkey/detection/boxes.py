"""An image with its boxes, and what moves both. Boxes: float32 n 4, left, top, right, bottom in pixels."""

import random
from dataclasses import dataclass, field, replace
from typing import Optional, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as transforms


def no_pairs() -> Tensor:
    return torch.zeros(0, 3, dtype=torch.int64)


@dataclass(frozen=True)
class Sample:
    image: Tensor  # uint8 C H W
    boxes: Tensor
    labels: Tensor  # int64 n
    pairs: Tensor = field(default_factory=no_pairs)  # int64 m 3: positions of subject and object in `boxes`, and verb

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.image.shape[-2:])

    def flipped(self) -> "Sample":
        """Mirrored horizontally."""
        width = self.size[1]
        left, top, right, bottom = self.boxes.unbind(-1)
        boxes = torch.stack([width - right, top, width - left, bottom], dim=-1)
        return replace(self, image=self.image.flip(-1), boxes=boxes)

    def resized(self, height: int, width: int) -> "Sample":
        if (height, width) == self.size:
            return self
        image = transforms.resize(self.image, [height, width], antialias=True)
        ratios = torch.tensor([width / self.size[1], height / self.size[0]]).repeat(2)
        return replace(self, image=image, boxes=self.boxes * ratios)

    def cropped(self, top: int, left: int, height: int, width: int) -> "Sample":
        image = self.image[:, top : top + height, left : left + width]
        boxes = self.boxes - torch.tensor([left, top, left, top], dtype=self.boxes.dtype)
        return replace(self, image=image, boxes=boxes).clipped()

    def clipped(self) -> "Sample":
        """Boxes cut at the border; those of which nothing is left are gone, and pairs with one of them."""
        height, width = self.size
        most = torch.tensor([width, height, width, height], dtype=self.boxes.dtype)
        boxes = self.boxes.clamp(min=0).minimum(most)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        pairs = self.pairs[kept[self.pairs[:, :2]].all(-1)].clone()
        pairs[:, :2] = (kept.cumsum(0) - 1)[pairs[:, :2]]
        return replace(self, boxes=boxes[kept], labels=self.labels[kept], pairs=pairs)

    def targets(self) -> Tensor:
        """n 4 for the loss: centre, width and height as shares of the image."""
        height, width = self.size
        return box_convert(self.boxes, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])


def fitted(size: tuple[int, int], shorter: int, longest: Optional[int]) -> tuple[int, int]:
    """Height and width with that shorter side, or less where the longer side would exceed `longest`."""
    least, most = min(size), max(size)
    if longest is not None and most / least * shorter > longest:
        shorter = round(longest * least / most)
    return tuple(shorter if side == least else int(shorter * side / least) for side in size)


@dataclass(frozen=True)
class Augment:
    """DETR's: a flip; then the shorter side becomes one of `scales`. Half of the images are cropped before: resized to
    one of `crop_scales`, then a window with sides drawn from `crop_sides`. QPIC changes colours after the flip."""

    hflip: float = 0.0
    scales: Sequence[int] = ()  # pixels; none: images keep their size, unless they are cropped
    max_size: Optional[int] = None  # pixels of the longer side
    crop_scales: Sequence[int] = ()  # none: images keep their size before the crop
    crop_sides: Sequence[int] = ()  # least and most pixels of a side; none: no crop
    color_jitter: float = 0.0  # brightness, contrast and saturation, by factors that are within this of 1

    def __call__(self, sample: Sample, seed: int) -> Sample:
        draw = random.Random(seed)
        flip, crop = draw.random() < self.hflip, draw.random() < 0.5
        if flip:
            sample = sample.flipped()
        if self.color_jitter:
            sample = replace(sample, image=self.jittered(sample.image, draw))
        if self.crop_sides and crop:
            if self.crop_scales:
                sample = sample.resized(*fitted(sample.size, draw.choice(self.crop_scales), None))
            sample = self.crop(sample, draw)
        if self.scales:
            sample = sample.resized(*fitted(sample.size, draw.choice(self.scales), self.max_size))
        return sample

    def jittered(self, image: Tensor, draw: random.Random) -> Tensor:
        moves = [transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation]
        for move in draw.sample(moves, len(moves)):
            image = move(image, draw.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        return image

    def crop(self, sample: Sample, draw: random.Random) -> Sample:
        least, most = self.crop_sides
        sides = [draw.randint(min(least, side), min(most, side)) for side in sample.size]
        begins = [draw.randint(0, side - kept) for side, kept in zip(sample.size, sides, strict=True)]
        return sample.cropped(*begins, *sides)
