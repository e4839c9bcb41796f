"""Token labels: what a teacher sees at each place of a training image, as in "All Tokens Matter: Token Labeling for
Training Better Vision Transformers" (Jiang et al., NeurIPS 2021, arXiv:2104.10858).

A label map is one file for each image, <folder>/<class>/<image>.pt, as the authors publish them: float16 (2, K, H, W),
at each place [0] the K = 5 largest logits and [1] the classes they are of. It shows the whole picture.

In the decoding workers picture and map are mirrored, go through RandAugment and get a random crop, in this order (the
official one, other than `TrainPicture`'s); the map moves along with mirroring, shear, translation and rotation, and has
logits of 0 where it is uncovered. On the device `token_targets` cuts out the crop and makes targets.

What differs from the official code (zihangJiang/TokenLabeling, as far as published):
- Crops are (left, top, right, bottom), which roi_align takes; the official ones go in as (top, left, bottom, right),
  though generate_label.py stores rows before columns.
- Maps move by the geometry of the picture, whatever its sides.
- A smoothed target sums to 1, not to 1.0001.
The official generator maps the centre square of a picture, which the official training takes for the whole one. Maps of
`dropkey label-maps` are of the whole picture.
"""

import math
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.functional import resized_crop

from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data.augment import rand_augment, seeded
from dropkey.data.images import Files
from dropkey.data.splits import Split
from dropkey.errors import ConfigError, DataError
from dropkey.seeds import derive_seed

Matrix = tuple[float, float, float, float, float, float]  # of PIL: where in the old picture a place of the new one was


def map_name(image: bytes) -> str:
    """<class>/<image>.pt for the name of an image in its store."""
    return os.path.splitext(os.fsdecode(image))[0] + ".pt"


def read_map(path: Path, classes: int) -> Tensor:
    """float16 (2, K, H, W).

    Raises:
        DataError: missing, damaged, or of a teacher with more classes.
    """
    try:
        labels = torch.load(path, weights_only=True)
    except FileNotFoundError:
        remedy = "dropkey label-maps makes those that are missing, data.token_labels=null trains without"
        raise DataError(f"no label map {path}; {remedy}") from None
    except Exception as error:  # what torch raises for a damaged file may be nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"cannot read label map {path}: {reason}. Remove it and make it again") from None
    wrong = ""
    if not isinstance(labels, Tensor) or labels.dtype != torch.float16 or labels.dim() != 4 or len(labels) != 2:
        wrong = "it is no float16 tensor (2, K, H, W) of logits and their classes"
    elif labels.numel() == 0 or not labels.isfinite().all():
        wrong = "it has values that are not finite, or none"
    elif labels[1].min() < 0 or labels[1].max() >= classes:
        wrong = f"it names class {int(labels[1].max())}, and there are {classes} from 0"
    if wrong:
        raise DataError(f"label map {path} is not one of these images: {wrong}")
    return labels


class Labelled(NamedTuple):
    picture: Image.Image
    labels: Tensor  # float16 (2, K, H, W), over the whole picture


class LabelledFiles:
    """A split's image files with their label maps, as a store. All maps have the shape of the first."""

    def __init__(self, split: Split, folder: Path, classes: int):
        if not isinstance(split.images, Files):
            raise ConfigError("data.token_labels: maps belong to image files; take data=imagenet or data=folder")
        self.files, self.folder, self.classes = split.images, folder, classes
        self.shape = read_map(self.path(int(split.rows[0])), classes).shape

    def __len__(self) -> int:
        return len(self.files)

    def path(self, row: int) -> Path:
        return self.folder / map_name(self.files.names[row])

    def picture(self, row: int) -> Labelled:
        labels = read_map(self.path(row), self.classes)
        if labels.shape != self.shape:
            shapes = f"{tuple(labels.shape)}, others {tuple(self.shape)}"
            raise DataError(f"label map {self.path(row)} is {shapes}; make all with one teacher at one size")
        return Labelled(self.files.picture(row), labels)


# --------------------------------------------------------------------------------------------- with the picture


