"""Images with COCO annotations, and their loaders, which decode and augment in worker processes.

The order of the images and their augmentation follow from (seed, epoch, place in the epoch), as in
`dropkey.data.loaders`: not from the number of processes, workers or microbatches, nor from where an epoch is resumed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from dropkey.data import epoch_order, microbatch_begins, require_batch
from dropkey.data.images import Files, Pixels, to_device, to_tensor
from dropkey.data.reading import Decoding, Key, Request
from dropkey.detection.boxes import Augment, Sample
from dropkey.errors import DataError
from dropkey.seeds import derive_seed


@dataclass
class Split:
    """n images. A position in the split, 0 to n - 1, is an image's id in the program; COCO's is in its record."""

    images: Files | Pixels
    rows: list[int]  # which of them
    records: Sequence[dict]  # as COCO has them, each with its `annotations` besides; for interactions, `pairs` too:
    # lists of the positions of subject and object in `annotations`, and the verb. A list, or `coco.Records`

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: list[int]) -> "Split":
        whole = isinstance(self.records, list)
        records = [self.records[i] for i in positions] if whole else self.records.subset(positions)
        return Split(self.images, [self.rows[i] for i in positions], records)

    def sample(self, position: int) -> Sample:
        """For training: groups of objects (iscrowd) left out, boxes cut at the border, empty ones left out.

        Raises:
            DataError: an image that cannot be read, or of another size than its record says.
        """
        row, record = self.rows[position], self.records[position]
        image = to_tensor(self.images.picture(row))
        height, width = image.shape[1:]
        said = record.get("height", height), record.get("width", width)
        if said != (height, width):
            name = f" {self.images.path(row)}" if isinstance(self.images, Files) else ""
            raise DataError(
                f"image{name} has {width} x {height} pixels; its record (id {record['id']}) says "
                f"{said[1]} x {said[0]}, so its boxes are not of this picture. Restore the file, or correct the record"
            )
        single = [one for one in record["annotations"] if not one.get("iscrowd", 0)]
        boxes = torch.tensor([one["bbox"] for one in single], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in single], dtype=torch.int64)
        pairs = torch.tensor(record.get("pairs", []), dtype=torch.int64).view(-1, 3)
        return Sample(image, boxes, labels, pairs).clipped()

    picture = sample  # the name that `Decoding` calls


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

    @property
    def classes(self) -> list[str]:
        """Names of what is to be found: a run whose data have others is not resumed (`dropkey.origin`)."""
        return [category["name"] for category in self.categories]

    def fingerprint(self) -> str:
        """Ten hexadecimal digits over all images and annotations."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            if split is not None:
                records = split.records if isinstance(split.records, list) else split.records.digest()
                digest.update(split.images.content() + json.dumps([split.rows, records]).encode())
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
    """`transform(sample, place)`: the sample as the model takes it; `place` counts within the batch. Read here, in this
    process; `normalize` is for `device`."""
    samples = [transform(split.sample(position), place) for place, position in enumerate(ids.tolist())]
    images, notes = collated(samples)
    return scene_batch(split, ids, images.to(device), notes, normalize)


def collated(samples: list[Sample]) -> list:
    """What a worker hands over: images, uint8 B C H W, padded; and size, labels, targets and pairs of each, as NumPy
    arrays, because tensors between processes are open files."""
    height, width = (max((sample.size[axis] for sample in samples), default=1) for axis in (0, 1))
    channels = len(samples[0].image) if samples else 1
    images = torch.zeros(len(samples), channels, height, width, dtype=torch.uint8)
    for image, sample in zip(images, samples, strict=True):
        image[:, : sample.size[0], : sample.size[1]] = sample.image
    notes = [(one.size, *(part.numpy() for part in (one.labels, one.targets(), one.pairs))) for one in samples]
    return [images, notes]


def scene_batch(split: Split, ids: Tensor, images: Tensor, notes: list, normalize: Callable) -> SceneBatch:
    """Of what `collated` made, the images on the device."""
    device, size = images.device, tuple(images.shape[-2:])
    labels, boxes, pairs = ([to_device(torch.from_numpy(note[place]), device) for note in notes] for place in (1, 2, 3))
    images, padding = normalize(images) if notes else images.float(), None
    if any(note[0] != size for note in notes):
        ends = to_device(torch.tensor([note[0] for note in notes]), device)
        rows, columns = (torch.arange(side, device=device) for side in size)
        padding = (rows >= ends[:, :1])[:, :, None] | (columns >= ends[:, 1:])[:, None]
        images.masked_fill_(padding[:, None], 0)
    records = [split.records[position] for position in ids.tolist()]
    return SceneBatch(images, padding, labels, boxes, pairs, records, ids)


def augmented(augment: Augment, sample: Sample, key: Key) -> Sample:
    return augment(sample, derive_seed(*key))


def as_evaluated(transform: Callable[[Sample], Sample], sample: Sample, key: Key) -> Sample:
    return transform(sample)


class TrainLoader:
    """One process's part of every epoch; `len` is the number of optimizer steps, the incomplete last one is dropped.

    Args:
        normalize: uint8 B C H W on the device -> float32.
        workers: processes that decode, 0: this one, None: as many as fit.
    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(
        self, split: Split, augment: Augment, normalize, *, batch_size, grad_accum_steps, seed, dist, workers=0
    ):
        require_batch(len(split), batch_size)
        self.split, self.normalize = split, normalize
        self.batch_size, self.parts, self.seed, self.dist = batch_size, grad_accum_steps, seed, dist
        self.microbatch = batch_size // (grad_accum_steps * dist.world_size)
        self.reader = Decoding(split, partial(augmented, augment), workers, dist.device, collated)

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[SceneBatch]:
        """DataError: an image that cannot be read."""
        order, key = epoch_order(len(self.split), self.seed, epoch), (self.seed, "augment boxes", epoch)
        places = microbatch_begins(self.batch_size, self.parts, self.dist, range(start, len(self)))
        shares = [order[begin : begin + self.microbatch] for begin in places]
        requests = (Request(ids, key, begin) for ids, begin in zip(shares, places, strict=True))
        for ids, batch in zip(shares, self.reader.read(requests), strict=True):
            yield scene_batch(self.split, ids, *batch, self.normalize)

    def close(self) -> None:
        """Stops the workers."""
        self.reader.close()


class EvalLoader:
    """Every image once over all processes, each batch shared out among them; `len` is the number of batches. Arguments:
    see `TrainLoader`."""

    def __init__(
        self, split: Split, transform: Callable[[Sample], Sample], normalize, batch_size: int, dist, workers=0
    ):
        self.split, self.normalize, self.dist = split, normalize, dist
        self.shares = torch.arange(len(split)).split(batch_size)
        self.reader = Decoding(split, partial(as_evaluated, transform), workers, dist.device, collated)

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[SceneBatch]:
        """DataError: an image that cannot be read."""
        shares = [share.tensor_split(self.dist.world_size)[self.dist.rank] for share in self.shares]
        batches = self.reader.read(Request(own) for own in shares if len(own))
        nothing = collated([])
        for own in shares:
            yield scene_batch(self.split, own, *(next(batches) if len(own) else nothing), self.normalize)

    def close(self) -> None:
        """Stops the workers."""
        self.reader.close()
