"""Digits on larger canvases, with boxes: the real scans of scikit-learn, pasted at random places and sizes.

A canvas has 1 to 3 digits, of a quarter to three eighths of its side, which overlap by 2 pixels at most; a box is the
square that was pasted. No scan is in two splits: the first 1,400 are for training (and validation), the rest for test.
"""

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from dropkey.config.schema import DataConfig
from dropkey.data.images import Pixels
from dropkey.detection.scenes import Scenes, Split
from dropkey.seeds import derive_seed

TRAIN_SCANS = 1_400
TRAIN, HELD_OUT = 4_000, 300  # canvases for training, and for validation and test each
MOST_DIGITS, MOST_OVERLAP = 3, 2  # on a canvas; in pixels
TRIES = 100  # to place a digit; beside a large one in the centre there may be no room
TEST_SEED = 0  # not the run's: runs with different seeds are compared on the same images


def read(data: DataConfig, seed: int) -> Scenes:
    """`seed` draws the canvases for training and validation; data.val_fraction is the share of their scans that only
    validation has, data.max_train_samples the number of canvases for training."""

    def chosen(name: str, scans_of: list[list[int]], draw: random.Random) -> list[range]:
        return [range(sum(map(len, scans_of)))] * draw.randint(1, MOST_DIGITS)

    return Scenes(*splits(data, seed, "digit scenes", chosen), CATEGORIES)


CATEGORIES = [{"id": digit, "name": str(digit)} for digit in range(10)]


def splits(data: DataConfig, seed: int, purpose: str, chosen: Callable) -> tuple[Split, Split | None, Split]:
    """Training, validation and test. `chosen(name of the split, its scans of each digit, draw)`: for every digit of a
    canvas the scans of which it is to be one."""
    from sklearn.datasets import load_digits  # takes a second to import

    scans, labels = load_digits(return_X_y=True)
    scans = torch.from_numpy(scans.reshape(-1, 1, 8, 8)).float() * (255 / 16)
    first_val = TRAIN_SCANS - round(data.val_fraction * TRAIN_SCANS)

    def split(name: str, count: int, begin: int, end: int, seed: int) -> Split:
        draw, own = random.Random(derive_seed(purpose, name, seed)), labels[begin:end].tolist()
        scans_of = [[scan for scan, label in enumerate(own) if label == digit] for digit in range(10)]
        digits = (chosen(name, scans_of, draw) for _ in range(count))
        return paste(scans[begin:end], own, count, data.image_size, data.channels, draw, digits)

    return (
        split("train", data.max_train_samples or TRAIN, 0, first_val, seed),
        split("val", HELD_OUT, first_val, TRAIN_SCANS, seed) if first_val < TRAIN_SCANS else None,
        split("test", HELD_OUT, TRAIN_SCANS, len(scans), TEST_SEED),
    )


def paste(
    scans: torch.Tensor, labels: list[int], count: int, side: int, channels: int, draw: random.Random, digits: Iterator
) -> Split:
    canvases, records = torch.zeros(count, 1, side, side), []
    number = 0
    for row, (canvas, candidates) in enumerate(zip(canvases, digits, strict=True)):
        annotations = []
        for (left, top, size), some in zip(places(side, len(candidates), draw), candidates, strict=False):
            which = draw.choice(some)
            digit = F.interpolate(scans[which][None], (size, size), mode="bilinear")[0]
            window = canvas[:, top : top + size, left : left + size]
            torch.maximum(window, digit, out=window)
            number += 1  # ids from 1: the COCO evaluation takes 0 for "unmatched"
            box = {"bbox": [left, top, size, size], "area": size * size, "iscrowd": 0}
            annotations.append({"id": number, "image_id": row, "category_id": labels[which], **box})
        records.append({"id": row, "width": side, "height": side, "annotations": annotations})
    pixels = canvases.round().to(torch.uint8).expand(-1, channels, -1, -1).numpy()
    return Split(Pixels(np.ascontiguousarray(pixels)), list(range(count)), records)


def places(side: int, count: int, draw: random.Random) -> list[tuple[int, int, int]]:
    """Left, top and size of each digit of a canvas; fewer than `count` if there is no room."""
    found = []
    for _ in range(count):
        size = draw.randint(round(side / 4), round(side * 3 / 8))
        for _ in range(TRIES):
            left, top = (draw.randint(0, side - size) for _ in range(2))
            overlaps = (
                min(min(left + size, x + other) - max(left, x), min(top + size, y + other) - max(top, y))
                for x, y, other in found
            )
            if all(overlap <= MOST_OVERLAP for overlap in overlaps):
                found.append((left, top, size))
                break
    return found
