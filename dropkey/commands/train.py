"""Trains one run: dropkey train [group=option] [key=value]; `dropkey train --help` lists them.

Exit codes: 0 done, 2 config, 3 data, 4 diverged, 5 storage, 6 another process is training the run,
129 / 130 / 143 interrupted and saved.
"""

import contextlib
import os
import shlex
import sys
from typing import Iterator

import hydra
from omegaconf import DictConfig

from dropkey import cli, multirun, origin
from dropkey.config.check import check
from dropkey.config.compose import CONFIGS, register_schemas, typed
from dropkey.config.device import check_device
from dropkey.config.identity import run_directory
from dropkey.config.run_lookup import sibling
from dropkey.config.schema import TrainConfig
from dropkey.engine import tracking
from dropkey.errors import Diverged, Interrupted, Unread
from dropkey.invocation import invocation
from dropkey.records import RunDirectory, headline, shown_figures

register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> float:
    with cli.job(), way_on(), contextlib.redirect_stdout(Unread(sys.stdout)):
        return train(typed(cfg))


def train(cfg: TrainConfig) -> float:
    """Trains a run, or shows its result where that is done.

    Returns:
        What a sweeper optimises: the task's first metric after the last epoch on the watched split. The best epoch
        would reward luck, and the test split is not for choosing.
    """
    cfg = check(cfg)
    run = RunDirectory(run_directory(cfg))
    multirun.note_job(run.path)
    if not cfg.overwrite and run.finished:
        summary = run.summary()
        origin.require_same_start(run, cfg)
        if cli.is_first():
            print(f"done already: {run.path} (overwrite=true trains it again)")
            print_result(summary)
            if (root := origin.other_root(run, cfg)) is not None:
                print(f"data   as trained, in {root}; data.root={cfg.data.root} was not looked at")
            if "WANDB_SWEEP_ID" in os.environ:  # a sweep counts a run that reports nothing as crashed
                tracking.replay(cfg, run, print)
    elif not cfg.overwrite and run.status().get("state") == "diverged":
        raise Diverged(f"{run.path} diverged before: {run.state()[1]}; overwrite=true trains it again")
    else:
        check_device("trainer.device", cfg.trainer.device)
        if cli.is_first() and not multirun.is_job() and (other := sibling(cfg)):
            print(other)
        from dropkey import session  # imports torch and timm: seconds, so after the checks

        summary = session.train(cfg, run)
        if cli.is_first():
            print_result(summary)
            averaged = "" if cfg.regularizer.name == "none" else " eval.monte_carlo=16"
            print(f"next   {invocation('eval')} run={run.path}{averaged}    or another seed={cfg.seed + 1}")
    return summary["objective"]


@contextlib.contextmanager
def way_on() -> Iterator[None]:
    """An interruption then names the command line that goes on: as it was given, without overwrite=true."""
    try:
        yield
    except Interrupted as stopped:
        message, number = stopped.args
        raise Interrupted(f"{message}; go on with: {this_command()}", number) from None


def this_command() -> str:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    start = invocation(processes=int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    words = [word for word in sys.argv[1:] if not word.lstrip("+").lower().startswith("overwrite=")]
    return f"{start} {shlex.join(words)}".rstrip()


def print_result(summary: dict) -> None:
    print(headline(summary))
    if "raw" in summary:
        print(f"raw    {shown_figures(summary['raw'], summary['metrics'])}  (weights without the moving average)")
    print(f"run    {summary['run']}  (config.yaml, metrics.jsonl, summary.json, curves.png, checkpoints/)")


start = cli.command()(multirun.table_of_jobs()(main))
