"""HICO-DET's mean average precision: against a plain rewrite, and each of its rules by hand."""

import numpy as np
import pytest

from dropkey.detection.interaction_precision import interaction_precision, overlap, precision_and_recall, strongest

FIGURES = ("full", "rare", "non_rare", "ko_full", "ko_rare", "ko_non_rare", "recall")

# ------------------------------------------------------------------------- the same, one prediction after the other


def plain_overlap(one, other):
    left, top, right, bottom = (
        max(one[0], other[0]),
        max(one[1], other[1]),
        min(one[2], other[2]),
        min(one[3], other[3]),
    )
    if left >= right or top >= bottom:
        return 0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    common = (right - left + 1) * (bottom - top + 1)
    return common / (sum(areas) - common)


def true_pairs(record):
    for subject, object_, verb in record["pairs"]:
        one, other = record["annotations"][subject], record["annotations"][object_]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"], other["bbox"])]
        yield (one["category_id"], other["category_id"], verb), boxes


def plain(records, found, instances, known=False):
    """AP and highest recall of each class; `known`: on the images with an object of its category."""
    classes = {triplet for record in records for triplet, _ in true_pairs(record)}
    values = {}
    for one in classes:
        rows, count = [], 0
        for record, predictions in sorted(zip(records, found, strict=True), key=lambda image: image[0]["id"]):
            if known and one[1] not in [note["category_id"] for note in record["annotations"]]:
                continue
            if not record["annotations"]:
                continue
            true, used = list(true_pairs(record)), set()
            count += sum(triplet == one for triplet, _ in true)
            for row in predictions:
                if (0, row[8], row[9]) != one:
                    continue
                best, chosen = 0, None
                for number, (triplet, boxes) in enumerate(true):
                    overlaps = plain_overlap(row[:4], boxes[0]), plain_overlap(row[4:8], boxes[1])
                    if triplet == one and min(overlaps) >= 0.5 and min(overlaps) > best:
                        best, chosen = min(overlaps), number
                rows.append((row[10], chosen is not None and chosen not in used))
                used.add(chosen)
        rows.sort(key=lambda row: -row[0])
        right, points = 0, []
        for number, (_, is_right) in enumerate(rows, 1):
            right += is_right
            points.append((right / count, right / number))
        best = [max([p for r, p in points if r >= least], default=0.0) for least in np.arange(0, 1.1, 0.1)]
        values[one] = sum(best) / 11, max([r for r, _ in points], default=0.0)
    return values


def plain_figures(records, found, instances):
    result = {}
    for name, known in (("", False), ("ko_", True)):
        values = plain(records, found, instances, known)
        seen = {one: instances.get(one, 0) for one in values}
        for part, chosen in (
            ("full", list(values)),
            ("rare", [one for one in values if 1 <= seen[one] <= 9]),
            ("non_rare", [one for one in values if seen[one] >= 10]),
        ):
            result[name + part] = 100 * sum(values[one][0] for one in chosen) / len(chosen) if chosen else None
        if not known:
            result["recall"] = 100 * sum(value[1] for value in values.values()) / len(values)
    return result


def random_scene(draw, number, objects=4, verbs=3):
    """Boxes on a coarse grid, so that overlaps are often equal, and an interaction is sometimes listed twice."""
    count = draw.integers(0, 5)
    sizes = draw.integers(3, 7, (count, 2)) * 4
    boxes = np.concatenate([draw.integers(0, 8, (count, 2)) * 4, sizes], axis=1)
    categories = draw.integers(0, objects, count) * (draw.random(count) < 0.6)
    annotations = [{"bbox": b, "category_id": c} for b, c in zip(boxes.tolist(), categories.tolist(), strict=True)]
    pairs = draw.integers(0, [count, count, verbs], (draw.integers(0, 7), 3)).tolist() if count else []
    record = {"id": int(number), "annotations": annotations, "pairs": pairs + pairs[:1]}
    rows = []
    for _ in range(draw.integers(0, 30) if pairs else 0):
        subject, object_, verb = pairs[draw.integers(len(pairs))]
        places = [annotations[place]["bbox"] for place in (subject, object_)]
        moved = [np.array([x, y, x + w, y + h]) + draw.integers(-2, 3, 4) for x, y, w, h in places]
        sure = draw.random() < 0.7
        category = annotations[object_]["category_id"] if sure else draw.integers(0, objects)
        rows.append([*moved[0], *moved[1], category, verb if sure else draw.integers(0, verbs), draw.random()])
    if draw.random() < 0.2:  # an image without true boxes, in which something was found all the same
        record |= {"annotations": [], "pairs": []}
    rows.sort(key=lambda row: -row[10])
    return record, np.array(rows, dtype=np.float64).reshape(-1, 11)


