"""Which attention layers of a model are regularized, how, and which are not."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Iterator, Optional

import torch
from torch import nn

from dropkey.operator import select_impl
from dropkey.patching.find import AttentionModule, find_attention_modules
from dropkey.patching.layer import AttentionRegularizer, Request


@dataclass
class RegularizedLayer:
    """One regularized attention layer, as reported."""

    name: str
    kind: str  # self, class, cross, outlook, token, layer
    ratio: float
    mechanism: str  # fused, weights or softmax
    module: AttentionRegularizer = field(repr=False, compare=False)

    def __str__(self) -> str:
        has_window = self.module.window is not None and self.ratio > 0
        window = f"  window {self.module.shown_window()}" if has_window else ""
        return f"{shown(self.name):<36} {self.kind:<8} {self.mechanism:<8} ratio {self.ratio:.4f}{window}"


@dataclass
class Report:
    """What `apply` did. As text it shows a window relative to the grid in cells after the first forward pass, when each
    layer knows its grid."""

    regularizer: str
    schedule: str = "none"
    impl: str = "none"  # of the operator, at fused layers
    scope: str = "model"  # or stack: over what the schedule runs
    layers: list[RegularizedLayer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __str__(self) -> str:
        if self.regularizer == "none":
            return "no regularizer: attention is unchanged"
        impl = f", impl {self.impl}" if any(layer.mechanism == "fused" for layer in self.layers) else ""
        schedule = f"{self.schedule} in each stack" if self.scope == "stack" else self.schedule
        layers = f"{len(self.layers)} attention layer" + "s" * (len(self.layers) != 1)
        lines = [f"{self.regularizer} ({schedule}) at {layers}{impl}"]
        lines += [f"  {layer}" for layer in self.layers]
        return "\n".join(lines + [f"  {shown(name):<36} skipped: {reason}" for name, reason in self.skipped])


def report(model: nn.Module) -> Report:
    """The regularized layers of a model with their present ratios, and every module that looks like attention or runs
    a softmax and is not regularized, with the reason. A model that `apply` has not patched has regularizer "none"."""
    layers = list(regularized_layers(model))
    if not layers:
        return Report("none")
    names, first = {module: name for name, module in model.named_modules()}, layers[0][1]
    request, impl = first.request, impl_for(model, first.impl, first.regularizer)
    done = Report(first.regularizer, request.schedule, impl, request.scope)
    for module, layer in layers:
        done.layers.append(RegularizedLayer(names[module], layer.kind, layer.ratio, layer.mechanism, layer))
    regularized = {module for module, _ in layers}
    for found in find_attention_modules(model):
        if found.module not in regularized:
            done.skipped.append((found.name, why_skipped(found, request)))
    return done


def shown(name: str) -> str:
    return name or "(the model)"


def why_skipped(found: AttentionModule, request: Request) -> Optional[str]:
    """None for a module that is to be regularized."""
    if found.unsupported_reason:
        return found.unsupported_reason
    if found.kind not in request.layers:
        return f"{found.kind} attention is not among layers={list(request.layers)}"
    if request.modules and not any(is_within(found.name, part) for part in request.modules):
        return f"it is not within modules={list(request.modules)}"
    return None


def is_within(name: str, part: str) -> bool:
    """Whether the dotted name of a module holds that of a part, or some of the words in it, one after another."""
    return fnmatchcase(f".{name}.", f"*.{part}.*")


def impl_for(model: nn.Module, impl: str, regularizer: str) -> str:
    """What `impl` will be on the model's present device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = torch.empty(1, 1, 1, 64, device=device)
    return select_impl(impl, regularizer, *[example] * 3) if impl == "auto" else select_impl(impl, regularizer)


def regularized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, AttentionRegularizer]]:
    """(attention module, its regularizer), in order of definition, which is forward order in every architecture of timm
    (`scripts/coverage.py` checks it)."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, AttentionRegularizer):
                yield module, child
