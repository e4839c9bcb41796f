"""Small image folders, configs and batches for the tests of dropkey.data."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data import Dataset, Split, train_loader
from dropkey.data.images import Pixels
from dropkey.datasets import load

LIGHT = AugmentConfig(hflip=0.5, crop_padding=2, random_erasing=0.5)
HEAVY = AugmentConfig(hflip=0.5, crop_scale=[0.3, 1.0], rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
MIXED = AugmentConfig(hflip=0.5, crop_padding=1, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def write_images(folder: Path, count: int, size=(12, 12), seed: int = 0, suffix: str = ".png") -> None:
    """RGB noise as files 000.png, 001.png ...; `size` is width, height."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}{suffix}")


def image_folder(root: Path, splits=("train", "test"), counts=(8, 10, 6), size=(12, 12)) -> Path:
    """Classes a, b, c with `counts` images in every split; splits=("",) puts the classes into the root."""
    for split_number, split in enumerate(splits):
        for number, (name, count) in enumerate(zip("abc", counts, strict=True)):
            write_images(root / split / name, count, size, seed=100 * split_number + number)
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    given = {"name": "folder", "root": str(root), "image_size": 12, "val_fraction": 0.0, "num_workers": 0}
    return DataConfig(**{**given, **changes})


def digits_config(**changes) -> DataConfig:
    return DataConfig(**{"name": "digits", "channels": 1, "num_workers": 0, **changes})


def counted(size: int, in_memory: bool = True) -> tuple[Dataset, DataConfig]:
    """A data set whose test split has `size` images; image i has value i, class i % 3."""
    images = np.arange(size, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(4, 2).repeat(4, 3)
    split = Split(Pixels(images), torch.arange(size), torch.arange(size) % 3)
    return Dataset(split, None, split, ["a", "b", "c"], 1, 4, split), digits_config(image_size=4, in_memory=in_memory)


def batches(data, augment, *, batch_size=8, epoch=1, start=0, seed=5, **named):
    dataset = load(data)
    loader = train_loader(dataset, data, augment, batch_size=batch_size, seed=seed, **named)
    found = list(loader.epoch(epoch, start))
    loader.close()
    return found


def joined(parts):
    return [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "targets", "ids")]


def assert_equal(left, right):
    for one, other in zip(joined(left), joined(right), strict=True):
        assert one.shape == other.shape
        assert (one != other).sum() == 0


def merged(per_rank, accumulate):
    """The chunks of all ranks in the order of the global batch."""
    steps = len(per_rank[0]) // accumulate
    spans = [slice(step * accumulate, (step + 1) * accumulate) for step in range(steps)]
    return [batch for span in spans for rank in per_rank for batch in rank[span]]
