"""Annotations in COCO's format (cocodataset.org/#format-data), kept as arrays, and the splits that they describe."""

import gc
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dropkey.config.schema import DataConfig
from dropkey.data import splits
from dropkey.data.folders import folders_above, images_below, place_of
from dropkey.data.images import Files
from dropkey.detection.scenes import Scenes, Split
from dropkey.errors import ConfigError, DataError, explained
from dropkey.seeds import derive_seed

MOST_ID = 2**53  # the evaluation has ids as float64
MOST_CATEGORY = 9_999  # each number below it is an output of the classifier
MOST_PIXELS = 10**9  # a coordinate
Place = tuple[Path, Sequence[Path]]  # an annotation file, and the folders of which the first with its images is taken


class Records(Sequence):
    """`records[i]` is a dictionary as COCO has it, with `annotations`. Arrays, because a million annotations as
    dictionaries take a gigabyte, in each process that decodes as well."""

    def __init__(self, images: np.ndarray, numbers: np.ndarray, boxes: np.ndarray):
        self.images = images  # int64 n 5: id, width, height, first and end of its annotations
        self.numbers = numbers  # int64 m 3: id, category_id, iscrowd
        self.boxes = boxes  # float64 m 5: bbox (left, top, width, height), area

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> dict:
        number, width, height, first, end = self.images[position].tolist()
        annotations = [
            {"id": i, "image_id": number, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for (i, category, crowd), (*box, area) in zip(
                self.numbers[first:end].tolist(), self.boxes[first:end].tolist(), strict=True
            )
        ]
        return {"id": number, "width": width, "height": height, "annotations": annotations}

    def subset(self, positions: list[int]) -> "Records":
        return Records(self.images[positions], self.numbers, self.boxes)

    def digest(self) -> str:
        return hashlib.sha256(b"".join(part.tobytes() for part in (self.images, self.numbers, self.boxes))).hexdigest()


# ------------------------------------------------------------------------------------------------------- one file


def read_annotations(file: Path) -> tuple[list[str], Records, list[dict]]:
    """File names and records of the images, in the order of their ids, and the categories (id, name).

    Raises:
        DataError: a file that is missing or damaged, and the first value in it that cannot be meant.
    """
    content = parsed(file)
    categories, images, annotations = (content[key] for key in ("categories", "images", "annotations"))
    known = unique(file, "category", integers(file, "category", categories, "id", most=MOST_CATEGORY))
    strings(file, "category", categories, "name")

    ids = unique(file, "image", integers(file, "image", images, "id"))
    sizes = [integers(file, "image", images, key, least=1, most=10**6) for key in ("width", "height")]
    names = strings(file, "image", images, "file_name")

    numbers = range(1, len(annotations) + 1)
    own = unique(file, "annotation", integers(file, "annotation", annotations, "id", defaults=numbers))
    of_image = integers(file, "annotation", annotations, "image_id")
    of_category = integers(file, "annotation", annotations, "category_id")
    crowd = integers(file, "annotation", annotations, "iscrowd", most=1, defaults=[0] * len(annotations))
    for key, values, there in (("image_id", of_image, ids), ("category_id", of_category, known)):
        for place in (~np.isin(values, there)).nonzero()[0][:1].tolist():
            what = key.removesuffix("_id")
            raise fault(file, "annotation", annotations, place, f"is of {what} {values[place]}, which is not there")
    boxes = [(*box(file, annotations, place), area(file, annotations, place)) for place in range(len(annotations))]

    by_id, by_image = ids.argsort(), of_image.argsort(kind="stable")  # as officially; an image's stay in their order
    ends = np.searchsorted(of_image[by_image], ids[by_id], side="right")
    begins = np.searchsorted(of_image[by_image], ids[by_id], side="left")
    table = np.stack([ids[by_id], *(size[by_id] for size in sizes), begins, ends], axis=1)
    records = Records(table, np.stack([own, of_category, crowd], axis=1)[by_image], np.array(boxes)[by_image])
    return [names[place] for place in by_id], records, [{key: one[key] for key in ("id", "name")} for one in categories]


def parsed(file: Path) -> dict:
    """The JSON object, with its three lists of objects, none of them empty. Outlines of objects are left out: they are
    most of the file."""

    def slim(found: dict) -> dict:
        found.pop("segmentation", None)
        return found

    collects = gc.isenabled()
    gc.disable()  # it would look at millions of new objects again and again, a third of the time
    try:
        content = json.loads(file.read_bytes(), object_hook=slim)
    except OSError as error:
        raise DataError(f"cannot read {file}: {explained(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON, or damaged: {error}. Restore it") from None
    finally:
        if collects:
            gc.enable()
    for key in ("images", "annotations", "categories"):
        part = content.get(key) if isinstance(content, dict) else None
        if not isinstance(part, list) or not all(isinstance(one, dict) for one in part):
            raise DataError(f"{file} is not in COCO's format: it must be an object with a list of objects, {key}")
        if not part:
            raise DataError(f"{file} has no {key}")
    return content


def fault(file: Path, what: str, entries: list[dict], place: int, problem: str) -> DataError:
    number = entries[place].get("id")
    name = f"id {number}" if type(number) is int else f"number {place + 1} of the list"
    return DataError(f"{file}: {what} {name} {problem}. Correct it or leave it out")


def integers(file, what, entries, key, least=0, most=MOST_ID, defaults: Sequence[int] | None = None) -> np.ndarray:
    """int64 (n,); where an entry lacks the key, its default."""
    missing = defaults or [None] * len(entries)
    values = [one.get(key, other) for one, other in zip(entries, missing, strict=True)]
    for place, value in enumerate(values):
        if type(value) is not int or not least <= value <= most:
            limits = f"an integer from {least} to {most}" if most < MOST_ID else f"an integer from {least}"
            raise fault(file, what, entries, place, f"has {key}={value!r:.40}, which must be {limits}")
    return np.array(values, dtype=np.int64)


def strings(file: Path, what: str, entries: list[dict], key: str) -> list[str]:
    for place, one in enumerate(entries):
        if not isinstance(one.get(key), str) or not one[key] or "\0" in one[key]:
            raise fault(file, what, entries, place, f"has {key}={one.get(key)!r:.40}, which must be a name")
    return [one[key] for one in entries]


def unique(file: Path, what: str, ids: np.ndarray) -> np.ndarray:
    found, counts = np.unique(ids, return_counts=True)
    for number in found[counts > 1][:1].tolist():
        raise DataError(f"{file}: {what} id {number} occurs {counts.max()} times; each needs an id of its own")
    return ids


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < MOST_PIXELS  # false for NaN


def box(file: Path, annotations: list[dict], place: int) -> list[float]:
    value = annotations[place].get("bbox")
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        problem = f"has bbox={value!r:.60}, which must be four numbers: left, top, width, height"
        raise fault(file, "annotation", annotations, place, problem)
    return value


def area(file: Path, annotations: list[dict], place: int) -> float:
    width, height = annotations[place]["bbox"][2:]
    value = annotations[place].get("area", width * height)
    if type(value) not in (int, float) or not abs(value) < MOST_PIXELS**2:
        raise fault(file, "annotation", annotations, place, f"has area={value!r:.40}, which must be a number")
    return value


# ----------------------------------------------------------------------------------------------------- the splits


def read_scenes(places: dict[str, Place], data: DataConfig, seed: int) -> Scenes:
    """
    Args:
        places: of train, test and perhaps val, which is otherwise held out of train, data.val_fraction of its images.
        seed: draws these, and the images for training where data.max_train_samples limits them.
    """
    if data.in_memory:
        raise ConfigError(f"data={data.name} has images of many sizes, decoded for each batch: data.in_memory=false")
    found, categories = {}, {}
    for name, (file, folders) in places.items():
        names, records, categories[name] = read_annotations(file)
        folder = next((folder for folder in folders if (folder / names[0]).is_file()), folders[0])
        found[name] = Split(image_files(folder, names, records, file, data), list(range(len(names))), records)
        if sorted(map(str, categories[name])) != sorted(map(str, categories["train"])):
            raise DataError(f"{file} and {places['train'][0]} have different categories; ids and names must be equal")
    splits.refuse_shared_images({name: splits.Split.whole(one.images, []) for name, one in found.items()})
    train, val = found["train"], found.get("val")
    if val is None and data.val_fraction > 0:
        train, val = hold_out(train, data.val_fraction, seed)
    if data.max_train_samples is not None:
        train = limit(train, data.max_train_samples, seed)
    scenes = Scenes(train, val, found["test"], categories["train"])
    if data.num_classes not in (None, scenes.labels):
        raise DataError(
            f"data.num_classes={data.num_classes}, but the category ids of {places['train'][0]} are 0 to "
            f"{scenes.labels - 1} at most; set data.num_classes={scenes.labels}, or null to take what is found"
        )
    return scenes


def image_files(folder: Path, names: list[str], records: Records, file: Path, data: DataConfig) -> Files:
    """The images below `folder`, listed rather than asked for one by one: on a network that takes a while."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder.absolute()}, which must hold the images of {file}")
    there = dict(images_below(folder, "", folders_above(folder)))
    for name, (number, *_) in zip(names, records.images.tolist(), strict=True):
        if os.path.normpath(name) in there:
            continue
        if not (folder / name).is_file():
            raise DataError(f"no image {folder / name} (image id {number} of {file}); restore it, or remove its record")
        there[os.path.normpath(name)] = hash(place_of(folder / name)) % 2**64
    places = np.array([there[os.path.normpath(name)] for name in names], dtype=np.uint64)
    return Files(folder, names, data.channels, places)


def shuffled(count: int, purpose: str, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, purpose))
    return torch.randperm(count, generator=generator).tolist()


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(remaining, held out)"""
    count = round(fraction * len(split))
    if not 0 < count < len(split):
        raise DataError(f"data.val_fraction={fraction} of {len(split)} images is {count}; set it to 0 for no val split")
    order = shuffled(len(split), "hold out val", seed)
    return split.subset(sorted(order[count:])), split.subset(sorted(order[:count]))


def limit(split: Split, count: int, seed: int) -> Split:
    """A smaller `count` of the same seed is a subset."""
    if count > len(split):
        raise DataError(f"data.max_train_samples={count} but the train split has {len(split)} images; lower or drop it")
    return split.subset(sorted(shuffled(len(split), "train limit", seed)[:count]))
