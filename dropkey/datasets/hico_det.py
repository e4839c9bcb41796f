"""HICO-DET in the files of PPDM, which QPIC reads too: see `LAYOUT`.

A record has file_name, annotations (bbox: left, top, right, bottom; category_id: COCO's) and hoi_annotation (subject_id
and object_id: positions in annotations; category_id: the verb, from 1). As officially: a training image is left out if
an interaction names a box that it does not have, boxes beyond the hundredth are left out of training, and boxes outside
their image or empty are no targets. Categories become 0 to 79 in COCO's order, verbs 0 to 116.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.models import get_weight

from dropkey.config.schema import DataConfig
from dropkey.data.folders import existing_root
from dropkey.data.images import Files
from dropkey.detection.coco import hold_out, limit
from dropkey.detection.interactions import Interactions, counted
from dropkey.detection.scenes import Split
from dropkey.errors import DataError, explained

LAYOUT = "annotations/{trainval_hico.json,test_hico.json,corre_hico.npy} and images/{train2015,test2015}/"
MOST_BOXES = 100  # of a training image
VERBS = (  # 1 to 117 of the files  # noqa: SIM905
    "adjust assemble block blow board break brush_with buy carry catch chase check clean control cook cut "
    "cut_with direct drag dribble drink_with drive dry eat eat_at exit feed fill flip flush fly greet grind groom "
    "herd hit hold hop_on hose hug hunt inspect install jump kick kiss lasso launch lick lie_on lift light load "
    "lose make milk move no_interaction open operate pack paint park pay peel pet pick pick_up point pour pull "
    "push race read release repair ride row run sail scratch serve set shear sign sip sit_at sit_on slide smell "
    "spin squeeze stab stand_on stand_under stick stir stop_at straddle swing tag talk_on teach text_on throw tie "
    "toast train turn type_on walk wash watch wave wear wield zip "
).split()
MISSING = "an interaction names a box that the image does not have"


def read(data: DataConfig, seed: int) -> Interactions:
    """`seed` draws the images of data.val_fraction and data.max_train_samples.

    Raises:
        DataError: a file is missing or not as described, with its path and the image.
    """
    root = existing_root(data, LAYOUT)
    names = get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]  # at COCO's ids; N/A: gaps
    categories = [number for number, name in enumerate(names) if number and name != "N/A"]
    possible = read_possible(root / "annotations" / "corre_hico.npy", len(categories))
    # of another data set in the same format only the numbers are known
    verbs = VERBS if len(possible) == len(VERBS) else [f"verb {number}" for number in range(1, len(possible) + 1)]
    notes: list[str] = []
    try:
        whole, test = (
            read_split(root, f"{name}_hico.json", f"{folder}2015", categories, len(possible), data.channels, notes)
            for name, folder in (("trainval", "train"), ("test", "test"))
        )
    except OSError as error:
        raise DataError(f"cannot read data={data.name}: {explained(error)}; data.root must hold {LAYOUT}") from error
    instances = counted(whole.records)
    for record in whole.records:
        record["annotations"] = record["annotations"][:MOST_BOXES]
        record["pairs"] = [pair for pair in record["pairs"] if max(pair[:2]) < MOST_BOXES]
    train, val = hold_out(whole, data.val_fraction, seed) if data.val_fraction else (whole, None)
    if data.max_train_samples is not None:
        train = limit(train, data.max_train_samples, seed)
    named = [{"id": place, "name": names[number]} for place, number in enumerate(categories)]
    return Interactions(train, val, test, named, verbs, possible, instances, notes=notes)


def read_possible(file: Path, objects: int) -> np.ndarray:
    """bool V K."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = explained(error) if isinstance(error, OSError) and error.errno else f"{file}: {error}"
        raise DataError(f"{reason} (the possible pairs of verb and object); data.root must hold {LAYOUT}") from error
    if found.ndim != 2 or found.shape[1] != objects or not np.isin(found, (0, 1)).all():
        raise DataError(f"{file} holds {found.dtype} {found.shape}; it must be 0 or 1 for verbs x {objects} objects")
    return found.astype(bool)


def read_split(
    root: Path, name: str, folder: str, categories: list[int], verbs: int, channels: int, notes: list[str]
) -> Split:
    file, records, skipped, outside = root / "annotations" / name, [], [], 0
    for number, given in enumerate(listed(file)):
        try:
            record = {"id": number, **converted(given, categories, verbs)}
            with Image.open(root / "images" / folder / record["file_name"]) as picture:
                record["width"], record["height"] = picture.size
        except FileNotFoundError as error:
            raise DataError(f"{file}, record {number}: there is no image {error.filename}") from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            wrong = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DataError(f"{file}, record {number}: {wrong}") from None
        count = len(record["annotations"])
        if any(not 0 <= place < count for pair in record["pairs"] for place in pair[:2]):
            if not folder.startswith("train"):
                raise DataError(f"{file}, record {number} ({record['file_name']}): {MISSING}")
            skipped.append(record["file_name"])
            continue
        outside += sum(empty(one["bbox"], record) for one in record["annotations"])
        records.append(record)
    if skipped:
        notes.append(f"{len(skipped):,} training images left out, where {MISSING} (first: {skipped[0]})")
    if outside:
        notes.append(f"{outside:,} boxes of {name} are empty or outside their image")
    if not records:
        raise DataError(f"{file} has no images that can be used")
    images = Files(root / "images" / folder, [record["file_name"] for record in records], channels)
    return Split(images, list(range(len(records))), records)


def listed(file: Path) -> Iterator[Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{file} must be a list of images, in PPDM's format; it is a {type(content).__name__}")
    return content


def converted(given: dict, categories: list[int], verbs: int) -> dict:
    """A record as the program has it, see `Split.records`.

    Raises:
        KeyError, TypeError, ValueError: it is not as described.
    """
    if not isinstance(given, dict):
        raise TypeError(f"an image must be a mapping, not {str(given)[:50]}")
    name, annotations, pairs = given["file_name"], [], []
    for place, one in enumerate(given["annotations"]):
        left, top, right, bottom = box = [float(number) for number in one["bbox"]]
        category = whole_number(one["category_id"])
        if not all(map(math.isfinite, box)):
            raise ValueError(f"annotation {place} of {name}: bbox {one['bbox']} is not finite")
        if category not in categories:
            raise ValueError(f"annotation {place} of {name}: category_id {category} is none of COCO's 80")
        size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top), "iscrowd": 0}
        annotations.append({"id": place + 1, "category_id": categories.index(category), **size})
    for one in given["hoi_annotation"]:
        subject, object_, verb = (whole_number(one[key]) for key in ("subject_id", "object_id", "category_id"))
        if not 1 <= verb <= verbs:
            raise ValueError(f"interaction of {name}: category_id {verb} is no verb from 1 to {verbs}")
        pairs.append([subject, object_, verb - 1])
    return {"file_name": str(name), "annotations": annotations, "pairs": pairs}


def whole_number(value: Any) -> int:
    """Some files have numbers as text that ends a line."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{value} is no whole number")
    return int(value)


def empty(box: list[float], record: dict) -> bool:
    """Whether nothing of the box is within the image."""
    left, top, width, height = box
    across, down = min(left + width, record["width"]) - max(left, 0), min(top + height, record["height"]) - max(top, 0)
    return min(width, height, across, down) <= 0
