"""Any images with annotations in COCO's format: data.root has a file for training and one for validation or test."""

from pathlib import Path

from dropkey.config.schema import DataConfig
from dropkey.data.folders import existing_root
from dropkey.detection.coco import Place, read_scenes
from dropkey.detection.scenes import Scenes
from dropkey.errors import DataError

NAMES = {"train": ("train", "train2017"), "val": ("val", "valid", "val2017"), "test": ("test",)}
FILES = ("annotations/instances_{}.json", "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
FOLDERS = ("{}", "images/{}", "images", ".")  # of the images; the first that has them
LAYOUT = "train.json and val.json or test.json (or annotations/instances_train.json ...), with images in train/ ..."


def read(data: DataConfig, seed: int) -> Scenes:
    """Test images are those of test.json, or else of val.json, and validation images are then held out.

    Raises:
        DataError: no such files, or damaged ones.
    """
    root = existing_root(data, LAYOUT)
    places = {split: place for split, names in NAMES.items() if (place := _find(root, names)) is not None}
    if "test" not in places and "val" in places:
        places["test"] = places.pop("val")
    for split in ("train", "test"):
        if split not in places:
            raise DataError(f"no annotations for {split} in {root.absolute()}; expected {LAYOUT}")
    return read_scenes(places, data, seed)


def _find(root: Path, names: tuple[str, ...]) -> Place | None:
    for name in names:
        for pattern in FILES:
            if (file := root / pattern.format(name)).is_file():
                return file, [root / folder.format(one) for folder in FOLDERS for one in names]
    return None
