"""Trains one run: python train.py [group=option] [key=value]; `python train.py --help` lists them.

Exit codes: 0 done, 2 config, 3 data, 4 diverged, 5 storage, 6 the run is being trained already,
130 / 143 interrupted and saved.
"""

import os
import shlex
import sys

from dropkey.config.check import check
from dropkey.config.compose import launch
from dropkey.config.identity import run_directory
from dropkey.config.schema import TrainConfig
from dropkey.engine import tracking
from dropkey.errors import Diverged, Interrupted
from dropkey.records import RunDirectory, headline


def main(cfg: TrainConfig) -> None:
    cfg = check(cfg)
    run = RunDirectory(run_directory(cfg))
    first = int(os.environ.get("RANK", 0)) == 0
    if run.finished and not cfg.overwrite:
        if first:
            print(f"done already: {run.path} (overwrite=true trains it again)")
            say_result(run.summary())
            if "WANDB_SWEEP_ID" in os.environ:  # a sweep counts a run that it hears nothing of as crashed
                tracking.replay(cfg, run, print)
        return
    if run.status().get("state") == "diverged" and not cfg.overwrite:
        raise Diverged(
            f"{run.path} diverged before and would again: {run.status()['reason']}; overwrite=true tries anew"
        )

    from dropkey import session  # imports torch and timm: seconds, so after the checks

    try:
        summary = session.train(cfg, run)
    except Interrupted as stopped:
        raise stopped.saying(f"; go on with: {this_command()}") from None
    if first:
        say_result(summary)
        print(f"next   python eval.py run={run.path}{monte_carlo(cfg)}    or another seed={cfg.seed + 1}")


def this_command() -> str:
    """The command line that continues this run: as it was given, but not starting over."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    start = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', processes)}"]
    words = [word for word in sys.argv if not word.lstrip("+").lower().startswith("overwrite=")]
    return shlex.join([*(start if processes > 1 else ["python"]), *words])


def monte_carlo(cfg: TrainConfig) -> str:
    return "" if cfg.regularizer.name == "none" else " eval.monte_carlo=16"


def say_result(summary: dict) -> None:
    print(headline(summary))
    print(f"run    {summary['run']}  (config.yaml, metrics.jsonl, summary.json, curves.png, checkpoints/)")


if __name__ == "__main__":
    launch("train", main)
