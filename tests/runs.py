"""Small real runs for the tests: digits, a ViT of two blocks, seconds."""

import copy
import dataclasses
import functools
import os
import signal
from pathlib import Path
from typing import Callable, Optional

import torch

from dropkey import session
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.config.identity import run_directory
from dropkey.engine.trainer import Trainer
from dropkey.records import RunDirectory

SMALL = (
    "model.depth=2",
    "model.embed_dim=32",
    "model.num_heads=2",
    "data.max_train_samples=48",
    "data.test_fraction=0.05",
    "trainer.batch_size=16",
    "trainer.epochs=3",
    "trainer.log_every=1",
    "optim.warmup_epochs=1",
    "logger=none",
)  # 3 steps per epoch
ONE_EPOCH = ("trainer.epochs=1", "optim.warmup_epochs=0")
TIMES = ("seconds", "samples_per_second")


@functools.lru_cache(maxsize=None)
def composed(*overrides: str):
    return compose([*SMALL, *overrides])


def config(output: Path, *overrides: str):
    """The checked config of a small run; composing is slow, so it is done once for each set of overrides."""
    return check(dataclasses.replace(copy.deepcopy(composed(*overrides)), output=str(output)))


def train(output: Path, *overrides: str) -> RunDirectory:
    """Trains to the end, from where the run stands."""
    cfg = config(output, *overrides)
    run = RunDirectory(run_directory(cfg))
    session.train(cfg, run)
    return run


def on_step(monkeypatch, number: int, action: Callable[[Trainer], None], times: int = 1) -> None:
    """Has `action` called when optimizer step `number` (counted over the run) has begun, `times` times at most."""
    original, left = Trainer.step, [times]

    def step(self, microbatches):
        begun = original(self, microbatches)
        if self.state.position.global_step == number and left[0]:
            left[0] -= 1
            action(self)
        return begun

    monkeypatch.setattr(Trainer, "step", step)


def send(number: int = signal.SIGTERM) -> Callable:
    """An action for `on_step`: a real signal to this process."""
    return lambda loop: os.kill(os.getpid(), number)


def state(run: RunDirectory, name: str = "last.pt") -> dict:
    """A checkpoint without its clock readings."""
    return without_clocks(torch.load(run.checkpoints / name, weights_only=True))


def without_clocks(content: dict) -> dict:
    for key in ("training_seconds", *TIMES):
        content.get("position", {}).pop(key, None)
        (content.get("record") or {}).pop(key, None)
    return content


def records(run: RunDirectory) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in run.records()]


def unequal(a, b, path: str = "") -> Optional[str]:
    """The first place where two nested states differ by a bit, or None."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else path
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return path
        return next((found for key in a if (found := unequal(a[key], b[key], f"{path}.{key}"))), None)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return path
        return next(
            (found for i, (x, y) in enumerate(zip(a, b, strict=True)) if (found := unequal(x, y, f"{path}[{i}]"))), None
        )
    return None if a == b else path
