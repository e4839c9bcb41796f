"""Small data sets in the layouts of HICO-DET and of meshes; with that of COCO, one for each task that reads folders."""

import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import coco_folder
from dropkey.config.schema import DataConfig
from dropkey.datasets import mesh_folder, stick_figures
from dropkey.mesh.samples import Meshes

TRAIN, TEST = 12, 7
PICTURES = {"detection": "train2017/*.jpg", "interaction": "images/train2015/*.jpg", "mesh": "images/0.png"}


def write(task: str, root: Path) -> Path:
    """The files that `task` trains on, TRAIN and TEST images. Some have nothing to be found in them."""
    if task == "detection":
        return coco_folder.write(root, TRAIN, TEST)
    if task == "interaction":
        return pairs(root)
    cfg = DataConfig(name="stick_figures", image_size=32, channels=1, max_train_samples=TRAIN + TEST)
    with mock.patch.object(stick_figures, "HELD_OUT", 1):
        return meshes(root, stick_figures.read(cfg, 0), TRAIN, TEST)


def picture(task: str, root: Path) -> Path:
    """One of the images for training."""
    return min(root.glob(PICTURES[task]))


def pairs(root: Path) -> Path:
    """In PPDM's format, with the boxes of `coco_folder`: the first is a person, who does something to the others."""
    (root / "annotations").mkdir(parents=True)
    for name, folder, count in (("trainval", "train", TRAIN), ("test", "test", TEST)):
        content = coco_folder.scenes(root / "images" / f"{folder}2015", count, random.Random(name))
        records = []
        for image in content["images"]:
            boxes = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            annotations, given = [], []
            for place, one in enumerate(boxes):
                left, top, width, height = one["bbox"]
                label = 1 if place == 0 else one["category_id"]
                annotations.append({"bbox": [left, top, left + width, top + height], "category_id": label})
                given += [{"subject_id": 0, "object_id": place, "category_id": 70 + place}] * (place > 0)
            records.append({"file_name": image["file_name"], "annotations": annotations, "hoi_annotation": given})
        (root / "annotations" / f"{name}_hico.json").write_text(json.dumps(records))
    np.save(root / "annotations" / "corre_hico.npy", np.ones((117, 80)))
    return root


def meshes(root: Path, data: Meshes, train: int, test: int) -> Path:
    """The first figures of `data` as files."""
    count = train + test
    names = [f"images/{number}.png" for number in range(count)]
    (root / "images").mkdir(parents=True)
    for name, image in zip(names, data.train.images.images, strict=False):
        Image.fromarray(image[0].numpy()).save(root / name)
    body = {key: getattr(data.body, key).numpy() for key in mesh_folder.BODY}
    parts = {"files": np.array(names), "split": np.array(["train"] * train + ["test"] * test)}
    vertices, points = (part[:count].numpy() for part in (data.train.vertices, data.train.points))
    np.savez(root / "meshes.npz", **body, **parts, vertices=vertices, points=points)
    return root
