"""A trained run on a split: what eval.py does once torch may be imported."""

import copy
import dataclasses
from pathlib import Path

import torch

from dropkey import build, data, patching, session
from dropkey.config import identity
from dropkey.config.schema import DataConfig, EvalConfig, TrainConfig
from dropkey.engine.distributed import DistContext
from dropkey.engine.evaluate import average, evaluate
from dropkey.engine.optim import build_autocast
from dropkey.errors import ConfigError
from dropkey.provenance import code_version, device_name, versions
from dropkey.records import write_json
from dropkey.seeds import derive_seed


def evaluate_run(cfg: EvalConfig, trained: TrainConfig, directory: Path) -> tuple[dict, Path]:
    """Figures of a trained run on a split, and the JSON file in the run directory that now holds them.

    Args:
        cfg: what to evaluate and how.
        trained: the run's own config.
    Raises:
        ConfigError, DataError, StorageError: see dropkey.errors.
    """
    options = cfg.eval
    dist = DistContext.start(options.device)
    try:
        settings = copy.deepcopy(trained)
        settings.regularizer.impl = "auto"  # what computed attention there may not exist here
        if cfg.root is not None:
            settings.data.root = cfg.root
        if cfg.data is not None:
            settings.data = match_data(cfg.data, trained, options.split)
        dataset = data.load(settings.data)
        model, _ = session.prepare_model(settings, dataset, dist)
        file = Path(cfg.checkpoint) if cfg.checkpoint else build.find_checkpoint(directory, options.weights)
        fresh = build.load_weights(model, file)
        if fresh:
            raise ConfigError(
                f"{file} knows other classes than the {dataset.num_classes} of data={settings.data.name}; "
                "evaluation needs the classes of training (init_from=... fine-tunes to others)"
            )
        model.eval()
        loader = session.loader_of(dataset, options.split, settings, dist, options.batch_size)
        autocast = build_autocast(trained.trainer.amp, dist.device)
        result = evaluate_with(model, options.monte_carlo, trained, loader, dist, dataset.num_classes, autocast)
        result |= {
            "split": options.split,
            "data": settings.data.name,
            "root": settings.data.root,
            "monte_carlo": options.monte_carlo,
            "settings": identity.evaluation_settings(cfg),
            "checkpoint": str(file),
            "run": str(directory),
            "hardware": f"{dist.world_size} x {device_name(dist)}",
            "versions": versions(),
            "code": code_version(),
        }
        name = identity.evaluation_name(cfg)
        if dist.is_main:
            write_json(directory / name, result)
        return result, directory / name
    finally:
        dist.close()


def evaluate_with(model, passes: int, trained: TrainConfig, loader, dist: DistContext, classes: int, autocast) -> dict:
    """One plain pass, or the average of `passes` with the regularizer on."""
    if passes == 0:
        return evaluate(model, loader, dist, classes, autocast=autocast)
    if trained.regularizer.name == "none" or trained.regularizer.ratio == 0:
        raise ConfigError(f"eval.monte_carlo={passes}: this run has no regularizer that could be left on")

    def reseed(batch: int, index: int) -> None:
        torch.manual_seed(derive_seed(trained.seed, "monte carlo", batch, index, dist.rank))

    with patching.always_on(model):
        return evaluate(average(model, passes, reseed), loader, dist, classes, autocast=autocast)


def match_data(other: DataConfig, trained: TrainConfig, split: str) -> DataConfig:
    """Another data set, seen through the eyes of the run: its image size, channels and normalisation. Nothing is
    held out of its training images unless that is what will be looked at."""
    own = trained.data
    held_out = other.val_fraction if split == "val" else 0.0
    eyes = {key: getattr(own, key) for key in ("image_size", "channels", "mean", "std")}
    return dataclasses.replace(other, **eyes, val_fraction=held_out)


def describe(result: dict) -> str:
    passes = f", mean of {result['monte_carlo']} passes" if result["monte_carlo"] else ""
    return (
        f"{result['split']:<6} top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}, "
        f"calibration error {result['ece']:.2f} %  ({result['count']:,} images of {result['data']}{passes})"
    )
