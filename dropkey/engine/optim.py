"""Optimizer, learning rate and precision from the config."""

import contextlib
import logging
import math
from typing import Callable

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn

from dropkey.config.check import nearest
from dropkey.config.schema import OptimConfig
from dropkey.errors import ConfigError


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer of that name. Biases, norms and parameters that the model exempts get no weight decay.

    Raises:
        ConfigError: an optimizer that timm does not have, or arguments that it does not take.
    """
    if optim.name not in list_optimizers():
        raise ConfigError(f"optim.name={optim.name} is not in timm{nearest(optim.name, list_optimizers())}")
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            **optim.args,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.args={optim.args}: {optim.name} says: {error}") from None


def build_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int, per_epoch: int):
    """Cosine from optim.lr to optim.min_lr over `steps`, after a linear warm-up; a pure function of the step."""
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # it warns of cosines of a single step
    warmup = min(round(optim.warmup_epochs * per_epoch), steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup, 1),
        lr_min=optim.min_lr,
        warmup_t=warmup,
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def build_autocast(amp: str, device: torch.device) -> Callable:
    """A factory of autocast contexts for `amp` (none, bf16, fp16)."""
    if amp == "none":
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype=dtype)


def duration(epochs: int, max_steps: int | None, per_epoch: int) -> tuple[int, int]:
    """(optimizer steps, epochs begun) of a training that ends after `epochs` or after `max_steps`."""
    steps = epochs * per_epoch if max_steps is None else min(epochs * per_epoch, max_steps)
    return steps, math.ceil(steps / per_epoch)