class TokenLabelPicture:
    """Mirror, RandAugment, random resized crop: the picture, its moved map, and the crop as float32 (4,): left, top,
    right, bottom as shares of the width and height."""

    def __init__(self, data: DataConfig, augment: AugmentConfig):
        self.hflip, self.rand_augment = augment.hflip, None
        scale = tuple(augment.crop_scale)
        self.crop = RandomResizedCropAndInterpolation(data.image_size, scale, interpolation=augment.interpolation)
        if augment.rand_augment is not None:
            self.rand_augment = rand_augment(augment.rand_augment, data, augment.interpolation)
            for operation in self.rand_augment.ops:
                operation.aug_fn = partial(together, operation.aug_fn)

    def __call__(self, labelled: Labelled, key: tuple) -> tuple[Image.Image, Tensor, Tensor]:
        with seeded(derive_seed(*key)):
            if random.random() < self.hflip:
                mirrored = labelled.picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                labelled = Labelled(mirrored, labelled.labels.flip(-1))
            picture, labels = self.rand_augment(labelled) if self.rand_augment else labelled
            top, left, height, width = self.crop.get_params(picture, self.crop.scale, self.crop.ratio)
            how = self.crop.interpolation
            how = random.choice(how) if isinstance(how, tuple) else how
        box = torch.tensor([left, top, left + width, top + height]) / torch.tensor(picture.size * 2)
        return resized_crop(picture, top, left, height, width, self.crop.size, how), labels, box


def together(operation: Callable, labelled: Labelled, *amount, **options) -> Labelled:
    """One of RandAugment's operations on the picture; on the map too if it moves the picture."""
    picture = operation(labelled.picture, *amount, **options)
    if operation not in MATRICES:
        return Labelled(picture, labelled.labels)
    return Labelled(picture, moved(labelled.labels, MATRICES[operation](*amount, *picture.size), *picture.size))


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """About the centre, counterclockwise to the eye."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


MATRICES: dict[Callable, Callable[[float, int, int], Matrix]] = {
    auto_augment.shear_x: lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    auto_augment.shear_y: lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    auto_augment.translate_x_abs: lambda pixels, width, height: (1, 0, pixels, 0, 1, 0),
    auto_augment.translate_y_abs: lambda pixels, width, height: (1, 0, 0, 0, 1, pixels),
    auto_augment.translate_x_rel: lambda share, width, height: (1, 0, share * width, 0, 1, 0),
    auto_augment.translate_y_rel: lambda share, width, height: (1, 0, 0, 0, 1, share * height),
    auto_augment.rotate: rotation,
}


def moved(labels: Tensor, matrix: Matrix, width: int, height: int) -> Tensor:
    """The map of a picture of that size, moved as PIL moves the picture: each place takes what was at its centre, or
    0."""
    rows, columns = labels.shape[-2:]
    a, b, c, d, e, f = matrix
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * (width / columns)
    y = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) * (height / rows)
    column = ((a * x + b * y + c) * (columns / width)).floor().long()
    row = ((d * x + e * y + f) * (rows / height)).floor().long()
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    return labels[..., row.clamp(0, rows - 1), column.clamp(0, columns - 1)] * inside


# ------------------------------------------------------------------------------------------------- on the device


def token_targets(labels: Tensor, boxes: Tensor, classes: int, side: int, smoothing: float) -> Tensor:
    """Targets of each image and its tokens, float32 (B, 1 + side * side, classes); each sums to 1.

    Args:
        labels: float16 (B, 2, K, H, W).
        boxes: float32 (B, 4), as `TokenLabelPicture` makes them.
        side: tokens on a side of the image.
    """
    logits = cropped(all_logits(labels, classes), boxes, side)
    return F.softmax(logits, -1) * (1 - smoothing) + smoothing / classes


def all_logits(labels: Tensor, classes: int) -> Tensor:
    """float32 (B, classes, H, W): 0 where a class is not among the largest."""
    logits, ids = labels.unbind(1)
    shape = (len(labels), classes, *labels.shape[-2:])
    return torch.zeros(shape, device=labels.device).scatter_(1, ids.long(), logits.float())


def cropped(maps: Tensor, boxes: Tensor, side: int) -> Tensor:
    """(B, 1 + side * side, channels): the mean over each box, then over its side x side parts, row by row."""
    height, width = maps.shape[-2:]
    number = torch.arange(len(maps), device=maps.device, dtype=boxes.dtype)[:, None]
    places = torch.cat([number, boxes * boxes.new_tensor([width, height, width, height])], 1)
    parts = [roi_align(maps, places, size, aligned=True).flatten(2) for size in (1, side)]
    return torch.cat(parts, 2).transpose(1, 2)
