"""One run from checked config to summary: what `dropkey train` does once torch may be imported."""

import contextlib
import errno
import logging
import os
import shutil
import sys
from functools import partial
from typing import Iterator

import numpy as np
import torch
from torch import nn

from dropkey import origin, plotting, tasks, weights
from dropkey.build import build_regularized, microbatch_hook
from dropkey.code_version import code_of
from dropkey.config import compose, identity
from dropkey.config.schema import TrainConfig
from dropkey.engine import checkpoint, tracking
from dropkey.engine.distributed import DistContext, StopSignal, is_loss_of_a_peer
from dropkey.engine.evaluate import evaluate
from dropkey.engine.optim import build_autocast, duration
from dropkey.engine.progress import Progress
from dropkey.engine.trainer import Trainer
from dropkey.errors import ConfigError, DataError, Diverged, Interrupted, PeerLost, RunError, StorageError
from dropkey.provenance import device_name, git_commit, peak_memory_mib, versions
from dropkey.records import RunDirectory, write_json
from dropkey.tasks.base import Task


def train(cfg: TrainConfig, run: RunDirectory) -> dict:
    """Trains `cfg` in `run`, from where the run stands, and returns the summary. Leaves a status however it ends.

    Raises:
        RunError: with the exit code that fits (see dropkey.errors).
    """
    with (
        StopSignal() as stop,
        DistContext.start(cfg.trainer.device) as dist,
        one_line_errors(cfg, run),
        recorded_status(cfg, run, dist),
    ):
        # 1. Data and model, the same in every process.
        dist.barrier()  # the first process has prepared the directory
        resumes = dist.broadcast((run.checkpoints / "last.pt").exists())
        task = tasks.build(cfg)
        progress = Progress(cfg.trainer.epochs, task.metrics[0], run.log, show=dist.is_main)
        data = task.load_data()
        if resumes:
            origin.require_same_data(run, data, "Bring them back, or start over with overwrite=true")
            origin.require_same_start(run, cfg)
        model, report = build_regularized(task, data, dist, pretrained=cfg.model.pretrained and not resumes)
        if dist.any(stop.number != 0)[0]:
            raise stop.interrupted(f"interrupted before the first step of {run.path}, nothing is lost")
        train_loader = task.train_loader(data, dist)
        steps, progress.epochs = duration(cfg.trainer.epochs, cfg.trainer.max_steps, len(train_loader))
        if cfg.init_from is not None and not resumes:
            progress.info(weights.start_from(model, cfg.init_from))

        # 2. Where people see it.
        watched = progress.split = "test" if data.val is None else "val"
        introduce(cfg, run, task, data, model, report, dist, progress)
        if dist.is_main and not (resumes and (run.path / origin.FILE).exists()):
            made_of = {origin.KEY: origin.origin_of(cfg, data)}
            write_json(run.path / origin.FILE, task.model_info(data, model) | made_of)
        tracker = tracking.start(cfg, run.path, progress.info) if dist.is_main else tracking.NoOpTracker()

        # 3. Training, then the final evaluation of the last epoch's weights.
        summary = None
        try:
            trainer = Trainer(
                task=task,
                model=model,
                train_loader=train_loader,
                eval_loader=task.eval_loader(data, watched, dist),
                seed_microbatch=microbatch_hook(cfg, model, steps),
                options=cfg.trainer,
                optim=cfg.optim,
                run=run,
                dist=dist,
                stop=stop,
                tracker=tracker,
                progress=progress,
            )
            with local_errors(dist):
                state = trainer.fit()
            test = task.eval_loader(data, "test", dist)
            autocast = build_autocast(cfg.trainer.amp, dist.device)
            found = []
            for evaluated in dict.fromkeys((state.evaluated.eval(), state.model.eval())):  # moving average, then raw
                predict, scores = partial(task.predict, evaluated), task.scores()
                found.append((evaluate(predict, scores, test, dist, stop, autocast), scores))
                if found[-1][0] is None:
                    raise stop.interrupted(f"interrupted in the final evaluation, all saved in {run.path}")
            result, scores = found[0]
            summary = summarise(cfg, run, task, state.position, result, watched, model, dist)
            if state.ema is not None:  # recipes differ in which they publish
                raw = rounded(task, found[1][0])
                summary["raw"] = {metric.key: raw[metric.key] for metric in task.metrics}
            summary |= {"steps_per_epoch": len(train_loader), "data": data.fingerprint()}
            save_result(run, "summary.json", summary, scores, dist)
        finally:
            progress.close()
            train_loader.close()
            if dist.is_main:
                draw_curves(cfg, run, task, watched, progress)
                tracker.finish(summary, run.path / "curves.png")
    return summary


# ------------------------------------------------------------------------------------------------- status and errors


@contextlib.contextmanager
def recorded_status(cfg: TrainConfig, run: RunDirectory, dist: DistContext) -> Iterator[None]:
    """In the first process: the run is locked, prepared, and its status.json kept.

    Raises:
        Busy, ConfigError: another process trains the run; its config.yaml was edited.
    """
    if not dist.is_main:
        yield
        return
    new = not run.path.exists()

    def ended(state: str, reason: str) -> None:
        if run.path.is_dir():  # else somebody removed it, and it does not come back with a status alone
            run.set_status(state, reason=reason)

    with run.lock():
        prepare_directory(cfg, run)
        run.set_status("running")
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as error:
            ended("interrupted", str(error) or "Ctrl-C twice")
            raise
        except Diverged as error:
            ended("diverged", str(error))
            raise
        except (ConfigError, DataError) as error:
            ended("failed", str(error))
            if new and not (run.path / "log.txt").exists():  # nothing has been trained: nothing is left behind
                shutil.rmtree(run.path)
            raise
        except BaseException as error:
            try:
                ended("failed", f"{type(error).__name__}: {error}")
            except RunError as unwritten:  # a full disk, say: the failure itself matters more
                print(f"status.json could not be written either: {unwritten}", file=sys.stderr)
            raise
        run.set_status("done")


