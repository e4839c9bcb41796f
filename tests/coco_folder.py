"""A small data set in COCO's layout: pictures of noise in many sizes, with boxes."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
SIDES = (24, 60)


def write(root: Path, train: int = 12, val: int = 7, sides: tuple[int, int] = SIDES) -> Path:
    """COCO 2017's names. Every fourth image has no annotations; ids are not in the order of the files."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        content = scenes(root / split, count, random.Random(split), sides)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def scenes(folder: Path, count: int, draw: random.Random, sides: tuple[int, int] = SIDES) -> dict:
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(count, 0, -1):
        width, height = draw.randint(*sides), draw.randint(*sides)
        name = f"{number:012d}.jpg"
        noise = np.random.default_rng(number).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / name)
        images.append({"id": 10 * number, "file_name": name, "width": width, "height": height, "license": 1})
        for _ in range(number % 4):
            w, h = draw.randint(6, width), draw.randint(6, height)
            box = [draw.randint(0, width - w) + 0.25, draw.randint(0, height - h), w - 0.25, h]
            category = draw.choice(CATEGORIES)["id"]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 10 * number, "category_id": category, "bbox": box}
                | {"area": box[2] * box[3] / 2, "iscrowd": 0, "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]}
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def edit(file: Path, change) -> None:
    """`change(content)` alters what the file holds."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
