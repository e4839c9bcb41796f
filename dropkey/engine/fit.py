"""The training loop, for every model, data set and regularizer. Read it top to bottom."""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dropkey.config.schema import OptimConfig, TrainerConfig
from dropkey.engine import checkpoint
from dropkey.engine.distributed import StopSignal, World
from dropkey.engine.evaluate import evaluate
from dropkey.engine.optim import build_autocast, build_optimizer, build_schedule, duration
from dropkey.engine.progress import Progress
from dropkey.engine.state import State
from dropkey.errors import Diverged
from dropkey.records import RunDirectory
from dropkey.seeds import derive_seed

FP16_LEAST_SCALE = 2.0**-14  # of the loss; below, gradients overflow for another reason than their size


@dataclass
class Job:
    """What a training is given."""

    model: nn.Module
    loss: Callable  # (logits, targets) -> scalar
    train: object  # loader: len = optimizer steps per epoch; epoch(number, start) -> batches, one per chunk
    evaluation: object  # loader of the split watched after each epoch
    num_classes: int
    trainer: TrainerConfig
    optim: OptimConfig
    seed: int
    run: RunDirectory
    world: World
    stop: StopSignal
    tracker: object  # log(record)
    progress: Progress


def fit(job: Job) -> State:
    """Trains to the end, from the run's last checkpoint if it has one.

    Raises:
        Interrupted: a signal came; the state is saved.
        Diverged: the loss is not finite; nothing was updated with it.
    """
    trainer, world, run = job.trainer, job.world, job.run
    chunks = (world.size, trainer.accumulate)
    per_epoch = len(job.train)
    steps, epochs = duration(trainer.epochs, trainer.max_steps, per_epoch)

    # 1. State: everything that a checkpoint holds. The moving average is a copy made before wrapping.
    memory = torch.channels_last if trainer.channels_last else torch.preserve_format
    model = job.model.to(world.device, memory_format=memory)
    optimizer = build_optimizer(model, job.optim)
    schedule = build_schedule(optimizer, job.optim, steps, per_epoch)
    scaler = torch.amp.GradScaler(world.device.type, enabled=trainer.amp == "fp16")
    ema = ModelEmaV3(model, decay=trainer.ema_decay, use_warmup=True) if trainer.ema_decay is not None else None
    state = State(model, optimizer, scaler, ema)

    # 2. Resume.
    saved = checkpoint.load_last(run.checkpoints, job.progress.say)
    if saved is not None:
        notice = state.load_state_dict(saved, world.rank, chunks)
        job.progress.say(notice or "", quiet=notice is None)
        here = state.position
        job.progress.say(f"resuming after {here.epoch} epochs and {here.step} of {per_epoch} steps")
        del saved
    position = state.position
    if world.main:
        run.truncate(position.update, position.epoch)

    # 3. Wrapping. Evaluation and checkpoints go on using the bare model.
    wrapped = torch.compile(model) if trainer.compile else model
    predict = (torch.compile(ema.module) if trainer.compile else ema.module) if ema is not None else wrapped
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, ids, find_unused_parameters=trainer.find_unused_parameters)
    loop = Loop(job, state, wrapped, schedule, build_autocast(trainer.amp, world.device), chunks)

    # 4. Epochs.
    with loop.profiler():
        while position.epoch < epochs:
            loop.train_epoch(min(per_epoch, steps - position.epoch * per_epoch))
            result = None
            number = position.epoch + 1
            if number % trainer.eval_every == 0 or number == epochs:
                began = time.perf_counter()
                model_in_eval = predict.eval()
                result = evaluate(model_in_eval, job.evaluation, world, job.num_classes, job.stop, loop.autocast)
                position.seconds += time.perf_counter() - began
                if result is None:
                    loop.leave()
            loop.finish_epoch(result)
    return state


