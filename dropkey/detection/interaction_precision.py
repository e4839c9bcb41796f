"""Mean average precision of interactions as QPIC computes it for HICO-DET, over classes of subject, object and verb.

A prediction is right if both of its boxes overlap those of a true pair with its classes and verb by at least a half,
and no better prediction of the image was counted for that pair. Known object (KO): each class on the images alone that
have an object of its category. Published KO figures come from the data set's Matlab code, whose figures are slightly
higher.
"""

from collections import Counter
from typing import Iterator, Optional

import numpy as np

MOST = 100  # predictions of an image
OVERLAP = 0.5
RARE = 10  # instances in training, from which on a class is not rare
RECALLS = np.arange(0, 1.1, 0.1)  # with its rounding, as officially: 0.30000000000000004 is not reached by 3 of 10
SUBJECT = 0  # category of all subjects

Triplet = tuple[int, int, int]  # categories of subject and object, and the verb


def strongest(scores: np.ndarray, objects: np.ndarray, boxes: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """The best predictions of an image, the best first: float64 N 11, boxes of subject and object, category of the
    object, verb, score.

    Args:
        scores: Q V.
        objects: int Q, categories.
        boxes: Q 8, of subject and object: left, top, right, bottom in pixels.
        possible: bool V K, verbs that an object can have; others score 0.
    """
    scores = (scores * possible[:, objects].T).astype(np.float64)
    best = np.argsort(-scores.ravel(), kind="stable")[:MOST]
    query, verb = np.unravel_index(best, scores.shape)
    return np.column_stack([boxes[query], objects[query], verb, scores[query, verb]])


def interaction_precision(
    records: list[dict], found: list[np.ndarray], instances: dict[Triplet, int]
) -> dict[str, Optional[float]]:
    """Percent; None where there are no such classes.

    Args:
        records: every image that was looked at, with `id`, `annotations` and `pairs`, see `Split.records`.
        found: of each image, as from `strongest`.
        instances: of each class, how many there are in the training set; those of none are neither rare nor non-rare.
    """
    images = sorted(zip(records, found, strict=True), key=lambda image: image[0]["id"])
    true = Counter(triplet for record, _ in images for triplet in triplets(record))
    rows = {triplet: [] for triplet in true}
    for record, predictions in images:
        if record["annotations"]:  # officially, others are passed over with all that was found in them
            there = {one["category_id"] for one in record["annotations"]}
            for triplet, score, right in judged(record, predictions):
                if triplet in true:
                    rows[triplet].append((score, right, triplet[1] in there))
    figures = {}
    for name, every in (("", True), ("ko_", False)):
        values = {
            triplet: precision_and_recall([row[:2] for row in rows[triplet] if every or row[2]], count)
            for triplet, count in true.items()
        }
        counts = {triplet: instances.get(triplet, 0) for triplet in true}
        figures |= {
            f"{name}full": mean(value[0] for value in values.values()),
            f"{name}rare": mean(values[one][0] for one, count in counts.items() if 0 < count < RARE),
            f"{name}non_rare": mean(values[one][0] for one, count in counts.items() if count >= RARE),
        }
        if every:
            recall = mean(value[1] for value in values.values())
    return figures | {"recall": recall}


def triplets(record: dict) -> list[Triplet]:
    """Of each pair of an image; one that is listed twice, twice."""
    categories = [one["category_id"] for one in record["annotations"]]
    return [(categories[subject], categories[object_], verb) for subject, object_, verb in record["pairs"]]


def judged(record: dict, predictions: np.ndarray) -> Iterator[tuple[Triplet, float, bool]]:
    """Class and score of each prediction, and whether it is right."""
    boxes = np.array([one["bbox"] for one in record["annotations"]], dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    categories = np.array([one["category_id"] for one in record["annotations"]])
    subjects, objects, verbs = np.array(record["pairs"], dtype=np.int64).reshape(-1, 3).T
    objects_found, verbs_found = predictions[:, 8:10].astype(np.int64).T
    overlaps = np.minimum(
        overlap(predictions[:, :4], boxes[subjects]), overlap(predictions[:, 4:8], boxes[objects])
    )  # predictions x pairs
    same = (categories[subjects] == SUBJECT) & (objects_found[:, None] == categories[objects])
    overlaps[~(same & (verbs_found[:, None] == verbs) & (overlaps >= OVERLAP))] = 0
    right = np.zeros(len(predictions), dtype=bool)
    if len(verbs):
        # the best pair, the first of equals, even if a better prediction has it already
        matched = np.flatnonzero(overlaps.max(1) > 0)
        right[matched[np.unique(overlaps[matched].argmax(1), return_index=True)[1]]] = True
    for category, verb, score, is_right in zip(objects_found, verbs_found, predictions[:, 10], right, strict=True):
        yield (SUBJECT, int(category), int(verb)), float(score), bool(is_right)


def overlap(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of N 4 and M 4 boxes, N M, where a box holds its last pixels too (as in PASCAL VOC); 0 if
    only these are common."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    common = np.prod(high - low + 1, axis=-1) * (high > low).all(-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=-1) for boxes in (some, others)]
    return common / (areas[0][:, None] + areas[1][None] - common)


def precision_and_recall(rows: list[tuple[float, bool]], count: int) -> tuple[float, float]:
    """Average precision over eleven recalls, and the highest recall, of scores and whether they are right; `count`: how
    many there are to be found."""
    if not rows:
        return 0.0, 0.0
    scores, right = (np.array(each) for each in zip(*rows, strict=True))
    found = right[np.argsort(-scores, kind="stable")].cumsum()
    recall, precision = found / count, found / np.arange(1, len(found) + 1)
    best = [precision[recall >= least].max(initial=0) for least in RECALLS]
    return float(np.mean(best)), float(recall.max())


def mean(values: Iterator[float]) -> Optional[float]:
    values = list(values)
    return 100 * float(np.mean(values)) if values else None