def prepare_directory(cfg: TrainConfig, run: RunDirectory) -> None:
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # with the same arguments, but not to start over
    if cfg.overwrite and not any(int(os.environ.get(name, 0)) for name in restarts):
        run.clear()
    if run.config.exists():
        changes = identity.differences(compose.load(run.config), cfg)
        if changes:
            raise ConfigError(
                f"{run.config} was changed ({'; '.join(changes)}); restore it, or start over with overwrite=true"
            )
    run.path.mkdir(parents=True, exist_ok=True)
    compose.save(cfg, run.config)
    checkpoint.remove_temporaries(run.checkpoints)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dropkey").setLevel(logging.INFO)  # decoding a folder takes a while, and is logged


@contextlib.contextmanager
def one_line_errors(cfg: TrainConfig, run: RunDirectory) -> Iterator[None]:
    """Failures outside this program, as one line that names the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        more = 2 * cfg.trainer.grad_accum_steps
        raise RunError(
            f"{str(error).splitlines()[0]}; trainer.grad_accum_steps={more} takes about half the memory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise StorageError(f"cannot write in {run.path}: {error}") from None
    except RuntimeError as error:
        if "find_unused_parameters=True" in str(error):  # what DistributedDataParallel advises
            raise ConfigError(
                "the model has parameters that no loss uses: trainer.find_unused_parameters=true"
            ) from None
        if not is_loss_of_a_peer(error):
            raise
        raise PeerLost("another process of this job ended, for the reason it gives; this one stops too") from None


@contextlib.contextmanager
def local_errors(dist: DistContext) -> Iterator[None]:
    """Marks errors that the other processes do not share, such as an unreadable image."""
    try:
        yield
    except (Interrupted, Diverged):  # agreed on by all processes
        raise
    except RunError as error:
        error.one_process = dist.world_size > 1
        raise


# ---------------------------------------------------------------------------------------------------- what is shown


def introduce(cfg, run, task, data, model, report, dist, progress) -> None:
    """The first lines of a run: where, what, on what, and which attention layers are regularized."""
    processes = f"{dist.world_size} processes, " if dist.world_size > 1 else ""
    patch = f", patch {cfg.model.patch_size}" if cfg.model.patch_size else ""
    progress.info(f"run    {run.path}")
    progress.info(f"model  {cfg.model.name}, {weights.parameter_count(model):,} parameters{patch}")
    progress.info(f"data   {cfg.data.name}: {task.describe_data(data)}")
    progress.info(f"device {processes}{dist.device.type}, amp {cfg.trainer.amp}")
    if cfg.schedule.over == "training" and cfg.regularizer.name != "none":
        progress.info(f"ratio  {identity.regularizer_label(cfg)}, in all layers alike")
    progress.info(str(report))


def draw_curves(cfg: TrainConfig, run: RunDirectory, task: Task, watched: str, progress: Progress) -> None:
    """A picture must neither fail a run nor hide why it failed."""
    title = f"{identity.model_label(cfg)}, {identity.regularizer_label(cfg)}, {identity.data_label(cfg)}"
    split = {"val": "validation"}.get(watched, watched)
    try:
        if run.records("epoch"):
            plotting.curves(run.records(), title, run.path / "curves.png", split, task.metrics[0])
    except Exception as error:
        progress.info(f"no curves.png: {type(error).__name__}: {error}")


def summarise(cfg, run, task: Task, position, result: dict, watched: str, model: nn.Module, dist: DistContext) -> dict:
    """summary.json: figures of the last epoch's weights on the test split, and what they were measured with.

    `objective` is what a sweep optimises: the first metric on the watched split after the last epoch."""
    first = task.metrics[0]
    return {
        **rounded(task, result),
        f"best_{first.key}": round(position.best, first.digits + 2),
        "best_epoch": position.best_epoch,
        "best_split": watched,
        "objective": position.last,
        "epochs": position.epoch,
        "steps": position.global_step,
        "seconds": round(position.seconds, 2),
        "samples_per_second": round(position.samples / max(position.training_seconds, 1e-9), 1),
        "parameters": weights.parameter_count(model),
        "peak_memory_mib": peak_memory_mib(dist),
        "run": str(run.path),
        "hash": identity.run_hash(cfg),
        "group": identity.group_hash(cfg),
        "seed": cfg.seed,
        "hardware": f"{dist.world_size} x {device_name(dist)}",
        "versions": versions(),
        "commit": git_commit(),
        "code": code_of(cfg, cuda=dist.device.type == "cuda"),
    }


def save_result(run: RunDirectory, name: str, result: dict, scores, dist: DistContext) -> None:
    correct = scores.correct(dist)
    if dist.is_main:
        run.write_result(name, result, None if correct is None else np.packbits(correct.numpy()).tobytes())


def rounded(task: Task, result: dict) -> dict:
    """Figures of an evaluation with two more digits than are shown, and what they are."""
    known = [metric for metric in task.metrics if result[metric.key] is not None]
    figures = dict.fromkeys(metric.key for metric in task.metrics)
    figures |= {metric.key: round(result[metric.key], metric.digits + 2) for metric in known}
    return {**figures, "samples": result["samples"], "metrics": [vars(metric) for metric in task.metrics]}
