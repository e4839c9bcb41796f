"""COCO 2017: 118,287 images for training; its 5,000 validation images are the test split. Classes are the ids of the
categories, 1 to 90 with gaps, as in DETR: 91 outputs."""

from dropkey.config.schema import DataConfig
from dropkey.data.folders import existing_root
from dropkey.detection.coco import read_scenes
from dropkey.detection.scenes import Scenes
from dropkey.errors import DataError

LAYOUT = "annotations/instances_{train,val}2017.json, train2017/ and val2017/ (COCO 2017, from cocodataset.org)"


def read(data: DataConfig, seed: int) -> Scenes:
    """Raises DataError: no such files, or damaged ones."""
    root = existing_root(data, LAYOUT)
    places = {
        split: (root / f"annotations/instances_{name}2017.json", [root / f"{name}2017"])
        for split, name in (("train", "train"), ("test", "val"))
    }
    for file, _ in places.values():
        if not file.is_file():
            raise DataError(f"no file {file.absolute()}; data.root must hold {LAYOUT}")
    return read_scenes(places, data, seed)
