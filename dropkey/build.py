"""The regularized model of a task, from the config."""

from typing import Callable

import torch
from torch import nn

from dropkey import patching, schedules
from dropkey.config.schema import TrainConfig
from dropkey.engine.distributed import DistContext
from dropkey.errors import ConfigError
from dropkey.operator import select_impl
from dropkey.regularizers import STRUCTURED
from dropkey.seeds import derive_seed
from dropkey.tasks.base import Task


def build_regularized(task: Task, data, dist: DistContext, *, pretrained: bool = False):
    """The model, initialised from the seed alone (so the same under every regularizer), and what was patched.

    Raises:
        ConfigError: a regularizer that cannot act on this model.
    """
    cfg = task.cfg
    if dist.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(derive_seed(cfg.seed, "initialisation"))
    fused = not (dist.device.type == "cpu" and cfg.trainer.amp == "bf16")
    model = task.build_model(data, pretrained=pretrained, fused=fused)
    model.to(dist.device)  # first, because the device decides how attention is computed
    report = regularize(model, cfg)
    if cfg.regularizer.name in STRUCTURED:
        try_grids(task, model, task.example(data, dist))
    return model, report


def regularize(model: nn.Module, cfg: TrainConfig) -> patching.Report:
    """`patching.apply` from the config; its refusals become ConfigError."""
    regularizer, schedule = cfg.regularizer, cfg.schedule
    try:
        report = patching.apply(
            model,
            regularizer.name,
            regularizer.ratio,
            schedule.name if schedule.over == "depth" else "constant",
            end=schedule.end,
            window=regularizer.window,
            layers=tuple(regularizer.layers),
            modules=regularizer.modules,
            scope=regularizer.scope,
            impl=regularizer.impl,
        )
        if any(layer.mechanism == "fused" for layer in report.layers):
            example = [torch.empty(1, 1, 1, 64, device=next(model.parameters()).device)] * 3
            select_impl(regularizer.impl, regularizer.name, *example)  # refused now, not while training
        return report
    except ValueError as error:
        raise ConfigError(f"regularizer={regularizer.name}: {error}") from None


def try_grids(task: Task, model: nn.Module, batch) -> None:
    """One forward pass with the regularizer on: only then each layer learns how many keys it has.

    Raises:
        ConfigError: DropKey-Block or DropKey-Cross in a layer whose keys form no known grid.
    """
    mode = model.training
    try:
        with torch.no_grad(), patching.always_on(model.eval()):
            task.predict(model, batch)
    except ValueError as error:
        raise ConfigError(f"regularizer.window: {error}; take regularizer=dropkey for this model") from None
    finally:
        model.train(mode)


def last_ratio(cfg: TrainConfig) -> float:
    """The peak ratio at the end of training."""
    ramps = cfg.schedule.over == "training" and cfg.schedule.name == "decreasing"
    return cfg.schedule.end if ramps else cfg.regularizer.ratio


def microbatch_hook(cfg: TrainConfig, model: nn.Module, steps: int) -> Callable[[int, int], None]:
    """What a training of so many steps calls before each forward pass, with the step and the number of the
    microbatch: it seeds masks, and sets the ratio where that follows the steps."""
    ramps = cfg.schedule.over == "training" and cfg.regularizer.name != "none"
    values = schedules.ratios(cfg.schedule.name, cfg.regularizer.ratio, cfg.schedule.end, steps) if ramps else None
    latest = None

    def prepare(step: int, microbatch: int) -> None:
        nonlocal latest
        if ramps and step != latest:
            patching.set_ratio(model, values[step])
            latest = step
        seed_microbatch(cfg.seed, model, step, microbatch)

    return prepare


def seed_microbatch(seed: int, model: nn.Module, step: int, microbatch: int) -> None:
    """Masks follow from (run seed, step, microbatch, layer), whatever else draws random numbers; other dropout and
    stochastic depth from torch's generator."""
    torch.manual_seed(derive_seed(seed, "step", step, microbatch))
    patching.seed_masks(model, derive_seed(seed, "masks", step, microbatch))
