"""Exact evaluation: every sample once, whatever the batch size and the number of processes."""

import contextlib
from typing import Callable, Iterable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey.engine.distributed import DistContext, StopSignal

BINS = 15  # of the calibration error (Guo et al., 2017)


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    loader: Iterable,
    dist: DistContext,
    num_classes: int,
    stop: Optional[StopSignal] = None,
    autocast: Callable = contextlib.nullcontext,
) -> Optional[dict]:
    """Top-1 and top-5 (percent), cross-entropy, expected calibration error (percent) and count over a split.

    Args:
        predict: images B C H W -> logits B classes (or log-probabilities).
        loader: equally many batches in every process, some perhaps empty.
        stop: looked at between batches.
    Returns:
        The figures, the same in every process; None if a stop was asked for.
    """
    totals = torch.zeros(4, dtype=torch.float64)  # right, right among five, summed loss, images
    bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, right, summed confidence
    for batch in loader:
        if stop is not None and dist.any(stop.number != 0)[0]:
            return None
        if len(batch.targets) == 0:
            continue
        with autocast():
            logits = predict(batch.images)
        logits, targets = logits.float().cpu(), batch.targets.cpu()  # float64 sums, which not every device has
        among = logits.topk(min(5, num_classes), dim=-1).indices == targets[:, None]
        right, loss = among[:, 0], F.cross_entropy(logits, targets, reduction="none")
        totals += torch.tensor([right.sum(), among.any(-1).sum(), loss.double().sum(), len(targets)])
        confidence = logits.softmax(-1).amax(-1)
        which = (confidence.nan_to_num() * BINS).long().clamp_(max=BINS - 1)
        bins.index_add_(1, which, torch.stack([torch.ones_like(confidence), right.float(), confidence]).double())
    totals, bins = dist.sum(totals), dist.sum(bins)
    right, among_five, loss, count = totals.tolist()
    gap = (bins[1] - bins[2]).abs().sum().item()
    return {
        "top1": 100 * right / count,
        "top5": 100 * among_five / count,
        "loss": loss / count,
        "ece": 100 * gap / count,
        "count": int(count),
    }


def average(model: Callable[[Tensor], Tensor], passes: int, reseed: Callable[[int, int], None]) -> Callable:
    """A `predict` that averages the probabilities of `passes` stochastic passes; Monte Carlo estimation of the
    expectation that training saw (paper, figure 7). `reseed(batch, pass)` precedes each pass."""
    number = 0

    def predict(images: Tensor) -> Tensor:
        nonlocal number
        total = 0.0
        for index in range(passes):
            reseed(number, index)
            total = total + model(images).float().softmax(-1)
        number += 1
        return (total / passes).log()

    return predict
