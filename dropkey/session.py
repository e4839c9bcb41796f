"""One run from checked config to summary; what train.py does once torch may be imported."""

import contextlib
import dataclasses
import errno
import logging
import os
import sys
from typing import Optional

import torch

from dropkey import build, data, plotting
from dropkey.config import compose, identity
from dropkey.config.schema import TrainConfig
from dropkey.engine import checkpoint, tracking
from dropkey.engine.distributed import DistContext, StopSignal, is_loss_of_a_peer
from dropkey.engine.evaluate import evaluate
from dropkey.engine.loop import Setup, fit
from dropkey.engine.optim import build_autocast, duration
from dropkey.engine.progress import Progress
from dropkey.engine.state import State
from dropkey.errors import ConfigError, Diverged, Interrupted, RunError, StorageError
from dropkey.metrics import Metric
from dropkey.provenance import code_version, device_name, git_commit, peak_memory_mib, versions
from dropkey.records import RunDirectory
from dropkey.regularizers import STRUCTURED
from dropkey.seeds import derive_seed


def train(cfg: TrainConfig, run: RunDirectory) -> dict:
    """Trains `cfg` in `run` and returns the summary. Leaves a status behind however it ends.

    Raises:
        RunError: with the exit code that fits (see dropkey.errors).
    """
    stop = StopSignal()
    with stop:
        dist = DistContext.start(cfg.trainer.device)
        try:
            if not dist.is_main:
                return train_in(dist, cfg, run, stop)
            with run.lock():
                return train_recording_status(dist, cfg, run, stop)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{str(error).splitlines()[0]}; trainer.grad_accum_steps={2 * cfg.trainer.grad_accum_steps} takes half the memory"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise StorageError(f"cannot write in {run.path}: {error}") from None
        except RuntimeError as error:
            if not is_loss_of_a_peer(error):
                raise
            raise RunError("another process of this setup ended, for the reason it gives; this one stops too") from None
        finally:
            dist.close()


def train_recording_status(dist: DistContext, cfg: TrainConfig, run: RunDirectory, stop: StopSignal) -> dict:
    """`train_in` in the first process, which keeps status.json."""
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # with the same arguments, but not to start over
    if cfg.overwrite and not any(int(os.environ.get(name, 0)) for name in restarts):
        run.clear()
    refuse_other_config(cfg, run)
    run.set_status("running")
    try:
        summary = train_in(dist, cfg, run, stop)
    except (Interrupted, KeyboardInterrupt) as error:
        run.set_status("interrupted", reason=str(error) or "Ctrl-C twice")
        raise
    except Diverged as error:
        run.set_status("diverged", reason=str(error))
        raise
    except BaseException as error:
        record_failure(run, f"{type(error).__name__}: {error}")
        raise
    run.set_status("done")
    return summary


def record_failure(run: RunDirectory, reason: str) -> None:
    """The failure itself matters more than that it could not be written down (a full disk, info)."""
    try:
        run.set_status("failed", reason=reason)
    except RunError as error:
        print(f"status.json could not be written either: {error}", file=sys.stderr)


def refuse_other_config(cfg: TrainConfig, run: RunDirectory) -> None:
    if run.config.exists():
        before = compose.load(run.config)
        if identity.canonical(before) != identity.canonical(cfg):
            changes = "; ".join(identity.differences(before, cfg))
            raise ConfigError(f"{run.config} was changed ({changes}); restore it, or start over with overwrite=true")
    else:
        run.path.mkdir(parents=True, exist_ok=True)
    compose.save(cfg, run.config)


def train_in(dist: DistContext, cfg: TrainConfig, run: RunDirectory, stop: StopSignal) -> dict:
    """Data, model, training, final evaluation, summary: the same in every process."""
    dist.any(False)  # nobody looks for checkpoints before the first process has prepared the directory
    resumed = dist.broadcast((run.checkpoints / "last.pt").exists())
    if dist.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    progress = Progress(cfg.trainer.epochs, run.log, show=dist.is_main)
    if dist.is_main:
        checkpoint.remove_temporaries(run.checkpoints)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("dropkey").setLevel(logging.INFO)  # decoding a folder takes a while, and says so
    dataset = data.load(cfg.data)
    model, report = prepare_model(cfg, dataset, dist, pretrained=cfg.model.pretrained and not resumed)
    if dist.any(stop.number != 0)[0]:
        raise stop.interrupted(f"interrupted before the first step of {run.path}, nothing is lost")
    trainer = cfg.trainer
    train_loader = data.train_loader(
        dataset,
        cfg.data,
        cfg.augment,
        batch_size=trainer.batch_size,
        grad_accum_steps=trainer.grad_accum_steps,
        seed=cfg.seed,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
    )
    if trainer.overfit:
        train_loader = data.FirstBatch(train_loader, trainer.grad_accum_steps)
    watched = "test" if dataset.val is None else "val"
    _, progress.epochs = duration(trainer.epochs, trainer.max_steps, len(train_loader))
    load_start(cfg, model, resumed, progress)
    introduce(cfg, run, dataset, model, report, dist, progress)
    tracker = start_tracker(cfg, run, dist, progress)

    setup = Setup(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),  # of class ids, or of mixed and smoothed targets
        train=train_loader,
        evaluation=loader_of(dataset, watched, cfg, dist),
        num_classes=dataset.num_classes,
        trainer=trainer,
        optim=cfg.optim,
        seed=cfg.seed,
        run=run,
        dist=dist,
        stop=stop,
        tracker=tracker,
        progress=progress,
    )
    summary = None
    try:
        state = fit_or_speak_up(setup)
        test = loader_of(dataset, "test", cfg, dist)
        autocast = build_autocast(trainer.amp, dist.device)
        result = evaluate(state.evaluated.eval(), test, dist, dataset.num_classes, stop, autocast)
        if result is None:
            raise stop.interrupted(f"interrupted in the final evaluation, all saved in {run.path}")
        summary = summarise(cfg, run, state.position, result, watched, model, dist)
        summary |= {"steps_per_epoch": len(train_loader), "data": dataset.fingerprint()}
        if dist.is_main:
            run.write_summary(summary)
    finally:
        progress.close()
        train_loader.close()
        if dist.is_main:
            title = f"{identity.model_label(cfg)}, {cfg.regularizer.name}, {identity.data_label(cfg)}"
            with warn_only(progress):
                if run.records("epoch"):
                    metric = Metric("top1", "top-1", "%")
                    plotting.curves(run.records(), title, run.path / "curves.png", split_name(watched), metric)
            tracker.finish(summary, run.path / "curves.png")
    return summary


