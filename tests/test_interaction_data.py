"""Pairs of digits, and HICO-DET in PPDM's files: what is read, what is left out, and what is refused in a line."""

import json

import numpy as np
import pytest
from PIL import Image

from dropkey.config.schema import DataConfig
from dropkey.datasets import digit_pairs, digit_scenes, hico_det
from dropkey.errors import DataError

# --------------------------------------------------------------------------------------------------- pairs of digits

DIGITS = DataConfig(name="digit_pairs", image_size=48, channels=1, max_train_samples=300)


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "HELD_OUT", 60)
        yield digit_pairs.read(DIGITS, 0)


def test_pairs_are_of_a_zero_and_another_digit_and_say_where_it_lies(digits):
    seen = set()
    for record in digits.train.records + digits.test.records:
        stand = {}
        for subject, object_, verb in record["pairs"]:
            one, other = record["annotations"][subject], record["annotations"][object_]
            assert one["category_id"] == 0 != other["category_id"]
            (left, top, size, _), (x, y, side, _) = one["bbox"], other["bbox"]
            across, down = (x + side / 2) - (left + size / 2), (y + side / 2) - (top + size / 2)
            assert across**2 + down**2 <= 32**2
            name = digit_pairs.VERBS[verb]
            if name == "larger than":
                assert size > side
            else:
                stand.setdefault((subject, object_), []).append(name)
                more = {"left of": across, "right of": -across, "above": down, "below": -down}[name]
                assert more == max(abs(across), abs(down)) >= 0
            seen.add(name)
        assert all(len(names) == 1 for names in stand.values())
    assert seen == {*digit_pairs.VERBS}


def test_some_digits_are_too_far_apart_for_a_pair(digits):
    assert 0 < sum(not record["pairs"] for record in digits.train.records) < 60


def test_later_digits_are_rarer_in_training_alone(digits):
    def counts(split):
        labels = [one["category_id"] for record in split.records for one in record["annotations"]]
        return np.bincount(labels, minlength=10)

    train, test = counts(digits.train), counts(digits.test)
    assert train[1] > 1.5 * train[2] > 2 * train[4] and train[8:].sum() < 0.05 * train[1:].sum()
    assert test[1:].min() > 0.4 * test[1:].max()
    assert any(0 < count < 10 for count in digits.instances.values())


def test_pairs_of_digits_are_a_function_of_the_seed(digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_scenes, "HELD_OUT", 60)
        assert digit_pairs.read(DIGITS, 0).fingerprint() == digits.fingerprint()
        other = digit_pairs.read(DIGITS, 1)
    assert other.train.records != digits.train.records and other.test.records == digits.test.records


# ------------------------------------------------------------------------------------------------------ HICO-DET

SIZES = {"train": 12, "test": 4}
BOXES = [{"bbox": [10, 12, 30, 40], "category_id": 1}, {"bbox": [5, 20, 44, 50], "category_id": 4}]


def hoi(subject=0, object_=1, verb=73):
    return {"subject_id": subject, "object_id": object_, "category_id": verb, "hoi_category_id": 153}


def written(root, **changed):
    """Files in PPDM's format, of which `changed` replaces some: train and test (records), possible."""
    found = dict(changed)
    for name, count in SIZES.items():
        folder = root / "images" / f"{name}2015"
        folder.mkdir(parents=True)
        files = [f"HICO_{name}2015_{number + 1:08}.jpg" for number in range(count)]
        for file in files:
            Image.new("RGB", (60, 50)).save(folder / file)
        records = [{"file_name": file, "img_id": 1, "annotations": BOXES, "hoi_annotation": [hoi()]} for file in files]
        found[name] = [{**one, **found.get(name, {}).get(number, {})} for number, one in enumerate(records)]
    (root / "annotations").mkdir()
    for name, file in (("train", "trainval_hico.json"), ("test", "test_hico.json")):
        (root / "annotations" / file).write_text(json.dumps(found[name]))
    np.save(root / "annotations" / "corre_hico.npy", changed.get("possible", np.ones((117, 80))))
    return DataConfig(name="hico_det", root=str(root), image_size=64, val_fraction=0.0, in_memory=False)


