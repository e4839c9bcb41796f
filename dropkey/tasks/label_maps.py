"""Label maps for `data.token_labels`, made by a teacher: its classifier applied at each place of its last features."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Optional

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import dropkey.models  # noqa: F401 (registers T2T-ViT and CeiT)
from dropkey import datasets
from dropkey.config.schema import DataConfig
from dropkey.data.augment import Normalize
from dropkey.data.images import Files
from dropkey.data.reading import Decoding, Request
from dropkey.data.splits import Dataset
from dropkey.data.token_labels import map_name
from dropkey.errors import ConfigError
from dropkey.records import replace_file, write_json

LARGEST = 5  # logits that are kept of each place
MOST_CLASSES = 2048  # up to here float16 holds every number of a class
FACTS = "teacher.json"  # in the folder of maps: who made them


@dataclass
class Teacher:
    model: nn.Module
    name: str
    data: DataConfig  # image_size, channels, mean and std that it takes
    classes: Optional[list[str]] = None  # None: those of ImageNet, or whatever the images have


def published_teacher(name: str, size: Optional[int], weights: str) -> Teacher:
    """A model of timm: with its published weights, or those of a file.

    Raises:
        ConfigError: weights cannot be had, or not loaded.
    """
    cfg = timm.get_pretrained_cfg(name)
    shape = cfg.test_input_size or cfg.input_size
    side = size or shape[-1]
    arguments = {"img_size": side} if cfg.fixed_input_size else {}
    try:
        model = timm.create_model(name, pretrained=not weights, checkpoint_path=weights, **arguments)
    except Exception as error:  # a network, a file, a class of the model: whatever they raise
        raise ConfigError(f"teacher={name}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None
    data = DataConfig(image_size=side, channels=shape[0], mean=list(cfg.mean), std=list(cfg.std))
    return Teacher(model, name, data)


class Square:
    """Resizes to a square, so that a map shows the whole picture."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, picture: Image.Image, key: tuple) -> Image.Image:
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC)


def dense_logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B, C, H, W) -> logits of each place of the last features, (B, rows, columns, classes).

    Each place is given to the classifier as if it were the whole image. VOLO's own classifier of tokens is taken.

    Raises:
        ConfigError: a model whose features have no places.
    """
    features = model.forward_features(images)
    if features.dim() == 4:  # the channels are last in Swin and its kind
        last = features.shape[1] != model.num_features
        places = features if last else features.permute(0, 2, 3, 1)
        flat = places.flatten(0, 2)
        logits = model.forward_head(flat[:, None, None] if last else flat[:, :, None, None])
        return logits.unflatten(0, places.shape[:3])
    side = math.isqrt(features.shape[1]) if features.dim() == 3 else 0
    if not side or not hasattr(model, "forward_head"):
        raise ConfigError(f"teacher: {type(model).__name__} has no features of places; take a CNN, ViT, Swin or VOLO")
    prefix = features.shape[1] - side**2  # class tokens and registers come first
    tokens = features[:, prefix:]
    if getattr(model, "aux_head", None) is not None:
        logits = model.aux_head(tokens)
    else:  # in the place of the class token, or of the mean
        alone = tokens.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
        logits = model.forward_head(alone).unflatten(0, tokens.shape[:2])
    return logits.unflatten(1, (side, side))


def maps_of(logits: Tensor) -> Tensor:
    """(B, rows, columns, classes) -> float16 (B, 2, K, rows, columns), as `dropkey.data.token_labels` reads them."""
    values, ids = logits.float().topk(min(LARGEST, logits.shape[-1]), -1)
    return torch.stack([values, ids.float()], 1).permute(0, 1, 4, 2, 3).half()


def images_to_label(data: DataConfig) -> Dataset:
    """All images that a training on `data` may be given are in its `pool`."""
    return datasets.load(replace(data, in_memory=False, crop_pct=1.0, val_fraction=0.0, max_train_samples=None))


def require_fit(teacher: Teacher, dataset: Dataset) -> None:
    files, count = dataset.pool.images, teacher.model.num_classes
    if not isinstance(files, Files):
        raise ConfigError("label maps belong to image files; take data=imagenet or data=folder")
    if count != dataset.num_classes or teacher.classes not in (None, dataset.classes):
        raise ConfigError(
            f"teacher={teacher.name} knows {count} classes, which are not the {dataset.num_classes} of the images"
        )
    if count > MOST_CLASSES:
        raise ConfigError(f"{count} classes: a label map numbers at most {MOST_CLASSES}")
    names = [map_name(files.names[row]) for row in dataset.pool.rows.tolist()]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two images would have the label map {twice}; rename one")


def claim(folder: Path, teacher: Teacher) -> None:
    """Notes who makes the maps.

    Raises:
        ConfigError: somebody else has made some of them.
    """
    facts = {"teacher": teacher.name, "size": teacher.data.image_size}
    file = folder / FACTS
    if file.exists():
        if (kept := json.loads(file.read_text())) != facts:
            raise ConfigError(f"output={folder} has maps of {kept}, not of {facts}; take another folder")
        return
    write_json(file, facts)


@torch.inference_mode()
def make(
    teacher: Teacher, dataset: Dataset, folder: Path, workers: int, batch_size: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Writes the maps that are missing, each at once or not at all; after each batch (done, of how many).

    Raises:
        DataError: an image that cannot be read.
        StorageError: the disk is full or refuses.
    """
    files = dataset.pool.images
    missing = [row for row in dataset.pool.rows.tolist() if not (folder / map_name(files.names[row])).exists()]
    total, done = len(dataset.pool), len(dataset.pool) - len(missing)
    yield done, total
    model, normalize = teacher.model.to(device).eval(), Normalize(teacher.data, device)
    rows = [part for part in torch.tensor(missing, dtype=torch.int64).split(batch_size) if len(part)]
    reader = Decoding(files, Square(teacher.data.image_size), workers, device)
    try:
        for part, images in zip(rows, reader.read(map(Request, rows)), strict=True):
            maps = maps_of(dense_logits(model, normalize(images))).cpu()
            for row, one in zip(part.tolist(), maps, strict=True):
                replace_file(folder / map_name(files.names[row]), partial(torch.save, one.clone()))
            done += len(part)
            yield done, total
    finally:
        reader.close()
