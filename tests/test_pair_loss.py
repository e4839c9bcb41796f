"""Matching and losses of QPIC: against plain loops, cases by hand, and normalisation over parts of a batch."""

import math
from itertools import permutations

import pytest
import torch

from dropkey.detection.pair_loss import Pairs, focal_loss, match, normalisers, pair_losses, targets, together
from dropkey.detection.scenes import SceneBatch

LEVELS, QUERIES, OBJECTS, VERBS = 2, 5, 4, 6
COUNTS = (3, 0, 1, 4)  # pairs of each image


def batch(counts=COUNTS, queries=QUERIES):
    """Outputs of a model, and targets."""
    torch.manual_seed(0)
    size = (LEVELS, len(counts), queries)
    logits = torch.randn(*size, OBJECTS + 1), torch.randn(*size, VERBS) * 2
    boxes = [torch.rand(*size, 4) * 0.4 + 0.3 for _ in range(2)]
    pairs = [
        Pairs(
            torch.randint(OBJECTS, (count,)),
            (torch.rand(count, VERBS) < 0.4).float(),
            *(torch.rand(count, 4) * 0.4 + 0.3 for _ in range(2)),
        )
        for count in counts
    ]
    return [*logits, *boxes], pairs


# ---------------------------------------------------------------------------------------- the same in plain loops


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def plain_giou(one, other):
    one, other = corners(one), corners(other)
    common = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    hull = area([min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])])
    union = area(one) + area(other) - common
    return common / union - (hull - union) / hull


def distance(one, other):
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def softmax(logits):
    parts = [math.exp(value) for value in logits]
    return [part / sum(parts) for part in parts]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def plain_cost(query, target):
    """Of a query's four outputs and a target, all lists of floats."""
    (objects, verbs, subject, object_), (label, wanted, true_subject, true_object) = query, target
    p = [sigmoid(value) for value in verbs]
    positive = sum(a * t for a, t in zip(p, wanted, strict=True)) / (sum(wanted) + 1e-4)
    negative = sum((1 - a) * (1 - t) for a, t in zip(p, wanted, strict=True)) / (len(wanted) - sum(wanted) + 1e-4)
    return (
        -softmax(objects)[label]
        - (positive + negative) / 2
        + 2.5 * max(distance(subject, true_subject), distance(object_, true_object))
        + max(-plain_giou(subject, true_subject), -plain_giou(object_, true_object))
    )


def plain_losses(outputs, pairs):
    """The official loss of one process, each level's parts already divided, by trying all assignments."""
    found = {"object": 0.0, "verb": 0.0, "subject_box": 0.0, "object_box": 0.0}
    count = sum(len(one) for one in pairs)
    for level in range(LEVELS):
        weights = ce = focal = positives = 0.0
        for image, one in enumerate(pairs):
            queries = [[each[level, image, q].tolist() for each in outputs] for q in range(outputs[0].shape[2])]
            true = [[each[n].tolist() for each in vars(one).values()] for n in range(len(one))]
            chosen = min(
                permutations(range(len(queries)), len(true)),
                key=lambda order: sum(plain_cost(queries[q], t) for q, t in zip(order, true, strict=True)),
            )
            for q, (objects, verbs, subject, object_) in enumerate(queries):
                target = true[chosen.index(q)] if q in chosen else (OBJECTS, [0.0] * VERBS, None, None)
                weight = 1.0 if q in chosen else 0.1
                weights, ce = weights + weight, ce - weight * math.log(softmax(objects)[target[0]])
                for value, wanted in zip(verbs, target[1], strict=True):
                    p = sigmoid(value)
                    focal -= (1 - p) ** 2 * math.log(p) if wanted else p**2 * math.log(1 - p)
                    positives += wanted
                for key, box, own in (("subject_box", subject, target[2]), ("object_box", object_, target[3])):
                    if own:
                        found[key] += (2.5 * distance(box, own) + 1 - plain_giou(box, own)) / count
        found["object"] += ce / weights
        found["verb"] += focal / max(positives, 1)
    return found


def divided(outputs, pairs, by=None):
    by = by or normalisers(pairs, outputs[0].shape[2])
    return {key: value / max(by[key], 1) for key, value in pair_losses(*outputs, pairs).items()}


@pytest.mark.parametrize("counts", [COUNTS, (2,), (0, 0)], ids=str)
def test_losses_are_those_of_plain_loops(counts):
    outputs, pairs = batch(counts)
    found, expected = divided(outputs, pairs), plain_losses(outputs, pairs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, rel=1e-4), key


def test_the_matching_is_the_cheapest_of_all():
    outputs, pairs = batch((3,))
    level, _image, query, target = match(*outputs, pairs)
    true = [[each[n].tolist() for each in vars(pairs[0]).values()] for n in range(3)]
    for number in range(LEVELS):
        queries = [[each[number, 0, q].tolist() for each in outputs] for q in range(QUERIES)]

        def cost(order, queries=queries):
            return sum(plain_cost(queries[q], t) for q, t in zip(order, true, strict=True))

        of_level = level == number
        chosen = dict(zip(target[of_level].tolist(), query[of_level].tolist(), strict=True))
        least = min(cost(order) for order in permutations(range(QUERIES), 3))
        assert cost([chosen[n] for n in range(3)]) == pytest.approx(least, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- by hand


def test_the_worse_of_the_two_boxes_decides_the_matching():
    """The first query has one box exactly and the other far off, the second both a little off."""
    true = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    pairs = [Pairs(torch.tensor([0]), torch.ones(1, VERBS), true, true)]
    subjects = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.55, 0.5, 0.2, 0.2]])[None, None]
    objects = torch.tensor([[0.6, 0.5, 0.2, 0.2], [0.55, 0.5, 0.2, 0.2]])[None, None]
    same = torch.zeros(1, 1, 2, OBJECTS + 1), torch.zeros(1, 1, 2, VERBS)
    assert match(*same, subjects, objects, pairs)[2].tolist() == [1]


