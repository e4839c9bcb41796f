"""Data in COCO's format: what is read, compactly; each kind of damage in one line."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import coco_folder
from dropkey.config.schema import DataConfig
from dropkey.data.augment import Normalize
from dropkey.datasets import coco, coco_format
from dropkey.detection.boxes import Augment
from dropkey.detection.coco import read_annotations
from dropkey.detection.scenes import TrainLoader
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError, DataError

DATA = DataConfig(name="coco", in_memory=False, val_fraction=0.0)
CPU = torch.device("cpu")
TRAIN = "annotations/instances_train2017.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Not to be changed."""
    return coco_folder.write(tmp_path_factory.mktemp("coco") / "coco")


@pytest.fixture
def root(published, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(published, tmp_path / "coco")


def read(root, **keys):
    reader = {"coco": coco, "coco_format": coco_format}[keys.get("name", "coco")]
    return reader.read(dataclasses.replace(DATA, root=str(root), **keys), 0)


# ---------------------------------------------------------------------------------------------------- what is read


def test_all_images_are_read_by_id_also_those_without_boxes(published):
    scenes = read(published)
    assert [record["id"] for record in scenes.train.records] == [10 * number for number in range(1, 13)]
    assert len(scenes.test) == 7 and scenes.val is None
    counts = [len(record["annotations"]) for record in scenes.train.records]
    assert counts == [number % 4 for number in range(1, 13)]
    assert len(scenes.train.sample(3).boxes) == 0
    assert scenes.labels == 91 and [one["name"] for one in scenes.categories] == ["person", "car", "toothbrush"]


def test_records_are_those_of_the_file(published):
    content = json.loads((published / TRAIN).read_text())
    scenes = read(published)
    for image in content["images"]:
        record = next(one for one in scenes.train.records if one["id"] == image["id"])
        own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        assert [{**one, "segmentation": 0} for one in own] == [
            {**one, "segmentation": 0} for one in record["annotations"]
        ]
        assert (record["width"], record["height"]) == (image["width"], image["height"])


def test_samples_are_the_pictures_with_boxes_as_corners(published):
    scenes = read(published)
    sample, record = scenes.train.sample(2), scenes.train.records[2]
    picture = np.asarray(Image.open(published / "train2017" / "000000000003.jpg"))
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), picture)
    left, top, width, height = record["annotations"][0]["bbox"]
    assert sample.boxes[0].tolist() == [left, top, left + width, top + height]
    assert sample.labels.tolist() == [one["category_id"] for one in record["annotations"]]


def test_validation_and_fewer_images_are_drawn_of_the_training_images(published):
    scenes = read(published, val_fraction=0.25, max_train_samples=5)
    train, val = ({record["id"] for record in split.records} for split in (scenes.train, scenes.val))
    assert (len(train), len(val)) == (5, 3) and not train & val
    assert {record["id"] for record in read(published, val_fraction=0.25, max_train_samples=4).train.records} < train
    for position in range(5):  # the pictures are drawn with their records
        assert scenes.train.sample(position).size[1] == scenes.train.records[position]["width"]
    other = coco.read(dataclasses.replace(DATA, root=str(published), val_fraction=0.25), 1)
    assert {record["id"] for record in other.val.records} != val


def test_the_fingerprint_is_of_the_annotations_and_not_of_the_place(published, root):
    first = read(published).fingerprint()
    assert read(root).fingerprint() == first
    coco_folder.edit(root / TRAIN, lambda content: content["annotations"][0].update(category_id=90, bbox=[0, 0, 6, 6]))
    assert read(root).fingerprint() != first != read(published, max_train_samples=5).fingerprint()