@pytest.mark.parametrize("seed", range(8))
def test_all_figures_are_exactly_those_of_a_plain_rewrite(seed):
    draw = np.random.default_rng(seed)
    records, found = zip(*(random_scene(draw, number) for number in draw.permutation(25)), strict=True)
    instances = {(0, o, v): int(draw.choice([0, 3, 9, 10, 40])) for o in range(4) for v in range(3)}
    result = interaction_precision(list(records), list(found), instances)
    expected = plain_figures(records, found, instances)
    assert result.keys() == {*FIGURES} == expected.keys()
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-9), key
    assert 3 < result["full"] < 90  # there is something to compare


# --------------------------------------------------------------------------------------------------------- by hand

PERSON, THING = [10, 10, 20, 20], [40, 10, 20, 20]  # left, top, width, height


def image(number=1, pairs=((0, 1, 0),), boxes=((0, PERSON), (2, THING))):
    annotations = [{"category_id": category, "bbox": list(box)} for category, box in boxes]
    return {"id": number, "annotations": annotations, "pairs": [list(pair) for pair in pairs]}


def row(score, verb=0, subject=PERSON, object_=THING, category=2):
    corners = [number for x, y, w, h in (subject, object_) for number in (x, y, x + w, y + h)]
    return [*corners, category, verb, score]


def precision(records, *found, instances=None):
    arrays = [np.array(rows, dtype=np.float64).reshape(-1, 11) for rows in found]
    return interaction_precision(records, arrays, instances or {})


def test_what_is_found_and_what_is_not():
    assert precision([image()], [row(0.9)])["full"] == pytest.approx(100)
    assert precision([image()], [])["full"] == 0
    assert precision([image()], [row(0.9, category=3)])["full"] == 0
    assert precision([image(pairs=[(0, 1, 0), (0, 1, 1)])], [row(0.9)])["full"] == pytest.approx(50)  # a class unseen


@pytest.mark.parametrize("moved, right", [(6, True), (7, False)])
def test_each_of_the_boxes_must_overlap_by_a_half(moved, right):
    """21 pixels wide, moved by 6: 15 / 27; by 7: 14 / 28 is still a half; below it, by 8."""
    assert overlap(np.array([[0, 0, 20, 20.0]]), np.array([[7, 0, 27, 20.0]])) == pytest.approx(0.5)
    aside = [PERSON[0] + moved + (not right), *PERSON[1:]]
    assert precision([image()], [row(0.9, subject=aside)])["full"] == pytest.approx(100 * right)
    aside = [THING[0] + moved + (not right), *THING[1:]]
    assert precision([image()], [row(0.9, object_=aside)])["full"] == pytest.approx(100 * right)


def test_a_box_holds_its_last_pixels_but_to_share_these_alone_is_no_overlap():
    box = np.array([[0, 0, 9, 9.0]])
    assert overlap(box, box) == 1
    assert overlap(box, np.array([[8, 0, 17, 9.0]])) == pytest.approx(20 / 180)
    assert overlap(box, np.array([[9, 0, 18, 9.0]])) == 0