@contextlib.contextmanager
def warn_only(progress: Progress):
    """For what decorates a run: it must neither fail it nor hide why it failed."""
    try:
        yield
    except Exception as error:
        progress.info(f"no curves.png: {type(error).__name__}: {error}")


def fit_or_speak_up(setup: Setup) -> State:
    """`fit`; an error that the other processes do not share, such as an unreadable image, is marked as such."""
    try:
        return fit(setup)
    except (Interrupted, Diverged):  # agreed on by all
        raise
    except RunError as error:
        error.one_process = setup.dist.world_size > 1
        raise


def split_name(split: str) -> str:
    return {"val": "validation"}.get(split, split)


def prepare_model(cfg: TrainConfig, dataset, dist: DistContext, pretrained: bool = False):
    """The model, initialised from the seed alone (so the same under every regularizer), and what was patched."""
    torch.manual_seed(derive_seed(cfg.seed, "initialisation"))
    model = build.build_model(
        dataclasses.replace(cfg.model, pretrained=pretrained),
        image_size=dataset.image_size,
        channels=dataset.channels,
        classes=dataset.num_classes,
        fused=not (dist.device.type == "cpu" and cfg.trainer.amp == "bf16"),
    )
    model.to(dist.device)  # first, because what computes attention depends on it
    report = build.regularize(model, cfg.regularizer, cfg.schedule)
    if cfg.regularizer.name in STRUCTURED:
        shape = (1, dataset.channels, dataset.image_size, dataset.image_size)
        build.try_grids(model, torch.zeros(shape, device=dist.device))
    return model, report


def loader_of(dataset, split: str, cfg: TrainConfig, dist: DistContext, batch_size: Optional[int] = None):
    return data.eval_loader(
        dataset,
        split,
        cfg.data,
        batch_size=batch_size or cfg.trainer.eval_batch_size,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
    )


def load_start(cfg: TrainConfig, model: torch.nn.Module, resumed: bool, progress: Progress) -> None:
    if cfg.init_from is None or resumed:
        return
    file = build.find_checkpoint(cfg.init_from)
    fresh = build.load_weights(model, file)
    extra = f"; new: {', '.join(fresh)}" if fresh else ""
    progress.info(f"weights from {file}{extra}")


def introduce(cfg, run, dataset, model, report, dist, progress) -> None:
    """The first lines of a run: where, what, on what, and which attention layers are regularized."""
    sizes = ", ".join(
        f"{len(images):,} {name}"
        for name, images in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test))
        if images is not None
    )
    processes = f"{dist.world_size} processes, " if dist.world_size > 1 else ""
    progress.info(f"run    {run.path}")
    progress.info(
        f"model  {cfg.model.name}, {build.parameter_count(model):,} parameters, {dataset.image_size} px"
        + (f", patch {cfg.model.patch_size}" if cfg.model.patch_size else "")
    )
    progress.info(f"data   {cfg.data.name}: {sizes} images of {dataset.num_classes} classes")
    progress.info(f"device {processes}{dist.device.type}, amp {cfg.trainer.amp}")
    progress.info(str(report))


def start_tracker(cfg: TrainConfig, run: RunDirectory, dist: DistContext, progress: Progress):
    return tracking.start(cfg, run.path, progress.info) if dist.is_main else tracking.NoOpTracker()


def summarise(cfg, run, position, result: dict, watched: str, model, dist: DistContext) -> dict:
    """summary.json: figures of the last epoch's weights on the test split, and what they were measured on."""
    return {
        "top1": round(result["top1"], 4),
        "top5": round(result["top5"], 4),
        "loss": round(result["loss"], 6),
        "ece": round(result["ece"], 4),
        "images": result["count"],
        "best_top1": round(position.best, 4),
        "best_epoch": position.best_epoch,
        "best_split": watched,
        "epochs": position.epoch,
        "steps": position.global_step,
        "seconds": round(position.seconds, 2),
        "images_per_second": round(position.images / max(position.training_seconds, 1e-9), 1),
        "parameters": build.parameter_count(model),
        "peak_memory_mib": peak_memory_mib(dist),
        "run": str(run.path),
        "hash": identity.run_hash(cfg),
        "group": identity.group_hash(cfg),
        "seed": cfg.seed,
        "hardware": f"{dist.world_size} x {device_name(dist)}",
        "versions": versions(),
        "commit": git_commit(),
        "code": code_version(),
    }
