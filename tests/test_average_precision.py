"""COCO's average precision against a second package, faster-coco-eval, on random images and detections."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropkey.detection.average_precision import FIGURES, average_precision

pytest.importorskip("pycocotools")
second = pytest.importorskip("faster_coco_eval")

SIDES = (5, 20, 31, 33, 60, 95, 97, 200)  # around the borders of small, medium and large: 32 and 96


def drawn(seed: int) -> tuple[list[dict], np.ndarray]:
    """Images with up to five objects of three classes, a tenth of them groups, and detections near and far of them."""
    rng = np.random.default_rng(seed)
    records, found = [], []
    for number in rng.permutation(1000)[: rng.integers(1, 8)].tolist():
        record = {"id": number, "width": 640, "height": 480, "annotations": []}
        for row in range(rng.integers(0, 6)):
            width, height = rng.choice(SIDES, 2).tolist()
            box = [*rng.uniform(0, 300, 2).tolist(), width, height]
            label, group = int(rng.integers(3)), bool(rng.random() < 0.1)
            area = width * height * rng.uniform(0.5, 1)  # as of a mask, smaller than the box
            record["annotations"].append(
                {"id": 1 + 10 * number + row, "image_id": number, "category_id": label, "bbox": box, "area": area}
                | {"iscrowd": int(group)}
            )
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, 0.15, 4) * np.minimum(width, height)
                moved[2:] = moved[2:].clip(1)
                found.append([number, *moved, rng.random(), label if rng.random() < 0.8 else rng.integers(3)])
        for _ in range(rng.integers(0, 4)):
            found.append([number, *rng.uniform(0, 300, 2), *rng.choice(SIDES, 2), rng.random(), rng.integers(3)])
        records.append(record)
    return records, np.array(found, dtype=np.float64).reshape(-1, 7)


def of_the_second_package(records: list[dict], found: np.ndarray) -> dict:
    labels = {one["category_id"] for record in records for one in record["annotations"]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = second.COCO(
            {
                "images": [{key: record[key] for key in ("id", "width", "height")} for record in records],
                "annotations": [one for record in records for one in record["annotations"]],
                "categories": [{"id": label, "name": str(label)} for label in sorted(labels)],
            }
        )
        evaluation = second.COCOeval_faster(truth, truth.loadRes(found), "bbox")
        evaluation.run()
    values = evaluation.stats[: len(FIGURES)].tolist()
    return {key: None if value < 0 else 100 * value for key, value in zip(FIGURES, values, strict=True)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_all_six_figures_are_those_of_a_second_package(seed):
    records, found = drawn(seed)
    ours = average_precision(records, found)
    if len(found):
        assert ours == pytest.approx(of_the_second_package(records, found), abs=1e-9)


def test_the_random_cases_have_every_size_and_figures_between_none_and_all():
    values = [average_precision(*drawn(seed)) for seed in range(40)]
    for key in FIGURES:
        known = [value[key] for value in values if value[key] is not None]
        assert sum(0 < value < 100 for value in known) > 5, key
