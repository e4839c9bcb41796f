"""Weights from checkpoints: our own, timm's, official ones, safetensors."""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dropkey import origin
from dropkey.engine import checkpoint
from dropkey.errors import ConfigError, StorageError


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
    if not isinstance(content, dict):
        raise StorageError(f"{path} holds no weights but a {type(content).__name__}; choose a checkpoint of a model")
    for key in ("ema", "state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise StorageError(f"{path} holds no weights; its keys are {list(content)[:8]}")
    return weights


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Puts the weights in `path` into `model`; returns the keys that kept their initial values (a classifier for
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
    superfluous = [name for name in weights if name not in own and not name.startswith(heads)]
    if superfluous:
        raise ConfigError(
            f"{path} does not fit the model: it has {len(superfluous)} weights that the model lacks, first "
            f"{superfluous[0]}; choose the model it was trained with"
        )
    missing_keys = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong = [name for name in missing_keys if not name.startswith(heads)]
    if wrong:
        raise ConfigError(
            f"{path} does not fit the model: {len(wrong)} of {len(own)} weights are missing or of another shape, "
            f"first {wrong[0]}; choose the model and image size it was trained with"
        )
    model.load_state_dict({**own, **{name: weights[name] for name in own if name not in missing_keys}})
    return missing_keys


def start_from(model: nn.Module, source: str) -> str:
    """Starts `model` from a run or a file; returns a line that says what was loaded."""
    file = find_checkpoint(source)
    missing_keys = load_weights(model, file)
    progress = origin.progress_of(source)
    if progress:
        file = f"{file}, of a run that is {progress}"
    return f"weights from {file}" + (f"; new: {', '.join(missing_keys)}" if missing_keys else "")


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    names = (names,) if isinstance(names, str) else names
    return tuple(f"{name}." for name in (*names, "aux_head"))


def parameter_count(model: nn.Module) -> int:
    """Trainable and frozen."""
    return sum(p.numel() for p in model.parameters())
