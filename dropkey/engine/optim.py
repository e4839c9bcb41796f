"""Optimizer, learning rate and precision from the config."""

import contextlib
import logging
import math
from typing import Callable

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import nn

from dropkey.config.check import nearest
from dropkey.config.schema import OptimConfig, flatten
from dropkey.errors import ConfigError

FUSED = (
    "adam",
    "adamw",
    "sgd",
    "momentum",
)  # of timm's names: torch's own kernels, which can skip a step by themselves


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer of that name. Biases, norms and parameters that the model exempts get no weight decay, unless
    optim.filter_bias_and_bn is false.

    Raises:
        ConfigError: an optimizer that timm does not have, or arguments that it does not take.
    """
    if optim.name not in list_optimizers():
        raise ConfigError(f"optim.name={optim.name} is not in timm{nearest(optim.name, list_optimizers())}")
    scales = flatten(optim.lr_scale)
    parts, grouped = parts_of(model, list(scales)), bool(scales) or not optim.filter_bias_and_bn
    device = next(model.parameters()).device
    fused = optim.name in FUSED and device.type in ("cpu", "cuda") and not {"fused", "foreach"} & set(optim.args)
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            param_group_fn=(lambda model: parameter_groups(model, optim, scales, parts)) if grouped else None,
            layer_decay=optim.layer_decay,
            **({"fused": True} if fused else {}),
            **optim.args,
        )
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"optim.args={optim.args}: {optim.name} says: {error}") from None


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step leaves everything as it is where the tensor `optimizer.found_inf` is 1, unseen by the host."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch's GradScaler asks


def parts_of(model: nn.Module, prefixes: list[str]) -> dict[nn.Parameter, str]:
    """The longest of the dotted prefixes that each parameter's name begins with; parameters without one are left out.

    Raises:
        ConfigError: a prefix that no name begins with.
    """
    found = {}
    for prefix in sorted(prefixes, key=len):
        inside = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
        if not inside:
            tops = {name.partition(".")[0] for name, _ in model.named_parameters()}
            raise ConfigError(f"optim.lr_scale.{prefix} is no part of the model{nearest(prefix, tops)}")
        found |= dict.fromkeys(inside, prefix)
    return found


def parameter_groups(model: nn.Module, optim: OptimConfig, scales: dict[str, float], parts: dict) -> list[dict]:
    """timm's groups, each split by the part of the model, with `lr_scale`, which timm's schedules multiply by."""
    exempt = {"no_weight_decay_list": getattr(model, "no_weight_decay", set)()}
    if optim.layer_decay is None:
        groups = param_groups_weight_decay(model, optim.weight_decay, **exempt)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, layer_decay=optim.layer_decay, **exempt)
    split = []
    for group in groups:
        if not optim.filter_bias_and_bn:
            group["weight_decay"] = optim.weight_decay
        for part in dict.fromkeys(parts.get(p) for p in group["params"]):
            inside = [p for p in group["params"] if parts.get(p) == part]
            split.append({**group, "params": inside, "lr_scale": group.get("lr_scale", 1.0) * scales.get(part, 1.0)})
    return split


def base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of a part with factor 1."""
    return max((g["lr"] / g["lr_scale"] if g.get("lr_scale") else g["lr"]) for g in optimizer.param_groups)


def build_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int, per_epoch: int):
    """A linear warm-up, then a cosine from optim.lr to optim.min_lr and a cool-down there, `steps` in all; or falls
    every optim.decay_epochs, counted from the beginning. A pure function of the step."""
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # it warns of cosines of a single step
    warmup = min(round(optim.warmup_epochs * per_epoch), steps - 1)
    common = {"warmup_t": warmup, "warmup_lr_init": optim.warmup_lr, "t_in_epochs": False}
    if optim.sched == "step":
        every = max(round(optim.decay_epochs * per_epoch), 1)
        return StepLRScheduler(optimizer, every, optim.decay_rate, warmup_prefix=False, **common)
    length = max(steps - warmup - round(optim.cooldown_epochs * per_epoch), 1)
    return CosineLRScheduler(optimizer, t_initial=length, lr_min=optim.min_lr, warmup_prefix=True, **common)


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