LAYOUTS = {
    "as COCO": {},
    "files in the root": {TRAIN: "train.json", "annotations/instances_val2017.json": "val.json"},
    "images in one folder": {
        TRAIN: "annotations/train.json",
        "annotations/instances_val2017.json": "annotations/test.json",
        "train2017": "images/train",
        "val2017": "images/test",
    },
    "beside the images": {
        TRAIN: "train2017/_annotations.coco.json",
        "annotations/instances_val2017.json": "val2017/_annotations.coco.json",
        "train2017": "train",
        "val2017": "valid",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_data_are_found_in_several_layouts(root, layout):
    for old, new in LAYOUTS[layout].items():
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)
    scenes = read(root, name="coco_format")
    assert (len(scenes.train), scenes.val, len(scenes.test)) == (12, None, 7)
    assert scenes.test.sample(0).boxes.shape == (1, 4)


def test_own_data_may_have_all_three_splits(root):
    for name in ("train", "val"):
        (root / "annotations" / f"instances_{name}2017.json").rename(root / f"{name}.json")
    (root / "test.json").write_text(json.dumps(coco_folder.scenes(root / "test", 5, __import__("random").Random(1))))
    scenes = read(root, name="coco_format", val_fraction=0.5)
    assert (len(scenes.train), len(scenes.val), len(scenes.test)) == (12, 7, 5)


def test_a_million_annotations_are_kept_in_arrays(published):
    """64 bytes each, which worker processes neither copy nor touch."""
    records = read(published).train.records
    assert {type(value) for value in vars(records).values()} == {np.ndarray}
    assert records.boxes.nbytes + records.numbers.nbytes == 64 * len(records.boxes)


def test_what_an_annotation_may_lack_has_a_default(root):
    def change(content):
        for one in content["annotations"]:
            del one["iscrowd"], one["area"], one["id"]

    coco_folder.edit(root / TRAIN, change)
    record = read(root).train.records[0]
    *_, width, height = record["annotations"][0]["bbox"]
    assert record["annotations"][0]["area"] == width * height and record["annotations"][0]["iscrowd"] == 0
    numbers = [one["id"] for record in read(root).train.records for one in record["annotations"]]
    assert len(set(numbers)) == len(numbers)


# --------------------------------------------------------------------------------------------------- what is refused


def of_annotation(**keys):
    return lambda content: content["annotations"][0].update(keys)


def of_image(**keys):
    return lambda content: content["images"][0].update(keys)


DAMAGE = {
    "a box of NaN": (of_annotation(bbox=[1, 2, math.nan, 4]), r"annotation id 1 has bbox=\[1, 2, nan, 4\]"),
    "an infinite box": (of_annotation(bbox=[1, 2, math.inf, 4]), "annotation id 1 has bbox="),
    "a box of text": (of_annotation(bbox=["1", 2, 3, 4]), "annotation id 1 has bbox=.*must be four numbers"),
    "a box of three": (of_annotation(bbox=[1, 2, 3]), "annotation id 1 has bbox=.*must be four numbers"),
    "a box of nothing": (of_annotation(bbox=None), "annotation id 1 has bbox=None"),
    "a huge box": (of_annotation(bbox=[0, 0, 10**400, 1]), "annotation id 1 has bbox="),
    "an unknown category": (of_annotation(category_id=2), "annotation id 1 is of category 2, which is not there"),
    "an unknown image": (of_annotation(image_id=5), "annotation id 1 is of image 5, which is not there"),
    "a category as text": (of_annotation(category_id="1"), "annotation id 1 has category_id='1'"),
    "an area of nothing": (of_annotation(area=None), "annotation id 1 has area=None"),
    "a strange iscrowd": (of_annotation(iscrowd=2), "annotation id 1 has iscrowd=2"),
    "two annotations of one id": (of_annotation(id=2), "annotation id 2 occurs 2 times"),
    "two images of one id": (of_image(id=10), "image id 10 occurs 2 times"),
    "an image without a name": (of_image(file_name=""), "image id 120 has file_name=''"),
    "an image without a size": (lambda content: content["images"][0].pop("width"), "image id 120 has width=None"),
    "an id as text": (of_image(id="a"), "image number 1 of the list has id='a'"),
    "a missing picture": (of_image(file_name="gone.jpg"), r"no image \S*gone.jpg \(image id 120 of \S*train2017.json"),
    "no categories": (lambda content: content.pop("categories"), "must be .* a list of objects, categories"),
    "no images": (lambda content: content.update(images=[]), "has no images"),
    "no annotations": (lambda content: content.update(annotations=[]), "has no annotations"),
    "a list of numbers": (lambda content: content.update(images=[1, 2]), "a list of objects, images"),
    "a category without a name": (lambda content: content["categories"][0].pop("name"), "category id 1 has name=None"),
    "a huge category": (
        lambda content: content["categories"][0].update(id=10**6),
        "category id 1000000 has id=1000000",
    ),
    "other categories": (
        lambda content: content["categories"][0].update(name="dog"),
        "instances_val2017.json and .*instances_train2017.json have different categories",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_with_file_and_id(root, damage):
    change, message = DAMAGE[damage]
    coco_folder.edit(root / TRAIN, change)
    with pytest.raises(DataError, match=message) as caught:
        read(root)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


TEXTS = {"cut off": '{"images": [', "no object": "[1, 2]", "deep": "[" * 100_000, "no text": "\udcff"}


@pytest.mark.parametrize("text", TEXTS)
def test_a_damaged_file_is_one_line(root, text):
    (root / TRAIN).write_text(TEXTS[text], errors="surrogateescape")
    with pytest.raises(DataError, match=r"instances_train2017.json is (no JSON|not in COCO's format)"):
        read(root)


def test_a_folder_without_annotations_says_what_it_must_hold(root):
    (root / TRAIN).unlink()
    with pytest.raises(DataError, match=r"no file .*instances_train2017.json; data.root must hold annotations/"):
        read(root)


@pytest.mark.parametrize("gone", [TRAIN, "train2017", "."])
def test_what_is_missing_is_named(root, gone):
    (root / gone).rename(root.parent / "elsewhere")
    with pytest.raises(DataError, match=str(root / gone)):
        read(root)


def test_own_data_without_a_second_file_are_told_what_is_expected(root):
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"no annotations for test in .*train.json and val.json"):
        read(root, name="coco_format")


def test_an_image_in_two_splits_is_refused(root):
    (root / "val2017" / "000000000001.jpg").unlink()
    (root / "val2017" / "000000000001.jpg").symlink_to(root / "train2017" / "000000000002.jpg")
    with pytest.raises(DataError, match=r"000000000002.jpg .train. and .*000000000001.jpg .test. are the same image"):
        read(root)


OPTIONS = {
    "data.in_memory=false": ({"in_memory": True}, ConfigError),
    "set data.num_classes=91": ({"num_classes": 80}, DataError),
    "data.max_train_samples=13": ({"max_train_samples": 13}, DataError),
    "data.val_fraction=0.01 of 12 images is 0": ({"val_fraction": 0.01}, DataError),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_keys_that_cannot_work_are_one_line(published, message):
    keys, kind = OPTIONS[message]
    with pytest.raises(kind, match=message):
        read(published, **keys)


# ------------------------------------------------------------------------------------------------- damage in pictures


def loader(root, workers=0, batch_size=4) -> TrainLoader:
    normalize = Normalize(DataConfig(channels=3), CPU)
    augment = Augment(hflip=0.5, scales=(24, 32), max_size=50, crop_scales=(30, 40), crop_sides=(16, 30))
    options = {"batch_size": batch_size, "grad_accum_steps": 1, "seed": 3, "dist": DistContext(0, 1, CPU)}
    return TrainLoader(read(root).train, augment, normalize, **options, workers=workers)


def test_a_damaged_picture_is_named_by_the_process_that_decodes(root):
    path = root / "train2017" / "000000000005.jpg"
    path.write_bytes(path.read_bytes()[:300])
    batches = loader(root, workers=1)
    with pytest.raises(DataError, match=f"cannot read image {path}"):
        list(batches.epoch(0))


def test_a_picture_of_another_size_than_its_record_is_named(root):
    path = root / "train2017" / "000000000005.jpg"
    Image.open(path).resize((31, 17)).save(path)
    said = next(record for record in read(root).train.records if record["id"] == 50)
    with pytest.raises(DataError, match=rf"{path} has 31 x 17 pixels.*\(id 50\) says {said['width']} x "):
        list(loader(root).epoch(0))


def test_grey_pictures_have_three_channels(root):
    path = root / "train2017" / "000000000005.jpg"
    Image.open(path).convert("L").save(path)
    assert all(batch.images.shape[1] == 3 for batch in loader(root).epoch(0))


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_bits_with_any_number_of_workers(published, workers):
    """Also when an epoch is left and another one begun, and after it begins within."""
    alone, other = loader(published), loader(published, workers)
    next(other.epoch(5))  # left
    for epoch, start in ((0, 0), (1, 1)):
        pairs = list(zip(alone.epoch(epoch, start), other.epoch(epoch, start), strict=True))
        assert len(pairs) == 3 - start
        for one, two in pairs:
            assert torch.equal(one.images, two.images) and torch.equal(one.padding, two.padding)
            for key in ("labels", "boxes", "pairs"):
                assert all(map(torch.equal, getattr(one, key), getattr(two, key)))
            assert one.records == two.records and torch.equal(one.ids, two.ids)
    other.close()


def test_padding_is_zero_and_marked(published):
    for batch in loader(published).epoch(0):
        assert not batch.images.masked_select(batch.padding[:, None]).any()
        real = (~batch.padding).sum((1, 2))
        assert len(set(real.tolist())) > 1  # images of unequal size


def test_annotations_without_a_whole_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_annotations(tmp_path / "none.json")
