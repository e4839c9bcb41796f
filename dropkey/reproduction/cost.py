"""What trainings cost on GPUs, on paper: from the operations that a model needs for a sample."""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional

from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig
from dropkey.reproduction.jobs import Job

PEAKS = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "l40s": 362.0}  # TFLOPS, dense bf16; data sheets of the vendor
BACKWARD = 2  # operations of the backward pass / of the forward pass
COPIES = 10  # of the weights in a run: last and previous hold them, two moments and an average, best two


@dataclass(frozen=True)
class Cost:
    """Of all trainings of a column that need the same."""

    column: str
    gflop: float  # of the forward pass of a sample
    samples: int  # that a run is trained on, all epochs together
    hours: float  # of one GPU for a run
    runs: int
    gib: float  # on disk, for a run


def peak(gpu: str) -> float:
    """TFLOPS of a GPU, or the number itself.

    Raises:
        ConfigError: neither.
    """
    text = gpu.lower()
    known = text in PEAKS or (re.fullmatch(r"\d{1,6}(\.\d+)?", text, re.ASCII) and float(text) > 0)
    require(bool(known), f"gpu={gpu}{nearest(text, PEAKS)}; or a number of dense TFLOPS in bf16")
    return PEAKS[text] if text in PEAKS else float(text)


def costs(jobs: dict[Job, str], tflops: float, utilisation: float) -> tuple[list[Cost], int]:
    """Of trainings, each with its column; and how many are of unknown length, as the number of their samples is."""
    found: dict[tuple, list[Job]] = {}
    counted: dict[str, tuple[int, int]] = {}
    unknown = 0
    for job, column in jobs.items():
        cfg = job.config
        samples = samples_of(cfg)
        if samples is None:
            unknown += 1
            continue
        need = str((cfg.task, cfg.model, cfg.data))
        if need not in counted:
            counted[need] = of_model(cfg)
        flop, parameters = counted[need]
        found.setdefault((column, flop, samples, parameters), []).append(job)
    rate = tflops * 1e12 * utilisation * 3600
    return [
        Cost(
            column,
            flop / 1e9,
            samples,
            (1 + BACKWARD) * flop * samples / rate,
            len(some),
            COPIES * 4 * parameters / 2**30,
        )
        for (column, flop, samples, parameters), some in found.items()
    ], unknown


def samples_of(cfg: TrainConfig) -> Optional[int]:
    """Samples that a training goes through; None where only the task or the data know."""
    from dropkey import tasks

    data, trainer = cfg.data, cfg.trainer
    planned = tasks.build(cfg).planned_data()
    if planned is None:
        return None
    count = planned.train_samples
    if count is None and data.max_train_samples is None:
        return None
    count = math.floor((count or math.inf) * (1 - data.val_fraction)) if count else data.max_train_samples
    count = min(count, data.max_train_samples or count)
    steps = trainer.epochs * (count // trainer.batch_size)
    return min(steps, trainer.max_steps or steps) * trainer.batch_size


def of_model(cfg: TrainConfig) -> tuple[int, int]:
    """(operations of the forward pass of a sample, parameters). Counted without computing anything: a product of
    matrices, a convolution and attention as two operations for each multiplication with an addition."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dropkey import tasks

    task, nowhere = tasks.build(cfg), torch.device("meta")
    data = task.planned_data()
    with nowhere:
        model = task.build_model(data, pretrained=False, fused=False).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            task.predict(model, task.example(data, SimpleNamespace(device=nowhere)))
    return counter.get_total_flops(), sum(parameter.numel() for parameter in model.parameters())