def test_hico_det_is_read_as_published(tmp_path):
    possible = np.zeros((117, 80))
    possible[72, 3] = 1
    data = hico_det.read(written(tmp_path, possible=possible), 0)
    assert (len(data.train), data.val, len(data.test), data.labels) == (12, None, 4, 80)
    assert data.categories[0] == {"id": 0, "name": "person"} and data.categories[79]["name"] == "toothbrush"
    record = data.test.records[0]
    assert (record["width"], record["height"], record["pairs"]) == (60, 50, [[0, 1, 72]])
    assert [one["category_id"] for one in record["annotations"]] == [0, 3]
    assert record["annotations"][0]["bbox"] == [10, 12, 20, 28]
    assert data.possible.sum() == 1 and data.possible[72, 3]
    assert data.instances == {(0, 3, 72): 12} and not data.notes and not data.sided
    sample = data.train.sample(0)
    assert sample.boxes.tolist() == [[10, 12, 30, 40], [5, 20, 44, 50]] and sample.pairs.tolist() == [[0, 1, 72]]


def test_numbers_may_be_text_that_ends_a_line(tmp_path):
    boxes = [{**BOXES[0], "category_id": "1\n"}, {**BOXES[1], "category_id": "90\n"}]
    data = hico_det.read(written(tmp_path, train={0: {"annotations": boxes, "hoi_annotation": [hoi(verb="117\n")]}}), 0)
    assert [one["category_id"] for one in data.train.records[0]["annotations"]] == [0, 79]
    assert data.train.records[0]["pairs"] == [[0, 1, 116]]


def test_a_training_image_whose_interaction_names_no_box_is_left_out_and_said(tmp_path):
    changed = {1: {"hoi_annotation": [hoi(), hoi(object_=2)]}, 5: {"annotations": []}}
    data = hico_det.read(written(tmp_path, train=changed), 0)
    assert len(data.train) == 10 and data.instances == {(0, 3, 72): 10}
    assert data.notes[0].startswith("2 training images left out") and "HICO_train2015_00000002.jpg" in data.notes[0]
    assert data.train.images.path(data.train.rows[1]).endswith("HICO_train2015_00000003.jpg")


def test_boxes_that_are_empty_or_outside_are_said_and_are_no_targets(tmp_path):
    boxes = [*BOXES, {"bbox": [70, 5, 80, 9], "category_id": 3}, {"bbox": [9, 9, 9, 20], "category_id": 3}]
    both = {"annotations": boxes, "hoi_annotation": [hoi(), hoi(object_=2), hoi(object_=3)]}
    data = hico_det.read(written(tmp_path, train={0: both}, test={0: both}), 0)
    assert [note.split(" are")[0] for note in data.notes] == [
        "2 boxes of trainval_hico.json",
        "2 boxes of test_hico.json",
    ]
    assert data.train.sample(0).pairs.tolist() == [[0, 1, 72]] and len(data.train.sample(0).boxes) == 2
    assert len(data.test.records[0]["pairs"]) == 3  # they count in the evaluation


def test_a_training_image_keeps_a_hundred_boxes(tmp_path):
    many = {"annotations": BOXES * 60, "hoi_annotation": [hoi(), hoi(object_=100), hoi(object_=99)]}
    data = hico_det.read(written(tmp_path, train={0: many}, test={0: many}), 0)
    assert len(data.train.records[0]["annotations"]) == 100
    assert data.train.records[0]["pairs"] == [[0, 1, 72], [0, 99, 72]] and len(data.test.records[0]["pairs"]) == 3
    assert data.instances == {(0, 3, 72): 13, (0, 0, 72): 1}  # as read: the hundredth and first box is a person


