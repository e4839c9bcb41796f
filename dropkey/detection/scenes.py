"""Images with COCO annotations, and their loaders.

The order of the images and their augmentation follow from (seed, epoch, place in the epoch), as in
`dropkey.data.loaders`: not from the number of processes or microbatches, nor from where an epoch is resumed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from dropkey.data import epoch_order
from dropkey.data.images import Files, Pixels, to_tensor
from dropkey.detection.boxes import Augment, Sample
from dropkey.errors import DataError
from dropkey.seeds import derive_seed


@dataclass
class Split:
    """n images. A position in the split, 0 to n - 1, is an image's id in the program; COCO's is in its record."""

    images: Files | Pixels
    rows: list[int]  # which of them
    records: list[dict]  # as COCO has them, each with its `annotations` besides; for interactions, `pairs` too: lists
    # of the positions of subject and object in `annotations`, and the verb

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: list[int]) -> "Split":
        return Split(self.images, [self.rows[i] for i in positions], [self.records[i] for i in positions])

    def sample(self, position: int) -> Sample:
        """For training: groups of objects (iscrowd) left out, boxes cut at the border, empty ones left out."""
        image, record = to_tensor(self.images.picture(self.rows[position])), self.records[position]
        single = [one for one in record["annotations"] if not one.get("iscrowd", 0)]
        boxes = torch.tensor([one["bbox"] for one in single], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in single], dtype=torch.int64)
        pairs = torch.tensor(record.get("pairs", []), dtype=torch.int64).view(-1, 3)
        return Sample(image, boxes, labels, pairs).clipped()


@dataclass
class Scenes:
    train: Split
    val: Optional[Split]
    test: Split
    categories: list[dict]  # as COCO has them: id, name

    @property
    def labels(self) -> int:
        """Outputs of a classifier whose classes are the ids themselves, as officially: COCO's 1 to 90 make 91."""
        return 1 + max(category["id"] for category in self.categories)

    def fingerprint(self) -> str:
        """Ten hexadecimal digits over all images and annotations."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(split.images.content() + json.dumps([split.rows, split.records]).encode())
        return digest.hexdigest()[:10]


@dataclass
class SceneBatch:
    images: Tensor  # float32 B C H W on the device, normalised; padded with zeros at the right and the bottom
    padding: Optional[Tensor]  # bool B H W on the device, True where padded; None: nowhere
    labels: list[Tensor]  # int64 n of each image, on the device
    boxes: list[Tensor]  # float32 n 4 of each image, on the device: centre, width, height as shares of the image
    pairs: list[Tensor]  # int64 m 3 of each image, on the device: subject, object (positions in `boxes`), verb
    records: list[dict]  # of each image, with its annotations, unchanged by augmentation
    ids: Tensor  # int64 (B,) on the CPU: positions in the split

    def __len__(self) -> int:
        return len(self.ids)


def batched(
    split: Split, ids: Tensor, transform: Callable[[Sample, int], Sample], normalize: Callable, device: torch.device
) -> SceneBatch:
    """`transform(sample, place)`: the sample as the model takes it; `place` counts within the batch."""
    samples = [transform(split.sample(position), place) for place, position in enumerate(ids.tolist())]
    height, width = (max((sample.size[axis] for sample in samples), default=1) for axis in (0, 1))
    channels = len(samples[0].image) if samples else 1
    images = torch.zeros(len(samples), channels, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for image, padded, sample in zip(images, padding, samples, strict=True):
        h, w = sample.size
        image[:, :h, :w] = normalize(sample.image[None])[0]
        padded[:h, :w] = False
    return SceneBatch(
        images.to(device),
        padding.to(device) if padding.any() else None,
        [sample.labels.to(device) for sample in samples],
        [sample.targets().to(device) for sample in samples],
        [sample.pairs.to(device) for sample in samples],
        [split.records[position] for position in ids.tolist()],
        ids,
    )


class TrainLoader:
    """One process's part of every epoch; `len` is the number of optimizer steps, the incomplete last one is dropped.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(self, split: Split, augment: Augment, normalize, *, batch_size, grad_accum_steps, seed, dist):
        if len(split) < batch_size:
            raise DataError(
                f"the train split has {len(split)} images, fewer than one batch of {batch_size}; "
                f"set trainer.batch_size={len(split)} or less"
            )
        self.split, self.augment, self.normalize = split, augment, normalize
        self.batch_size, self.parts, self.seed, self.dist = batch_size, grad_accum_steps, seed, dist
        self.microbatch = batch_size // (grad_accum_steps * dist.world_size)

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[SceneBatch]:
        order = epoch_order(len(self.split), self.seed, epoch)
        for step in range(start, len(self)):
            for part in range(self.dist.rank * self.parts, (self.dist.rank + 1) * self.parts):
                begin = step * self.batch_size + part * self.microbatch

                def augmented(sample: Sample, place: int, begin: int = begin) -> Sample:
                    return self.augment(sample, derive_seed(self.seed, "augment boxes", epoch, begin + place))

                ids = order[begin : begin + self.microbatch]
                yield batched(self.split, ids, augmented, self.normalize, self.dist.device)

    def close(self) -> None:
        pass


class EvalLoader:
    """Every image once over all processes, each batch shared out among them; `len` is the number of batches."""

    def __init__(self, split: Split, transform: Callable[[Sample], Sample], normalize, batch_size: int, dist):
        self.split, self.transform, self.normalize, self.dist = split, transform, normalize, dist
        self.shares = torch.arange(len(split)).split(batch_size)

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[SceneBatch]:
        for share in self.shares:
            own = share.tensor_split(self.dist.world_size)[self.dist.rank]
            yield batched(self.split, own, lambda sample, _: self.transform(sample), self.normalize, self.dist.device)

    def close(self) -> None:
        pass
