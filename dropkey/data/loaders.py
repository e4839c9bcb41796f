"""Loaders: which images make up a batch, on which process, and in what order.

The global batch of optimizer step u in epoch e is order(e)[u * B : (u + 1) * B]. It is cut into equal microbatches,
world_size x grad_accum_steps of them, and rank r takes `grad_accum_steps` consecutive ones. Order and augmentation
follow from (seed, epoch, place in the epoch): they do not depend on the number of processes, workers or microbatches,
nor on where an epoch is resumed. Only mixup and cutmix act within a microbatch, each with a lambda of its own, and so
depend on the number of all microbatches: one process with eight mixes what eight processes with one mix. The official
recipes, which do not accumulate, have a lambda for each process, of 64 to 256 images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data.augment import BatchAugment, EvalPicture, Mix, Normalize, TrainPicture
from dropkey.data.device_augment import DeviceAugment
from dropkey.data.images import to_device
from dropkey.data.reading import Decoding, OnDevice, Request
from dropkey.data.splits import Dataset
from dropkey.data.token_labels import LabelledFiles, TokenLabelPicture, token_targets
from dropkey.errors import ConfigError, DataError
from dropkey.seeds import derive_seed


@dataclass
class ImageBatch:
    images: torch.Tensor  # float32 B C H W on the device, normalised
    targets: torch.Tensor  # on the device: int64 (B,) class ids; float32 (B, classes) with mixing or smoothing;
    # float32 (B, 1 + tokens, classes) with token labels, of the image and of its tokens
    ids: torch.Tensor  # int64 (B,) on the CPU: positions in the split

    def __len__(self) -> int:
        return len(self.ids)


def epoch_order(images: int, seed: int, epoch: int, repeats: int = 1) -> torch.Tensor:
    """int64 (images,): positions in the split, shuffled.

    With repeated augmentation (Hoffer et al., 2020) each of a random 1 / repeats of the images comes `repeats` times
    in a row, and the epoch is no longer.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    chosen = torch.randperm(images, generator=generator)[: -(-images // repeats)]
    return chosen.repeat_interleave(repeats)[:images]


def train_loader(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig,
    *,
    batch_size: int,
    grad_accum_steps: int = 1,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    token_side: int | None = None,
) -> "TrainLoader":
    """Batches of the train split for process `rank` of `world_size`; `batch_size` is global, `token_side` the model's
    tokens on a side of an image, for data.token_labels.

    Raises:
        ConfigError: no equal microbatches are possible, or no even ones where mixup or cutmix needs them.
        DataError: fewer training images than one batch.
    """
    microbatch = _microbatch_size(batch_size, world_size, grad_accum_steps, augment)
    require_batch(len(dataset.train), batch_size)
    return TrainLoader(
        dataset, data, augment, microbatch, batch_size, grad_accum_steps, seed, rank, torch.device(device), token_side
    )


def require_batch(images: int, batch_size: int) -> None:
    """Raises DataError: fewer images for training than one batch."""
    if images < batch_size:
        raise DataError(
            f"the train split has {images} images, fewer than one batch of {batch_size}; "
            f"set trainer.batch_size={images} or less, or hold fewer images out"
        )


def microbatch_begins(batch_size: int, grad_accum_steps: int, dist, steps: range) -> list[int]:
    """Where in the order of an epoch each microbatch of this process begins."""
    microbatch = batch_size // (grad_accum_steps * dist.world_size)
    own = range(dist.rank * grad_accum_steps, (dist.rank + 1) * grad_accum_steps)
    return [step * batch_size + part * microbatch for step in steps for part in own]


def _microbatch_size(batch_size: int, world_size: int, grad_accum_steps: int, augment: AugmentConfig) -> int:
    microbatch, rest = divmod(batch_size, world_size * grad_accum_steps)
    cut = f"trainer.batch_size={batch_size} over {world_size} process(es) x trainer.grad_accum_steps={grad_accum_steps}"
    if rest or microbatch == 0:
        raise ConfigError(
            f"{cut} is not a whole number of images per microbatch; take a multiple of {world_size * grad_accum_steps}"
        )
    if microbatch % 2 and augment.mixup_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0):
        raise ConfigError(
            f"{cut} makes microbatches of {microbatch}, but mixup and cutmix pair images and need an even number; "
            f"take a multiple of {2 * world_size * grad_accum_steps}"
        )
    return microbatch


class TrainLoader:
    """One process's part of every epoch. `len` is the number of optimizer steps per epoch; the last incomplete batch is
    dropped."""

    def __init__(
        self, dataset, data, augment, microbatch, batch_size, grad_accum_steps, seed, rank, device, token_side
    ):
        self._split, self._device = dataset.train, device
        self._microbatch, self._batch_size, self._grad_accum_steps = microbatch, batch_size, grad_accum_steps
        self._seed, self._first, self._repeats = seed, rank * grad_accum_steps, augment.aug_repeats
        self._targets = dataset.train.targets.to(device)
        store, picture = dataset.train.images, None
        if data.token_labels is not None:
            classes, smoothing = dataset.num_classes, augment.label_smoothing
            store = LabelledFiles(dataset.train, Path(data.token_labels).expanduser(), classes)
            picture = TokenLabelPicture(data, augment)
            self._token_targets = partial(token_targets, classes=classes, side=token_side, smoothing=smoothing)
            augment = replace(augment, hflip=0.0, rand_augment=None, label_smoothing=0.0)  # all done there
        self._augment, self._erase_mixed = BatchAugment(data, augment, seed, device), augment.erase_mixed
        self._mix = Mix(augment, dataset.num_classes)
        self._pictures = DeviceAugment(data, augment, seed, device, crop=data.in_memory)
        if data.in_memory:
            self._reader = OnDevice(store, device)
        else:
            self._reader = Decoding(store, picture or TrainPicture(data, augment), data.num_workers, device)

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ImageBatch]:
        """`grad_accum_steps` batches for each optimizer step of the epoch from step `start` on.

        DataError: an image that cannot be read.
        """
        order = epoch_order(len(self._split), self._seed, epoch, self._repeats)
        places = [
            (step, microbatch)
            for step in range(start, len(self))
            for microbatch in range(self._first, self._first + self._grad_accum_steps)
        ]
        begins = [step * self._batch_size + microbatch * self._microbatch for step, microbatch in places]
        requests = (
            Request(
                self._split.rows[order[begin : begin + self._microbatch]], (self._seed, "augment picture", epoch), begin
            )
            for begin in begins
        )
        pictures = self._reader.read(requests)
        draws = plans = drawn = None
        for (step, microbatch), begin, batch in zip(places, begins, pictures, strict=True):
            if drawn != step:
                draws, drawn = self._augment.draw(epoch, step, self._batch_size), step
                plans = self._pictures.draw(epoch, step, self._batch_size)
            own = slice(microbatch * self._microbatch, (microbatch + 1) * self._microbatch)
            ids = order[begin : begin + self._microbatch]
            images, *labels = batch if isinstance(batch, list) else (batch,)
            targets = self._token_targets(*labels) if labels else self._targets[to_device(ids, self._device)]
            images = self._augment(self._pictures(images, plans, own), draws[own])
            if not self._erase_mixed:
                images = self._augment.erase_some(images, draws[own], epoch, begin)
            images, targets = self._mix(images, targets, self._seed, "mix", epoch, step, microbatch)
            if self._erase_mixed:
                images = self._augment.erase_some(images, draws[own], epoch, begin)
            yield ImageBatch(images, targets, ids)

    def close(self) -> None:
        """Stops the workers early; otherwise they stop with the process."""
        self._reader.close()