def test_a_case_of_the_focal_loss_by_hand():
    logits = torch.tensor([0.75, 0.25, 0.5]).logit()
    expected = -(0.25**2 * math.log(0.75) + 0.25**2 * math.log(0.75) + 0.5**2 * math.log(0.5))
    assert focal_loss(logits, torch.tensor([1.0, 0, 1])).item() == pytest.approx(expected)


def scene(pairs, labels=(0, 3, 2)) -> SceneBatch:
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.6, 0.6, 0.1, 0.1]])
    parts = [torch.tensor(labels)], [boxes], [torch.tensor(pairs, dtype=torch.int64).view(-1, 3)]
    return SceneBatch(torch.zeros(1, 1, 4, 4), None, *parts, [{}], torch.zeros(1))


def test_verbs_of_one_pair_are_merged():
    """Listed in any order, and twice; the pair the other way round is another one."""
    (found,) = targets(scene([[0, 1, 2], [0, 2, 4], [0, 1, 0], [0, 1, 2], [1, 0, 5]]), VERBS)
    rows = sorted(zip(found.objects.tolist(), found.verbs.tolist(), strict=True), key=str)
    assert rows == [(0, [0, 0, 0, 0, 0, 1]), (2, [0, 0, 0, 0, 1, 0]), (3, [1, 0, 1, 0, 0, 0])]
    for label, subject, object_ in zip(found.objects, found.subject_boxes, found.object_boxes, strict=True):
        assert subject[0].item() == pytest.approx(0.4 if label == 0 else 0.2)
        assert object_[0].item() == pytest.approx({0: 0.2, 2: 0.6, 3: 0.4}[label.item()])


def test_an_image_without_pairs_has_no_targets():
    (found,) = targets(scene([]), VERBS)
    assert len(found) == 0 and found.verbs.shape == (0, VERBS)


def test_normalisers_by_hand():
    pairs = [
        Pairs(torch.zeros(n, dtype=torch.int64), torch.ones(n, 2), torch.zeros(n, 4), torch.zeros(n, 4))
        for n in (1, 0, 3)
    ]
    # 3 matched queries with weight 10 and 3 others with weight 1; 2 queries for the last image's 3 pairs
    assert normalisers(pairs, 2) == {"object": 33, "verb": 8, "subject_box": 4, "object_box": 3}


# ---------------------------------------------------------------------------------------------- what always holds


def perfect(pairs):
    """Outputs that say the targets, as sure as float32 can be."""
    size = (LEVELS, len(pairs), QUERIES)
    objects, verbs = torch.full((*size, OBJECTS + 1), -40.0), torch.full((*size, VERBS), -40.0)
    objects[..., -1] = 40
    boxes = [torch.full((*size, 4), 0.5) for _ in range(2)]
    for image, one in enumerate(pairs):
        for n in range(len(one)):
            objects[:, image, n] = torch.where(torch.arange(OBJECTS + 1) == one.objects[n], 40.0, -40.0)
            verbs[:, image, n] = one.verbs[n] * 80 - 40
            boxes[0][:, image, n], boxes[1][:, image, n] = one.subject_boxes[n], one.object_boxes[n]
    return [objects, verbs, *boxes]


def test_a_perfect_prediction_has_no_loss_and_every_change_has_some():
    _, pairs = batch()
    outputs = perfect(pairs)
    assert sum(pair_losses(*outputs, pairs).values()).item() == pytest.approx(0, abs=1e-4)
    for place, change in ((0, -outputs[0]), (1, -outputs[1]), (2, outputs[2] + 0.05), (3, outputs[3] * 0.9)):
        changed = [*outputs[:place], change, *outputs[place + 1 :]]
        assert sum(pair_losses(*changed, pairs).values()) > 0.1


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_gradients_are_finite_where_probabilities_are_0_or_1(scale):
    (objects, verbs, *boxes), pairs = batch()
    outputs = [each.requires_grad_() for each in (objects * scale, verbs * scale, *boxes)]
    loss = sum(pair_losses(*outputs, pairs).values())
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, outputs))
    p = (verbs.detach() * scale).sigmoid()
    assert not (p * p.log()).isfinite().all()  # which the usual form would give


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_batch_give_the_loss_of_the_whole(size):
    """Microbatches and processes, divided by the normalisers of all; the number of pairs differs from part to part."""
    outputs, pairs = batch()
    cuts = [slice(begin, begin + size) for begin in range(0, len(COUNTS), size)]
    by = [normalisers(pairs[cut], QUERIES) for cut in cuts]
    by = {key: sum(one[key] for one in by) for key in by[0]}
    assert by == normalisers(pairs, QUERIES)
    parts = [divided([each[:, cut] for each in outputs], pairs[cut], by) for cut in cuts]
    for key, value in divided(outputs, pairs).items():
        torch.testing.assert_close(sum(part[key] for part in parts), value)


def test_more_pairs_than_queries_and_outputs_that_are_not_finite():
    outputs, pairs = batch((4,), queries=2)
    assert len(match(*outputs, pairs)[0]) == LEVELS * 2
    for place in range(4):
        spoiled = [each.clone() for each in outputs]
        spoiled[place][:] = torch.nan
        assert not sum(pair_losses(*spoiled, pairs).values()).isfinite()


def test_targets_of_a_batch_are_those_of_its_images_in_order():
    _, pairs = batch()
    whole = together(pairs)
    assert len(whole) == sum(COUNTS)
    torch.testing.assert_close(whole.subject_boxes[3:4], pairs[2].subject_boxes)
