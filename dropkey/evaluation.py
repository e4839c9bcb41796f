"""A trained run on a split: what `dropkey eval` does once torch may be imported."""

import copy
from pathlib import Path
from typing import Any

from dropkey import datasets, origin, patching, tasks, weights
from dropkey.build import build_regularized, last_ratio
from dropkey.code_version import code_of
from dropkey.config import identity
from dropkey.config.schema import EvalConfig, TrainConfig
from dropkey.engine.distributed import DistContext
from dropkey.engine.evaluate import evaluate, monte_carlo
from dropkey.engine.optim import build_autocast
from dropkey.errors import ConfigError, StorageError
from dropkey.provenance import device_name, versions
from dropkey.records import RunDirectory, shown_figures
from dropkey.seeds import derive_seed
from dropkey.session import rounded, save_result
from dropkey.tasks.base import Task


def evaluate_run(cfg: EvalConfig, trained: TrainConfig, directory: Path) -> tuple[dict, Path]:
    """The metrics of a trained run on a split, and the JSON file in its directory that now has them; `trained` is the
    run's own config.

    Raises:
        ConfigError, DataError, StorageError: see dropkey.errors.
    """
    options = cfg.eval
    with DistContext.start(options.device, "eval.device") as dist:
        run, (settings, task, data) = RunDirectory(directory), opened(cfg, trained, directory)
        model, _ = build_regularized(task, data, dist)
        file = Path(cfg.checkpoint) if cfg.checkpoint else weights.find_checkpoint(directory, options.weights)
        if weights.load_weights(model, file):
            raise ConfigError(
                f"{file} knows other classes than data={settings.data.name} ({task.describe_data(data)}); evaluation "
                "needs the classes of training (init_from=... fine-tunes to others)"
            )
        model.eval()
        loader = task.eval_loader(data, options.split, dist, options.batch_size)
        autocast = build_autocast(trained.trainer.amp, dist.device)

        def predict(batch):
            return task.predict(model, batch)

        scores = task.scores()
        if options.monte_carlo == 0:
            result = evaluate(predict, scores, loader, dist, autocast=autocast)
        else:
            if trained.regularizer.name == "none" or last_ratio(trained) == 0:
                raise ConfigError(f"eval.monte_carlo={options.monte_carlo}: this run has no regularizer to keep on")
            patching.set_ratio(model, last_ratio(trained))

            def reseed(batch: int, index: int) -> None:
                patching.seed_masks(model, derive_seed(trained.seed, "monte carlo", batch, index, dist.rank))

            averaged = monte_carlo(predict, task.average, options.monte_carlo, reseed)
            with patching.always_on(model):
                result = evaluate(averaged, scores, loader, dist, autocast=autocast)
        fingerprint = data.fingerprint()
        result = rounded(task, result) | {
            "split": options.split,
            "data": settings.data.name,
            "root": settings.data.root,
            "data_fingerprint": fingerprint,
            "monte_carlo": options.monte_carlo,
            "settings": identity.evaluation_settings(cfg),
            "checkpoint": str(file),
            "run": str(directory),
            "hardware": f"{dist.world_size} x {device_name(dist)}",
            "versions": versions(),
            "code": code_of(settings, cuda=dist.device.type == "cuda"),
        }
        path = result_file(cfg, run, fingerprint)
        try:
            save_result(run, path.name, result, scores, dist)
        except StorageError as error:
            print(describe_result(result))
            raise StorageError(f"the result above is not stored: {error}") from error
        return result, path


def result_file(cfg: EvalConfig, run: RunDirectory, fingerprint: str) -> Path:
    path = run.path / identity.evaluation_name(cfg)
    if cfg.data is not None and run.read_json(path.name).get("data_fingerprint", fingerprint) != fingerprint:
        return path.with_name(f"{path.stem}-{fingerprint}.json")  # another data set of the same name
    return path


def opened(cfg: EvalConfig, trained: TrainConfig, directory: Path) -> tuple[TrainConfig, Task, Any]:
    """The config, task and data of an evaluation; refused where the run's config or data have changed."""
    settings = copy.deepcopy(trained)
    settings.regularizer.impl = "auto"  # the implementation used in training may not exist here
    if cfg.root is not None:
        settings.data.root = cfg.root
    if cfg.data is not None:
        settings.data = datasets.preprocessed_as(cfg.data, trained.data, cfg.eval.split)
    task = tasks.build(settings)
    data = task.load_data()
    origin.require_same_config(RunDirectory(directory), trained)
    if cfg.data is None:
        origin.require_same_data(RunDirectory(directory), data, "data=<set> measures the run on other data")
    return settings, task, data


def describe_result(result: dict) -> str:
    passes = f", mean of {result['monte_carlo']} passes" if result["monte_carlo"] else ""
    figures = shown_figures(result, result["metrics"])
    return f"{result['split']:<6} {figures}  ({result['samples']:,} samples of {result['data']}{passes})"
