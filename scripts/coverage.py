"""Goes through every architecture of timm and reports which attention `dropkey.apply` reaches.

    python scripts/coverage.py                                    # all of them: some minutes on one core
    python scripts/coverage.py models='swin*,vit_tiny_patch16_224'

1. Every architecture is built without memory (device meta). One of each family and set of attention classes runs
   forward there while calls of softmax and scaled_dot_product_attention are recorded: what calls them is attention,
   whatever `dropkey.apply` finds. It must be found, or stand among the exceptions with a reason; layers must be listed
   in forward order.
2. The smallest of each such family and set is built for real and computes, see `check`.
"""

import contextlib
import copy
import fnmatch
import inspect
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Iterator, List, Optional
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from dropkey import patching, regularizers
from dropkey.config.script_args import arg, parse, run_script
from dropkey.patching.find import UNSUPPORTED, find_attention_modules, look_up
from dropkey.patching.mechanisms import SOFTMAX

LAYERS = ("self", "class", "cross", "outlook", "token")
CALLS = {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
NOT_ATTENTION = {"EfficientViM": "weighs its four heads", "EfficientViMDistilled": "weighs its four heads"}
# Arguments that the second step tries, small images and two layers first, until one builds with the same attention.
ARGUMENTS = [
    (side, depth | size)
    for side in (64, 112, 128, 256, None)
    for size in ({"img_size": side}, {})
    for depth in ({"depth": 2}, {})
    if side or not size
]


# ------------------------------------------------------------------------------------------ recording a forward pass


class RecordAttention(TorchFunctionMode):
    """Records which module calls attention, in order. With `masks` it also drops keys there, as in the paper: -inf on
    dropped logits, then softmax; a query without keys gives 0."""

    def __init__(self, model: nn.Module, within: Optional[set[str]] = None, masks: Optional[Iterator[Tensor]] = None):
        super().__init__()
        self.stack, self.called, self.within, self.masks = [], [], within, masks
        self.hooks = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.Softmax):
                self.hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: self.stack.append(name)))
                self.hooks.append(module.register_forward_hook(self.leave))

    def leave(self, *_) -> None:
        self.stack.pop()

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*args)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (*SOFTMAX, F.scaled_dot_product_attention, F.multi_head_attention_forward):
            return func(*args, **kwargs)
        self.called.append(self.stack[-1])
        if self.masks is None or self.stack[-1] not in self.within:
            return func(*args, **kwargs)
        logits = args[0] if func in SOFTMAX else self.logits(*args, **kwargs)
        return self.masked_softmax(logits) if func in SOFTMAX else self.masked_softmax(logits) @ args[2]

    def logits(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return logits

    def masked_softmax(self, logits: Tensor) -> Tensor:
        drop = next(self.masks).reshape(logits.shape)
        left = (logits.softmax(-1) * ~drop).sum(-1, keepdim=True)  # windows forbid keys by -100, not -inf
        return logits.masked_fill(drop, -1e300).softmax(-1) * (left > 1e-18)


@contextlib.contextmanager
def quick_to_build():
    """On the meta device initialisation has no effect, but takes most of the time."""
    initialisers = [(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    filling = ("normal_", "uniform_", "zero_", "fill_", "erfinv_", "clamp_", "mul_", "add_")
    with contextlib.ExitStack() as stack:
        for place, name in initialisers + [(Tensor, name) for name in filling]:
            stack.enter_context(mock.patch.object(place, name, lambda tensor, *_, **__: tensor))
        yield


def image_size(model: nn.Module) -> tuple[int, ...]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    given = model.default_cfg.get("input_size") or model.default_cfg["test_input_size"]
    return given if size is None else (given[0], *((size, size) if isinstance(size, int) else size))


@lru_cache(maxsize=None)
def may_attend(cls: type) -> bool:
    """Whether any method of a class, or a function of its file that it calls, names a softmax."""
    if issubclass(cls, (nn.Softmax, nn.MultiheadAttention)):
        return True
    functions = [f for parent in cls.__mro__ if parent is not nn.Module for f in vars(parent).values()]
    seen = set()
    for function in filter(inspect.isfunction, functions):
        names = inspect.unwrap(function).__code__.co_names
        called = (vars(sys.modules[cls.__module__]).get(name) for name in names)
        seen.update(names, *(f.__code__.co_names for f in called if inspect.isfunction(f)))
    return bool(CALLS & seen)


# ------------------------------------------------------------------------------------- the first step: what attends


def forward_on_meta(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Names of the modules that call attention, in order."""
    with torch.no_grad(), torch.device("meta"), RecordAttention(model) as recorded:
        model.train()(torch.empty(shape))
    return recorded.called


@dataclass
class Verdict:
    """Of one architecture. `signature` is its family and the classes that called attention."""

    signature: tuple[str, frozenset[type]]
    size: int
    exceptions: dict[str, str]  # class, why its queries have no distribution over keys
    applicable: bool  # whether any attention is left besides these
    faults: list[str]


def judge(name: str, observed: dict) -> Verdict:
    """What attends in an architecture, and whether `dropkey.apply` finds it."""
    with quick_to_build():
        model = timm.create_model(name, device="meta")
    family = model_entrypoint(name).__module__.rsplit(".")[-1]
    candidates = family, frozenset(type(module) for module in model.modules() if may_attend(type(module)))
    layers = [found.name for found in find_attention_modules(model) if not found.unsupported_reason]
    faults = []
    if candidates not in observed:
        called = forward_on_meta(model, (2, *image_size(model)))
        observed[candidates] = frozenset(type(model.get_submodule(name)) for name in called)
        order = [name for name in dict.fromkeys(called) if name in layers]
        if order != [layer for layer in layers if layer in order]:
            faults.append("layers are not listed in forward order")
    attending = observed[candidates]
    reasons = {cls.__name__: look_up(cls, UNSUPPORTED) or NOT_ATTENTION.get(cls.__name__) for cls in attending}
    exceptions = {cls: reason for cls, reason in reasons.items() if reason}
    for called, module in model.named_modules():
        if type(module) in attending and type(module).__name__ not in exceptions and called not in layers:
            faults.append(f"{called} ({type(module).__name__}) attends and is not found")
    size = sum(parameter.numel() for parameter in model.parameters())
    return Verdict((family, attending), size, exceptions, len(exceptions) < len(reasons), faults)


# ---------------------------------------------------------------------------------- the second step: what is computed


def prepared(model: nn.Module) -> nn.Module:
    """In double precision, without dropout, and with parameters so large that every branch matters."""
    torch.manual_seed(0)
    model.double()
    for module in model.modules():
        for probability in {"p", "drop_prob", "attn_drop_p"} & vars(module).keys():
            setattr(module, probability, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def smallest(name: str, attending: frozenset[type]) -> tuple[nn.Module, Tensor]:
    """A model with all these classes of attention, in a size that computes in seconds, and images for it."""
    for side, arguments in ARGUMENTS:
        with contextlib.suppress(Exception):  # constructors refuse arguments in many ways
            with quick_to_build():
                model = timm.create_model(name, device="meta", **arguments)
            shape = (2, 3, side, side) if side else (2, *image_size(model))
            called = forward_on_meta(model, shape)
            if {type(model.get_submodule(name)) for name in called} == attending:
                return prepared(timm.create_model(name, **arguments)), torch.randn(shape, dtype=torch.float64)
    raise RuntimeError(f"{name} could not be built")


def run(model: nn.Module, images: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    out = model(images)
    return torch.cat([part.flatten() for part in tree_leaves(out) if isinstance(part, Tensor)])


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(model, images).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(model: nn.Module, images: Tensor, ratio: float = 0.3) -> Iterator[str]:
    """What is wrong with the model under DropKey; nothing if all is right."""
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    with torch.no_grad():
        evaluated = run(model.eval(), images)
        report = patching.apply(model, "dropkey", ratio, "constant", layers=LAYERS, impl="reference")
        if not torch.equal(run(model, images), evaluated):
            yield "evaluation changed"
        if list(model.state_dict()) != keys:
            yield "state_dict changed"
        names = [layer.name for layer in report.layers]
        with RecordAttention(model) as recorded:
            run(model, images)
        if [called for called in dict.fromkeys(recorded.called) if called in names] != names:
            yield "layers are not listed in forward order"
        model.train(), plain.train()
        if torch.equal(run(model, images, seed=1), run(model, images, seed=2)):
            yield "two training passes are equal"
        masks, mask = [], regularizers.seeded_mask
        # ConViT mixes two softmaxes into one distribution, on which DropKey acts: there are no logits to mask
        single = not any(type(module).__name__.endswith("GPSA") for module in plain.modules())
        with mock.patch.object(regularizers, "seeded_mask", lambda *a, **k: masks.append(mask(*a, **k)) or masks[-1]):
            trained = run(model, images)
        with RecordAttention(plain, set(names), iter(masks if single else ())):
            wanted = run(plain, images) if single else trained
        if not torch.allclose(trained, wanted, rtol=1e-6, atol=1e-9 * wanted.abs().max().item()):
            yield f"training is not DropKey (off by {(trained - wanted).abs().max() / wanted.abs().max():.1e})"
        patching.set_ratio(model, 0.0)
        if not torch.equal(run(model, images), run(plain, images)):
            yield "training with ratio 0 differs from the unpatched model"
        patching.set_ratio(model, ratio, "constant")
    ours, theirs = gradients(model, images), gradients(plain, images)
    if ours.keys() != theirs.keys() or not all(gradient.isfinite().all() for gradient in ours.values()):
        yield "gradients are missing or not finite"


# ---------------------------------------------------------------------------------------------------------- the report


@dataclass
class Args:
    models: List[str] = arg(["*"], "names of architectures, with * and ?")
    verbose: bool = arg(False, "one line for each model that is computed")


def main(words: list[str]) -> int:
    args = parse(Args, words, __doc__)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begun, observed = time.time(), {}
    names = [n for n in timm.list_models() if any(fnmatch.fnmatch(n, pattern) for pattern in args.models)]
    verdicts = {name: judge(name, observed) for name in names}
    applicable = {name: verdict for name, verdict in verdicts.items() if verdict.applicable}
    signatures = defaultdict(list)
    for name, verdict in applicable.items():
        signatures[verdict.signature].append(name)
    print(
        f"{len(names)} architectures, {len(applicable)} with softmax attention, of {len(signatures)} kinds", flush=True
    )
    for members in signatures.values():
        name, start = min(members, key=lambda name: verdicts[name].size), time.time()
        faults = [f"{fault} (seen in {name})" for fault in check(*smallest(name, verdicts[name].signature[1]))]
        if args.verbose or faults:
            print(f"{time.time() - start:5.1f} s  {name}: {'; '.join(faults) or 'ok'}", flush=True)
        for member in members:
            verdicts[member].faults += faults
    covered = [name for name, verdict in applicable.items() if not verdict.faults]
    print(f"covered / with softmax attention: {len(covered)} / {len(applicable)}")
    for name in applicable.keys() - covered:
        print(f"  {name}: {'; '.join(verdicts[name].faults)}")
    print("skipped, as their queries have no distribution over keys:")
    reasons = defaultdict(list)
    for name, verdict in verdicts.items():
        for each in verdict.exceptions.items():
            reasons[each].append(name)
    for (cls, reason), members in sorted(reasons.items()):
        print(f"  {cls}: {reason} ({len(members)}: {', '.join(members[:3])}{', ...' if len(members) > 3 else ''})")
    print(f"{time.time() - begun:.0f} s")
    return int(len(covered) < 0.95 * len(applicable))


if __name__ == "__main__":
    run_script(main)
