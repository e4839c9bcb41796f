"""Matching and losses of DETR: those of transformers, cases by hand, and normalisation over parts of a batch."""

from itertools import permutations

import pytest
import torch

from dropkey.detection.set_loss import CLASS, GIOU, L1, giou, match, normalisers, set_losses

LEVELS, QUERIES, CLASSES = 3, 6, 5
COUNTS = (3, 0, 1, 6, 2, 4)  # targets of each image


def batch(counts=COUNTS, queries=QUERIES):
    torch.manual_seed(0)
    logits = torch.randn(LEVELS, len(counts), queries, CLASSES + 1)
    boxes = torch.rand(LEVELS, len(counts), queries, 4) * 0.4 + 0.3
    labels = [torch.randint(CLASSES, (count,)) for count in counts]
    targets = [torch.rand(count, 4) * 0.4 + 0.3 for count in counts]
    return logits, boxes, labels, targets


def part(whole, chosen: slice):
    logits, boxes, labels, targets = whole
    return logits[:, chosen], boxes[:, chosen], labels[chosen], targets[chosen]


def divided(whole, by=None) -> dict[str, torch.Tensor]:
    by = by or normalisers([len(one) for one in whole[2]], whole[0].shape[2])
    return {key: value / by[key] for key, value in set_losses(*whole).items()}


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0), (2,)], ids=str)
def test_losses_of_all_levels_and_gradients_are_those_of_transformers(counts):
    transformers = pytest.importorskip("transformers")
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    whole = batch(counts)
    logits, boxes, labels, targets = [whole[0].requires_grad_(), whole[1].requires_grad_(), *whole[2:]]
    config = transformers.DetrConfig(num_labels=CLASSES, auxiliary_loss=True)
    named = [{"class_labels": label, "boxes": target} for label, target in zip(labels, targets, strict=True)]
    total, parts, _ = ForObjectDetectionLoss(logits[-1], named, "cpu", boxes[-1], config, logits, boxes)
    own = divided(
        (logits, boxes, labels, targets), None if sum(counts) else {"class": len(counts) * QUERIES, "l1": 1, "giou": 1}
    )
    summed = {key: sum(value for name, value in parts.items() if key in name) for key in ("ce", "bbox", "giou")}
    torch.testing.assert_close(own["class"], CLASS * summed["ce"])
    torch.testing.assert_close(own["l1"], L1 * summed["bbox"])
    torch.testing.assert_close(own["giou"], GIOU * summed["giou"])
    torch.testing.assert_close(sum(own.values()), total)
    expected = torch.autograd.grad(total, (logits, boxes))
    for one, other in zip(torch.autograd.grad(sum(own.values()), (logits, boxes)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_matching_is_the_cheapest_of_all():
    """Against every assignment, of three targets to six queries."""
    logits, boxes, labels, targets = part(batch(), slice(0, 1))
    level, image, query, target = match(logits, boxes, labels, targets)
    assert len(query) == LEVELS * 3 and not image.any()
    for number in range(LEVELS):
        cost = (
            -logits[number, 0].softmax(-1)[:, labels[0]]
            + 5 * (boxes[number, 0][:, None] - targets[0][None]).abs().sum(-1)
            - 2 * giou(boxes[number, 0], targets[0])
        )
        of_level = level == number
        found = cost[query[of_level], target[of_level]].sum()
        least = min(cost[list(order), range(3)].sum() for order in permutations(range(QUERIES), 3))
        torch.testing.assert_close(found, least)


def test_a_case_by_hand():
    """Two queries and a target: the second query is matched, as its box lies nearer."""
    logits = torch.log(torch.tensor([[[[0.2, 0.8], [0.5, 0.5]]]]))
    boxes = torch.tensor([[[[0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0.2, 0.4]]]])
    found = set_losses(logits, boxes, [torch.tensor([0])], [torch.tensor([[0.5, 0.5, 0.4, 0.4]])])
    nothing, right = -torch.tensor(0.8).log(), -torch.tensor(0.5).log()
    torch.testing.assert_close(found["class"], nothing + 10 * right)
    torch.testing.assert_close(found["l1"], torch.tensor(5 * 0.2))
    torch.testing.assert_close(found["giou"], torch.tensor(2 * (1 - 0.5)))  # half of it, within it
    assert normalisers([1], 2) == {"class": 11, "l1": 1, "giou": 1}  # as weights 1 and 0.1, times ten


def test_giou_of_boxes_apart_is_negative():
    one, other = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.7, 0.1, 0.2, 0.2]])
    torch.testing.assert_close(giou(one, other), torch.tensor([[-0.5]]))  # 0.4 of the hull of 0.8 is neither's


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_batch_give_the_loss_of_the_whole(size):
    """Microbatches and processes, divided by the normalisers of all; the number of boxes differs from part to part."""
    whole = batch()
    parts = [part(whole, slice(begin, begin + size)) for begin in range(0, len(COUNTS), size)]
    sums = {
        key: sum(normalisers([len(t) for t in p[2]], QUERIES)[key] for p in parts) for key in ("class", "l1", "giou")
    }
    assert sums == normalisers(COUNTS, QUERIES)
    expected = divided(whole)
    for key, value in expected.items():
        torch.testing.assert_close(sum(divided(p, sums)[key] for p in parts), value)
    means = sum(sum(divided(p).values()) for p in parts if p[2][0].numel()) / len(parts)
    assert not torch.isclose(means, sum(expected.values()), rtol=1e-2)  # so this test can fail


def test_more_targets_than_queries():
    """As officially: some targets stay without a query, and count in the number of boxes all the same."""
    whole = batch((4,), queries=2)
    _, _, query, target = match(*whole)
    assert len(query) == LEVELS * 2 and len(set(target[:2].tolist())) == 2
    assert normalisers([4], 2) == {"class": 20, "l1": 4, "giou": 4}
    assert all(value.isfinite() for value in set_losses(*whole).values())


def test_outputs_that_are_not_finite_give_a_loss_that_is_not_finite():
    """The loop then says so; the matching itself must not fail."""
    logits, boxes, labels, targets = batch()
    for spoiled in (logits, boxes):
        kept = spoiled[0, 0, 0].clone()
        spoiled[0, 0, 0] = torch.nan
        spoiled[0, 0, 1:] = spoiled[0, 0, 1:] if spoiled is logits else torch.nan
        assert not sum(set_losses(logits, boxes, labels, targets).values()).isfinite()
        spoiled[0, 0, 0] = kept


def test_half_precision_outputs_are_compared_in_float32():
    logits, boxes, labels, targets = batch()
    found = set_losses(logits.bfloat16(), boxes.bfloat16(), labels, targets)
    assert {value.dtype for value in found.values()} == {torch.float32}