def test_validation_and_fewer_images_are_drawn_by_the_seed(tmp_path):
    cfg = written(tmp_path)
    cfg.val_fraction, cfg.max_train_samples = 0.25, 5
    data, again, other = (hico_det.read(cfg, seed) for seed in (0, 0, 1))
    assert (len(data.train), len(data.val)) == (5, 3) and not {*data.train.rows} & {*data.val.rows}
    assert data.train.rows == again.train.rows and data.val.rows != other.val.rows
    assert data.instances == {(0, 3, 72): 12}  # rare is what is rare in the whole set
    cfg.max_train_samples = 10
    with pytest.raises(DataError, match="max_train_samples=10 but the train split has 9"):
        hico_det.read(cfg, 0)


WRONG = {
    "an unknown category": ({"annotations": [BOXES[0], {**BOXES[1], "category_id": 12}]}, "category_id 12 is none of"),
    "a category that is no number": ({"annotations": [{**BOXES[0], "category_id": "cat"}]}, "cat"),
    "a verb that is none": ({"hoi_annotation": [hoi(verb=118)]}, "category_id 118 is no verb from 1 to 117"),
    "a box of three numbers": ({"annotations": [{**BOXES[0], "bbox": [1, 2, 3]}]}, "expected 4"),
    "a box that is not finite": ({"annotations": [{**BOXES[0], "bbox": [1, 2, 3, float("nan")]}]}, "is not finite"),
    "a box without a category": ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, "'category_id' is missing"),
    "no annotations": ({"annotations": None}, "NoneType"),
    "an image that is not there": ({"file_name": "no.jpg"}, "there is no image .*no.jpg"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_record_is_one_line_with_file_and_image(case, tmp_path):
    change, expected = WRONG[case]
    with pytest.raises(DataError, match=f"trainval_hico.json, record 3.*{expected}") as error:
        hico_det.read(written(tmp_path, train={3: change}), 0)
    assert "\n" not in str(error.value)


def test_a_test_image_whose_interaction_names_no_box_is_one_line(tmp_path):
    with pytest.raises(
        DataError, match=r"test_hico.json, record 2 \(HICO_test2015_00000003.jpg\): an interaction names"
    ):
        hico_det.read(written(tmp_path, test={2: {"hoi_annotation": [hoi(subject=7)]}}), 0)


def damaged(root, file, content):
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)


FILES = {
    "no file": ("annotations/test_hico.json", None, "test_hico.json: No such file"),
    "no JSON": ("annotations/test_hico.json", b"[{", "test_hico.json is no JSON"),
    "COCO's format": (
        "annotations/trainval_hico.json",
        b'{"images": []}',
        "must be a list of images, in PPDM's format",
    ),
    "no images": ("annotations/trainval_hico.json", b"[]", "has no images that can be used"),
    "no list of mappings": ("annotations/trainval_hico.json", b"[3]", "record 0: an image must be a mapping, not 3"),
    "no possible pairs": ("annotations/corre_hico.npy", None, "corre_hico.npy: No such file"),
    "damaged possible pairs": ("annotations/corre_hico.npy", b"PK", "corre_hico.npy"),
    "no image file": ("images/test2015/HICO_test2015_00000001.jpg", b"?", "test_hico.json, record 0: cannot identify"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_one_line(case, tmp_path):
    file, content, expected = FILES[case]
    cfg = written(tmp_path)
    damaged(tmp_path, file, content)
    with pytest.raises(DataError, match=expected) as error:
        hico_det.read(cfg, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(80, 117), (117,)])
def test_possible_pairs_of_another_shape_are_one_line(tmp_path, shape):
    with pytest.raises(DataError, match=r"corre_hico\.npy holds float64"):
        hico_det.read(written(tmp_path, possible=np.zeros(shape)), 0)


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="to the folder that holds annotations/"):
        hico_det.read(DataConfig(name="hico_det", root=str(tmp_path / "no"), in_memory=False), 0)