class Loop:
    """One epoch at a time: steps, records, checkpoints."""

    def __init__(self, job: Job, state: State, wrapped: nn.Module, schedule, autocast: Callable, chunks):
        self.job, self.state, self.wrapped = job, state, wrapped
        self.schedule, self.autocast, self.chunks = schedule, autocast, chunks
        self.saved_at = time.monotonic()
        self.trace: Optional[torch.profiler.profile] = None

    def train_epoch(self, steps: int) -> None:
        job, here = self.job, self.state.position
        self.wrapped.train()
        job.progress.start_epoch(here.epoch + 1, steps, here.step)
        batches = job.train.epoch(here.epoch, here.step)  # a generator
        with contextlib.closing(batches):
            while here.step < steps:
                before = time.perf_counter()
                loss = self.step(batches)
                self.count(loss, time.perf_counter() - before)
                late = time.monotonic() - self.saved_at > 60 * job.trainer.checkpoint_minutes
                stop, late = job.world.any(job.stop.number != 0, late)
                if stop:
                    self.leave()
                if late and here.step < steps:
                    self.save()

    def step(self, batches) -> float:
        """One optimizer step; returns the mean loss of this process's chunks."""
        job, state, world = self.job, self.state, self.job.world
        accumulate, update = job.trainer.accumulate, state.position.update
        self.schedule.step_update(update)
        total, ids = 0.0, []
        for chunk in range(accumulate):
            batch = next(batches)
            # a chunk's masks depend on its place in the global batch, not on which process computes it
            torch.manual_seed(derive_seed(job.seed, "step", update, world.rank * accumulate + chunk))
            last = chunk == accumulate - 1
            with contextlib.nullcontext() if last or world.size == 1 else self.wrapped.no_sync():
                with self.autocast():
                    loss = job.loss(self.wrapped(batch.images), batch.targets) / accumulate
                state.scaler.scale(loss).backward()
            total, ids = total + loss.detach(), ids + batch.ids.tolist()
        value = float(total)
        norm = self.clip()
        scale = state.scaler.get_scale()
        if world.any(not (math.isfinite(value) and math.isfinite(norm)))[0]:
            self.diverge(value, norm, ids)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        after = state.scaler.get_scale()
        if after < FP16_LEAST_SCALE:
            self.diverge(value, math.nan, ids)
        if state.ema is not None and after >= scale:  # fp16: a lower scale means that the step was skipped
            state.ema.update(state.model, update)
        return value

    def clip(self) -> float:
        """The gradient norm after unscaling, limited to optim.clip where that is given."""
        state, limit = self.state, self.job.optim.clip
        state.scaler.unscale_(state.optimizer)
        if limit is None:
            norm = float(nn.utils.get_total_norm(p.grad for p in state.model.parameters() if p.grad is not None))
        else:
            norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), limit))
        # fp16 overflows are the scaler's business: it skips the step and lowers the scale
        return 0.0 if state.scaler.is_enabled() else norm

    def count(self, loss: float, seconds: float) -> None:
        """Moves the position past a step and records it every `log_every` steps."""
        job, here = self.job, self.state.position
        here.step, here.update = here.step + 1, here.update + 1
        here.loss_sum += loss
        here.images += job.trainer.batch_size
        here.seconds += seconds
        here.training_seconds += seconds
        rate = self.state.optimizer.param_groups[0]["lr"]
        if here.update % job.trainer.log_every == 0:
            mean = float(job.world.sum(torch.tensor(loss, dtype=torch.float64))) / job.world.size
            self.record({"kind": "step", "step": here.update, "epoch": here.epoch + 1, "loss": mean, "lr": rate})
        job.progress.advance(loss, rate)
        if self.trace is not None:
            self.trace.step()

    def finish_epoch(self, result: Optional[dict]) -> None:
        """Record, best, checkpoint; then nothing of the epoch is left to be done again."""
        job, here = self.job, self.state.position
        mean = float(job.world.sum(torch.tensor(here.loss_sum, dtype=torch.float64))) / job.world.size
        record = {
            "kind": "epoch",
            "step": here.update,
            "epoch": here.epoch + 1,
            "train_loss": mean / max(here.step, 1),
            "lr": self.state.optimizer.param_groups[0]["lr"],
            **{f"eval_{k}": v for k, v in (result or {}).items() if k != "count"},
            "seconds": here.seconds,
            "images_per_second": here.images / max(here.training_seconds, 1e-9),
        }
        here.epoch, here.step, here.loss_sum = here.epoch + 1, 0, 0.0
        better = result is not None and result["top1"] > here.best
        if better:
            here.best, here.best_epoch = result["top1"], here.epoch
        self.record(record)
        job.progress.finish_epoch(record)
        if better and job.world.main:
            weights = {**self.state.weights(), "epoch": here.epoch}
            checkpoint.save(weights, job.run.checkpoints / "best.pt")
        self.save()
        if job.world.any(job.stop.number != 0)[0]:
            self.leave(saved=True)

    def record(self, record: dict) -> None:
        if self.job.world.main:
            self.job.run.append(record)
            self.job.tracker.log(record)

    def save(self) -> None:
        here, world = self.state.position, self.job.world
        sums = world.gather(here.loss_sum)
        if world.main:
            state = self.state.state_dict(sums, self.chunks)
            checkpoint.save(state, self.job.run.checkpoints / "last.pt", keep_previous=True)
        self.saved_at = time.monotonic()

    def leave(self, saved: bool = False) -> None:
        """Saves and raises Interrupted, in every process."""
        if not saved:
            self.save()
        here = self.state.position
        numbers = self.job.world.gather(self.job.stop.number)
        self.job.stop.number = next(number for number in numbers if number)
        where = f"after {here.epoch} epochs and {here.step} steps" if here.step else f"after {here.epoch} epochs"
        raise self.job.stop.interrupted(f"interrupted {where}, all saved in {self.job.run.path}")

    def diverge(self, loss: float, norm: float, ids: list[int]) -> None:
        """Leaves evidence and raises Diverged, in every process, before anything was updated."""
        job, here = self.job, self.state.position
        seen = job.world.gather({"loss": str(loss), "gradient_norm": str(norm), "sample_ids": ids})
        path = job.run.path / "diverged.json"
        if job.world.main:
            path.write_text(json.dumps({"epoch": here.epoch + 1, "step": here.update + 1, "processes": seen}, indent=1))
        raise Diverged(
            f"loss {loss}, gradient norm {norm} in epoch {here.epoch + 1}, step {here.update + 1}, which changed "
            f"nothing; its samples are named in {path}; a lower optim.lr, a longer optim.warmup_epochs or "
            "optim.clip=1 may help"
        )

    @contextlib.contextmanager
    def profiler(self):
        """With trainer.profile: steps 5 to 10 traced into the run directory."""
        if not self.job.trainer.profile or not self.job.world.main:
            yield
            return
        target = self.job.run.path / "trace.json"
        ready = torch.profiler.schedule(wait=3, warmup=1, active=6, repeat=1)
        with torch.profiler.profile(schedule=ready, on_trace_ready=lambda p: p.export_chrome_trace(str(target))) as p:
            self.trace = p
            yield
        self.job.progress.say(f"trace of 6 steps: {target} (open in https://ui.perfetto.dev)")
