"""From config to objects: the model with its regularizer, its starting weights, and what training needs of them."""

import argparse
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import dropkey.models  # noqa: F401  (registers T2T-ViT with timm)
from dropkey import patching
from dropkey.config.check import family
from dropkey.config.schema import ModelConfig, RegularizerConfig, ScheduleConfig
from dropkey.engine import checkpoint
from dropkey.errors import ConfigError, StorageError
from dropkey.operator import select_impl


def build_model(model: ModelConfig, *, image_size: int, channels: int, classes: int, fused: bool = True) -> nn.Module:
    """The timm architecture of that name at this image size.

    Args:
        fused: whether plain attention is one call of `scaled_dot_product_attention`, or its parts. The parts are
            2.6 times as fast forward and backward under bf16 on a CPU (ViT 6 x 128, 65 tokens), as fast in fp32.
    Raises:
        ConfigError: the constructor refuses an argument, or published weights cannot be had.
    """
    sizes = {key: getattr(model, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    arguments = {key: value for key, value in sizes.items() if value is not None}
    if family(model.name) != "other" or fixed_input_size(model.name):
        arguments["img_size"] = image_size
    arguments |= {"drop_path_rate": model.drop_path, **model.args}
    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)  # read by each attention module as it is made
    try:
        return timm.create_model(
            model.name, pretrained=model.pretrained, num_classes=classes, in_chans=channels, **arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "; weights could not be fetched, is there a network?" if model.pretrained else ""
        raise ConfigError(f"model.name={model.name} with {arguments}: {reason[:300]}{hint}") from None
    finally:
        timm.layers.set_fused_attn(before)


def fixed_input_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config is not None and config.fixed_input_size)


def regularize(model: nn.Module, regularizer: RegularizerConfig, schedule: ScheduleConfig) -> patching.Report:
    """`patching.apply` from the config; its refusals become ConfigError."""
    try:
        report = patching.apply(
            model,
            regularizer.name,
            regularizer.ratio,
            schedule.name,
            end=schedule.end,
            window=regularizer.window,
            layers=tuple(regularizer.layers),
            impl=regularizer.impl,
        )
        if any(site.mechanism == "fused" for site in report.layers):
            example = torch.empty(1, 1, 1, 64, device=next(model.parameters()).device)
            select_impl(regularizer.impl, regularizer.name, example, example, example)  # refused now, not while training
        return report
    except ValueError as error:
        raise ConfigError(f"regularizer={regularizer.name}: {error}") from None


def try_grids(model: nn.Module, images: Tensor) -> None:
    """One forward pass with the regularizer on, because only then each layer learns how many keys it has.

    Raises:
        ConfigError: DropKey-Block or DropKey-Cross in a layer whose keys form no known grid.
    """
    mode = model.training
    try:
        with torch.no_grad(), patching.always_on(model.eval()):
            model(images)
    except ValueError as error:
        raise ConfigError(f"regularizer.window: {error}; take regularizer=dropkey for this model") from None
    finally:
        model.train(mode)


# -------------------------------------------------------------------------------------------------------- weights


def find_checkpoint(path: str | Path, weights: str = "last") -> Path:
    """A run directory's checkpoint, or the file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    file = path / "checkpoints" / f"{weights}.pt"
    if not file.exists():
        raise StorageError(f"{path} holds no checkpoints/{weights}.pt; is it a run directory that has trained?")
    return file


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in one of our checkpoints (moving average preferred), a timm or official one
    (`state_dict_ema`, `state_dict`, `model`), a bare state_dict, or a .safetensors file.

    Raises:
        StorageError: damaged, not a checkpoint, or with code inside.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # official files carry their arguments
        content = checkpoint.load(path)
    for key in ("ema", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise StorageError(f"{path} holds no weights; its keys are {list(content)[:8]}")
    return weights


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Puts the weights in `path` into `model`; returns the names that kept their initial values (a classifier for
    other classes, and nothing else).

    Position embeddings are adapted to the image size where the architecture knows how.

    Raises:
        ConfigError: the file is of another architecture.
    """
    weights = read_weights(path)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        weights = adapt(weights, model)
    own = model.state_dict()
    heads = classifier_names(model)
    fresh = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong = [name for name in fresh if not name.startswith(heads)]
    if wrong:
        raise ConfigError(
            f"{path} does not fit the model: {len(wrong)} of {len(own)} weights are missing or of another shape, "
            f"first {wrong[0]}; choose the model= and data.image_size= it was trained with"
        )
    model.load_state_dict({**own, **{name: weights[name] for name in own if name not in fresh}})
    return fresh


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    names = (names,) if isinstance(names, str) else names
    return tuple(f"{name}." for name in (*names, "aux_head"))


def parameter_count(model: nn.Module) -> int:
    """Trainable and frozen."""
    return sum(p.numel() for p in model.parameters())
