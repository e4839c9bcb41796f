"""Splits of a data set. Held-out splits are stratified by class."""

import hashlib
import itertools
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dropkey.config.schema import DataConfig
from dropkey.data.cache import require_room
from dropkey.data.images import Files, Pixels, convert, resize_center_crop, to_picture, to_tensor
from dropkey.errors import DataError
from dropkey.seeds import derive_seed

TEST_SEED = 0  # not the run's: runs with different seeds are compared on the same images


@dataclass
class Split:
    """n images of a store. A position in the split, 0 to n - 1, is an image's id."""

    images: Files | Pixels  # the store, perhaps shared with other splits
    rows: torch.Tensor  # int64 (n,): which images of the store
    targets: torch.Tensor  # int64 (n,): class ids

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def whole(images: Files | Pixels, targets) -> "Split":
        return Split(images, torch.arange(len(images)), torch.as_tensor(np.asarray(targets), dtype=torch.int64))

    def subset(self, positions: torch.Tensor) -> "Split":
        return Split(self.images, self.rows[positions], self.targets[positions])


@dataclass
class Dataset:
    train: Split
    val: Split | None
    test: Split
    classes: list[str]
    channels: int
    image_size: int  # pixels
    pool: Split  # the images that train and val were drawn from

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def fingerprint(self) -> str:
        """Ten hexadecimal digits over all images and labels: pixels if they are in memory, else file names. Neither the
        folder counts, nor which images validation and training have: the config says how these are drawn."""
        digest = hashlib.sha256()
        for split in (self.pool, self.test):
            digest.update(split.images.content())
            digest.update(split.rows.numpy().tobytes() + split.targets.numpy().tobytes())
        return digest.hexdigest()[:10]


class RawSplits(NamedTuple):
    """What a data set brings of its own; splits that it lacks are held out afterwards."""

    classes: list[str]
    train: Split
    val: Split | None
    test: Split | None


def array_split(images: np.ndarray, targets, data: DataConfig) -> Split:
    """Images uint8 N C H W with data.channels channels, at data.image_size where they are to be kept in memory."""
    size = data.image_size if data.in_memory else images.shape[-1]
    shape = (len(images), data.channels, size, size)
    require_room(shape)
    if images.shape != shape:
        given, images = images, np.empty(shape, dtype=np.uint8)
        for row, image in enumerate(given):
            images[row] = to_tensor(resize_center_crop(convert(to_picture(image), data.channels), size)).numpy()
    return Split.whole(Pixels(np.ascontiguousarray(images)), targets)


def refuse_shared_images(splits: dict[str, Split | None]) -> None:
    """DataError: an image file that two of the splits have, under two names, because a link leads to it.

    Numbers of files may be equal by chance, and hard links are files of their own; so paths decide.
    """
    known = [(name, split, files) for name, split in splits.items() if split and (files := files_of(split))]
    for (one, split, files), (other, second, others) in itertools.combinations(known, 2):
        _, here, there = np.intersect1d(files.places[split.rows], others.places[second.rows], return_indices=True)
        for left, right in zip(split.rows[here].tolist(), second.rows[there].tolist(), strict=True):
            paths = files.path(left), others.path(right)
            if os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
                raise DataError(f"{paths[0]} ({one}) and {paths[1]} ({other}) are the same image; remove one of them")


def files_of(split: Split) -> Files | None:
    """The files of a split, where it is known which of them are the same."""
    files = split.images if isinstance(split.images, Files) else getattr(split.images, "files", None)
    return files if files is not None and files.places is not None else None


def ranks_within_class(targets: torch.Tensor, purpose: str, seed: int) -> torch.Tensor:
    """int64 (n,): the place of each image in a random order of its class's images."""
    ranks = torch.empty_like(targets)
    for label in targets.unique().tolist():
        members = (targets == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(derive_seed(seed, purpose, label))
        ranks[members] = torch.randperm(len(members), generator=generator)
    return ranks


def hold_out(split: Split, fraction: float, name: str, seed: int) -> tuple[Split, Split]:
    """(remaining, held out): of each class `fraction` of its images, rounded, but never all.

    `name` is val or test, as in the config key data.<name>_fraction.
    """
    sizes = torch.bincount(split.targets)
    quota = (sizes.double() * fraction + 0.5).long().minimum(sizes - 1)
    held = ranks_within_class(split.targets, f"hold out {name}", seed) < quota[split.targets]
    if not held.any():
        raise DataError(
            f"the {name} split is empty: data.{name}_fraction={fraction} of {len(split)} images in "
            f"{(sizes > 0).sum()} classes rounds to none per class; raise data.{name}_fraction"
            + (" or set it to 0 for no val split" if name == "val" else f", or give the images a {name} folder")
        )
    return split.subset((~held).nonzero().squeeze(1)), split.subset(held.nonzero().squeeze(1))


def limit(split: Split, count: int, seed: int) -> Split:
    """`count` images, balanced over the classes as far as possible. A smaller `count` of the same seed is a subset."""
    if count > len(split):
        raise DataError(f"data.max_train_samples={count} but the train split has {len(split)} images; lower or drop it")
    ranks = ranks_within_class(split.targets, "train limit", seed)
    in_turn = (ranks * (split.targets.max() + 1) + split.targets).argsort()  # first image of every class, second ...
    return split.subset(in_turn[:count].sort().values)
