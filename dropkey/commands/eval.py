"""Evaluates a run: dropkey eval run=<run> [eval.split=val] [eval.monte_carlo=16] [data=...].

The result is printed and written as JSON into the run directory. Exit codes as in train.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from dropkey import cli
from dropkey.config.check import check_evaluation, require
from dropkey.config.compose import CONFIGS, load, register_schemas, typed
from dropkey.config.device import check_device
from dropkey.config.run_lookup import find_run
from dropkey.config.schema import EvalConfig
from dropkey.errors import ConfigError

register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
def main(cfg: DictConfig) -> None:
    with cli.job():
        evaluate(typed(cfg))


def evaluate(cfg: EvalConfig) -> None:
    if cfg.run is not None and cfg.checkpoint is None:
        cfg.run = str(find_run(cfg.run))
    cfg = check_evaluation(cfg)
    directory = Path(cfg.run) if cfg.run else Path(cfg.checkpoint).resolve().parent.parent
    where = f"run={cfg.run}" if cfg.run else f"checkpoint={cfg.checkpoint}"
    require((directory / "config.yaml").is_file(), f"{where}: {directory} is no run, it has no config.yaml")
    trained = load(directory / "config.yaml")
    if cfg.eval.monte_carlo and trained.regularizer.name == "none":
        raise ConfigError(f"eval.monte_carlo: {directory} has no regularizer that could be left on")
    check_device("eval.device", cfg.eval.device)

    from dropkey import evaluation  # imports torch and timm: seconds, so after the checks

    result, file = evaluation.evaluate_run(cfg, trained, directory)
    if cli.is_first():
        print(evaluation.describe_result(result))
        print(f"result {file}")


start = cli.command(EvalConfig)(main)