def test_the_best_pair_counts_even_if_it_was_found_before():
    """Two true pairs, the second prediction lies nearer to the first pair: it is false, though the second would do."""
    near = [PERSON[0] + 4, *PERSON[1:]]
    record = image(pairs=[(0, 1, 0), (2, 1, 0)], boxes=[(0, PERSON), (2, THING), (0, near)])
    second = [PERSON[0] + 1, *PERSON[1:]]
    result = precision([record], [row(0.9), row(0.8, subject=second)])
    assert result["recall"] == 50
    third = [PERSON[0] + 3, *PERSON[1:]]
    assert precision([record], [row(0.9), row(0.8, subject=third)])["recall"] == 100


def test_an_interaction_listed_twice_is_found_once_and_counts_twice():
    assert precision([image(pairs=[(0, 1, 0)] * 2)], [row(0.9), row(0.8)])["recall"] == 50


def test_an_image_without_boxes_is_passed_over_with_what_was_found_in_it():
    records = [image(1), {"id": 2, "annotations": [], "pairs": []}]
    assert precision(records, [row(0.5)], [row(0.9)])["full"] == pytest.approx(100)
    with_box = [image(1), image(2, pairs=[])]
    assert precision(with_box, [row(0.5)], [row(0.9)])["full"] == pytest.approx(50)


def test_known_object_looks_at_images_with_such_an_object():
    records = [image(1), image(2, pairs=[], boxes=[(0, PERSON), (3, THING)])]
    result = precision(records, [row(0.5)], [row(0.9)])
    assert result["full"] == pytest.approx(50) and result["ko_full"] == pytest.approx(100)


def test_classes_are_rare_below_ten_instances_and_those_of_none_are_in_neither_mean():
    record = image(pairs=[(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 1, 3)])
    instances = {(0, 2, 0): 9, (0, 2, 1): 10, (0, 2, 2): 9}
    result = precision([record], [row(0.9, 0), row(0.8, 1), row(0.7, 3)], instances=instances)
    assert [result[key] for key in ("full", "rare", "non_rare")] == pytest.approx([75, 50, 100])


def test_a_mean_over_no_class_is_none():
    assert precision([image()], [row(0.9)])["rare"] is None


def test_the_grid_of_recalls_has_its_rounding():
    """3 of 10 found: recalls 0, .1 and .2 are reached, .30000000000000004 is not."""
    rows = [(1.0, True)] * 3
    assert precision_and_recall(rows, 10) == (pytest.approx(3 / 11), pytest.approx(0.3))
    assert precision_and_recall(rows, 4)[0] == pytest.approx(8 / 11)


def test_precision_by_hand():
    rows = [(0.9, True), (0.8, False), (0.7, True)]  # to a recall of one half precision 1, then 2 / 3
    assert precision_and_recall(rows, 2)[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_the_hundred_best_are_kept_before_classes_are_looked_at():
    """Zero scores of impossible pairs are among them, and equal ones stay in the order of queries and verbs."""
    scores = np.full((30, 4), 0.5)
    scores[:, 3] = 0.9
    scores[7, 0], scores[0, 1] = 0.7, 0.6
    possible = np.array([[1, 1], [1, 1], [1, 1], [0, 1]], dtype=bool)  # the last verb with the second object alone
    objects = np.array([0] * 25 + [1] * 5)
    boxes = np.arange(30)[:, None] * np.ones(8)
    found = strongest(scores, objects, boxes, possible)
    assert found.shape == (100, 11)
    assert found[:5, 9].tolist() == [3] * 5 and found[:5, 0].tolist() == [25, 26, 27, 28, 29]
    assert found[5].tolist() == [7] * 8 + [0, 0, 0.7] and found[6, [0, 9, 10]].tolist() == [0, 1, 0.6]
    assert found[7:10, [0, 9]].tolist() == [[0, 0], [0, 2], [1, 0]]
    assert found[-5:, 10].tolist() == [0] * 5 and found[-5:, 0].tolist() == [0, 1, 2, 3, 4]
