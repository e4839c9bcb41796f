"""How long jobs take, from those that are finished or under way here."""

import contextlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import median
from typing import Optional

from dropkey.config import identity
from dropkey.records import RunDirectory
from dropkey.reproduction.jobs import DONE, Job, own_state, records_of, share_left

STARTUP = 10.0  # seconds around the epochs (imports, reading data, the last evaluation) while none is measured
LONGEST_STARTUP = 300.0  # above, a job has waited in Slurm's queue
COST = ("task.", "model.", "data.", "augment.", "trainer.")  # the keys that decide the time of an epoch
FORWARD = 0.4  # time per sample of an evaluation / of a training step


class Forecast:
    """Trainings take as long per epoch as those with the same settings that matter for time; where there are none, as
    those of another regularizer; then as those with another number of samples or blocks, in proportion.

    Args:
        groups: trainings to learn from, those that say most first: what one group has shown, the next cannot change.
    """

    def __init__(self, *groups: Iterable[Job]):
        self.paces: dict[tuple, float] = {}
        self.summaries: dict[tuple, dict] = {}
        starts: list[float] = []
        for group in groups:
            found = defaultdict(list)
            for job in group:
                summary = RunDirectory(job.run).summary() if own_state(job)[0] == DONE else {}
                seconds, done = measured(job, summary)
                for key in keys(job) if done else ():
                    found[key].append(seconds / done / work(job))
                    if summary.get("samples_per_second"):
                        self.summaries.setdefault(key, summary)
                if summary:
                    starts += [took - seconds for took in times_of(job)]
            self.paces = {key: median(values) for key, values in found.items()} | self.paces
        self.startup = median([s for s in starts if 0 <= s <= LONGEST_STARTUP] or [STARTUP])

    def seconds(self, job: Job, share: float = 1.0) -> Optional[float]:
        """What a job takes from its start to its end, with this share of its epochs left; None if there is nothing to
        learn from."""
        known = self.summaries if job.evaluation else self.paces
        key = next((key for key in keys(job) if key in known), None)
        if key is None:
            return None
        if not job.evaluation:
            return self.startup + self.paces[key] * work(job) * share
        passes, summary = max(1, job.evaluation.eval.monte_carlo), self.summaries[key]
        return self.startup + passes * summary["samples"] * FORWARD / summary["samples_per_second"]


def measured(job: Job, summary: dict) -> tuple[float, float]:
    """(seconds, share of the training that they were)"""
    if summary:
        return summary["seconds"], 1.0
    if epochs := records_of(job):
        return epochs[-1].get("seconds") or 0.0, 1.0 - share_left(job)
    last = (records_of(job, "step") or [{}])[-1]  # in its first epoch
    return last.get("seconds") or 0.0, last.get("share_done") or 0.0


def times_of(job: Job) -> list[float]:
    """What the job took with all around its epochs, where its launcher has written it down."""
    with contextlib.suppress(OSError, ValueError):
        return [float(took) for took in job.claim.read_text(encoding="utf-8").split()]
    return []


@lru_cache(maxsize=None)
def keys(job: Job) -> tuple[tuple, ...]:
    """Jobs that share the first key take the same time per epoch; the last one is shared by the most."""
    cost = {key: value for key, value in identity.canonical(job.config).items() if key.startswith(COST)}
    del cost["trainer.epochs"]
    regularizer = job.config.regularizer
    free = dict(cost)
    for key in ("data.max_train_samples", "model.depth"):
        free[key] = free[key] is None
    return (str(cost), regularizer.name, str(regularizer.window), regularizer.impl), (str(cost),), (str(free), "free")


def work(job: Job) -> float:
    """Epochs x samples x blocks, as far as the config says how many; comparable where a key is shared."""
    config = job.config
    return config.trainer.epochs * (config.data.max_train_samples or 1) * (config.model.depth or 1)


def makespan(todo: Sequence[tuple[Job, float]], slots: int) -> float:
    """Seconds until jobs of these lengths are over: each starts in its turn in the first slot that is free, and after
    the job that it needs."""
    free, ends = [0.0] * slots, {}
    for job, seconds in todo:
        ends[job] = max(heapq.heappop(free), ends.get(job.needs, 0.0)) + seconds
        heapq.heappush(free, ends[job])
    return max(ends.values(), default=0.0)
