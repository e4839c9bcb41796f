"""Exact evaluation: every sample once, whatever the batch size and the number of processes."""

import contextlib
from typing import Any, Callable, Iterable, Optional

import torch

from dropkey.engine.distributed import DistContext, StopSignal


@torch.inference_mode()
def evaluate(
    predict: Callable[[Any], Any],
    scores: Any,
    loader: Iterable,
    dist: DistContext,
    stop: Optional[StopSignal] = None,
    autocast: Callable = contextlib.nullcontext,
) -> Optional[dict[str, float]]:
    """The task's figures over a split, the same in every process; None if a stop was asked for.

    Args:
        predict: batch -> outputs.
        scores: the task's `Scores`, empty.
        loader: equally many batches in every process, some perhaps empty.
        stop: looked at between batches.
    """
    for batch in loader:
        if stop is not None and dist.any(stop.number != 0)[0]:
            return None
        if len(batch) == 0:
            continue
        with autocast():
            outputs = predict(batch)
        scores.update(outputs, batch)
    return scores.compute(dist)


def monte_carlo(predict: Callable, average: Callable, passes: int, reseed: Callable[[int, int], None]) -> Callable:
    """A `predict` that averages `passes` stochastic passes over each batch: an estimate of the expectation that
    training saw (paper, figure 7). `reseed(batch, pass)` precedes each pass."""
    number = 0

    def averaged(batch: Any) -> Any:
        nonlocal number
        outputs = []
        for index in range(passes):
            reseed(number, index)
            outputs.append(predict(batch))
        number += 1
        return average(outputs)

    return averaged