class FirstBatch:
    """A loader whose epochs are its first step, always the same (debug=overfit)."""

    def __init__(self, loader, grad_accum_steps: int):
        self.loader, self.grad_accum_steps, self.close = loader, grad_accum_steps, loader.close
        self.microbatches = []

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0):
        if not self.microbatches:
            batches = self.loader.epoch(0)
            self.microbatches = [next(batches) for _ in range(self.grad_accum_steps)]
        yield from self.microbatches[start * len(self.microbatches) :]


def eval_loader(
    dataset: Dataset,
    split: str,
    data: DataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
) -> "EvalLoader":
    """Every image of a split (train, val, test) once over all processes, at any global `batch_size`.

    Raises:
        DataError: the data set has no such split.
    """
    if getattr(dataset, split) is None:
        raise DataError(f"there is no {split} split: data.{split}_fraction=0 holds nothing out; raise it")
    return EvalLoader(dataset, split, data, batch_size, rank, world_size, torch.device(device))


class EvalLoader:
    """One process's part of a split. `len` is the number of iterations, the same on every rank; where the images of
    the last one cannot be shared out evenly, some ranks get fewer images or an empty batch."""

    def __init__(self, dataset, split, data, batch_size, rank, world_size, device):
        self._split, self._device = getattr(dataset, split), device
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._shape = (dataset.channels, dataset.image_size, dataset.image_size)
        self._targets = self._split.targets.to(device)
        self._normalize = Normalize(data, device)
        if data.in_memory:
            self._reader = OnDevice(self._split.images, device)
        else:
            picture = EvalPicture(data.image_size, data.crop_pct)
            self._reader = Decoding(self._split.images, picture, data.num_workers, device)

    def __len__(self) -> int:
        return (len(self._split) + self._batch_size - 1) // self._batch_size

    def __iter__(self) -> Iterator[ImageBatch]:
        """DataError: an image that cannot be read."""
        shares = [self._share(index) for index in range(len(self))]
        pictures = self._reader.read(Request(self._split.rows[ids]) for ids in shares if len(ids))
        empty = torch.empty((0, *self._shape), dtype=torch.uint8, device=self._device)
        for ids in shares:
            images = next(pictures) if len(ids) else empty
            yield ImageBatch(self._normalize(images), self._targets[to_device(ids, self._device)], ids)

    def _share(self, index: int) -> torch.Tensor:
        begin = index * self._batch_size
        images = min(self._batch_size, len(self._split) - begin)
        own = range(
            begin + images * self._rank // self._world_size, begin + images * (self._rank + 1) // self._world_size
        )
        return torch.arange(own.start, own.stop)

    def close(self) -> None:
        """Stops the workers."""
        self._reader.close()
