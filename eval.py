"""Evaluates a run: python eval.py run=runs/<directory> [eval.split=val] [eval.monte_carlo=16] [data=...].

The result is printed and written as JSON into the run directory. Exit codes as in train.py.
"""

import os
from pathlib import Path

from dropkey.config import check, compose
from dropkey.config.schema import EvalConfig
from dropkey.errors import ConfigError


def main(cfg: EvalConfig) -> None:
    cfg = check.check_evaluation(cfg)
    directory = Path(cfg.run) if cfg.run else Path(cfg.checkpoint).resolve().parent.parent
    if not (directory / "config.yaml").exists():
        raise ConfigError(f"{directory} is no run directory: it has no config.yaml")
    trained = compose.load(directory / "config.yaml")
    if cfg.eval.monte_carlo and trained.regularizer.name == "none":
        raise ConfigError(f"eval.monte_carlo: {directory} has no regularizer that could be left on")

    from dropkey import evaluation  # imports torch and timm: seconds, so after the checks

    result, file = evaluation.evaluate_run(cfg, trained, directory)
    if int(os.environ.get("RANK", 0)) == 0:
        print(evaluation.describe(result))
        print(f"result {file}")


if __name__ == "__main__":
    compose.launch("eval", main)
