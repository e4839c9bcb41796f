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
from dropkey.engine.distributed import DistContext, StopSignal
from dropkey.engine.evaluate import evaluate
from dropkey.engine.optim import build_autocast, build_optimizer, build_schedule, duration
from dropkey.engine.progress import Progress
from dropkey.engine.state import State
from dropkey.errors import Diverged
from dropkey.records import RunDirectory
from dropkey.seeds import derive_seed

FP16_LEAST_SCALE = 2.0**-14  # of the loss; below, gradients overflow for another reason than their size


@dataclass
class Setup:
    """What a training is given."""

    model: nn.Module
    loss: Callable  # (logits, targets) -> scalar
    train: object  # loader: len = optimizer steps per epoch; epoch(number, start) -> batches, one per microbatch
    evaluation: object  # loader of the split watched after each epoch
    num_classes: int
    trainer: TrainerConfig
    optim: OptimConfig
    seed: int
    run: RunDirectory
    dist: DistContext
    stop: StopSignal
    tracker: object  # log(record)
    progress: Progress


def fit(setup: Setup) -> State:
    """Trains to the end, from the run's last checkpoint if it has one.

    Raises:
        Interrupted: a signal came; the state is saved.
        Diverged: the loss is not finite; nothing was updated with it.
    """
    trainer, dist, run = setup.trainer, setup.dist, setup.run
    microbatches = (dist.world_size, trainer.grad_accum_steps)
    per_epoch = len(setup.train)
    steps, epochs = duration(trainer.epochs, trainer.max_steps, per_epoch)

    # 1. State: everything that a checkpoint holds. The moving average is a copy made before wrapping.
    memory = torch.channels_last if trainer.channels_last else torch.preserve_format
    model = setup.model.to(dist.device, memory_format=memory)
    optimizer = build_optimizer(model, setup.optim)
    schedule = build_schedule(optimizer, setup.optim, steps, per_epoch)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=trainer.amp == "fp16")
    ema = ModelEmaV3(model, decay=trainer.ema_decay, use_warmup=True) if trainer.ema_decay is not None else None
    state = State(model, optimizer, scaler, ema)

    # 2. Resume.
    saved = checkpoint.load_last(run.checkpoints, setup.progress.info)
    if saved is not None:
        notice = state.load_state_dict(saved, dist.rank, microbatches)
        setup.progress.info(notice or "", quiet=notice is None)
        here = state.position
        setup.progress.info(f"resuming after {here.epoch} epochs and {here.step} of {per_epoch} steps")
        del saved
    position = state.position
    if dist.is_main:
        run.truncate(position.global_step, position.epoch)

    # 3. Wrapping. Evaluation and checkpoints go on using the bare model.
    wrapped = torch.compile(model) if trainer.compile else model
    predict = (torch.compile(ema.module) if trainer.compile else ema.module) if ema is not None else wrapped
    if dist.world_size > 1:
        ids = [dist.device.index] if dist.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, ids, find_unused_parameters=trainer.find_unused_parameters)
    loop = Loop(setup, state, wrapped, schedule, build_autocast(trainer.amp, dist.device), microbatches)

    # 4. Epochs.
    with loop.profiler():
        while position.epoch < epochs:
            loop.train_epoch(min(per_epoch, steps - position.epoch * per_epoch))
            result = None
            number = position.epoch + 1
            if number % trainer.eval_every == 0 or number == epochs:
                began = time.perf_counter()
                model_in_eval = predict.eval()
                result = evaluate(model_in_eval, setup.evaluation, dist, setup.num_classes, setup.stop, loop.autocast)
                position.seconds += time.perf_counter() - began
                if result is None:
                    loop.leave()
            loop.finish_epoch(result)
    return state


class Loop:
    """One epoch at a time: steps, records, checkpoints."""

    def __init__(self, setup: Setup, state: State, wrapped: nn.Module, schedule, autocast: Callable, microbatches):
        self.setup, self.state, self.wrapped = setup, state, wrapped
        self.schedule, self.autocast, self.microbatches = schedule, autocast, microbatches
        self.saved_at = time.monotonic()
        self.trace: Optional[torch.profiler.profile] = None

    def train_epoch(self, steps: int) -> None:
        setup, here = self.setup, self.state.position
        self.wrapped.train()
        setup.progress.start_epoch(here.epoch + 1, steps, here.step)
        batches = setup.train.epoch(here.epoch, here.step)  # a generator
        with contextlib.closing(batches):
            while here.step < steps:
                before = time.perf_counter()
                loss = self.step(batches)
                self.count(loss, time.perf_counter() - before)
                late = time.monotonic() - self.saved_at > 60 * setup.trainer.checkpoint_minutes
                stop, late = setup.dist.any(setup.stop.number != 0, late)
                if stop:
                    self.leave()
                if late and here.step < steps:
                    self.save()

    def step(self, batches) -> float:
        """One optimizer step; returns the mean loss of this process's microbatches."""
        setup, state, dist = self.setup, self.state, self.setup.dist
        accumulate, update = setup.trainer.grad_accum_steps, state.position.global_step
        self.schedule.step_update(update)
        total, ids = 0.0, []
        for microbatch in range(accumulate):
            batch = next(batches)
            # a microbatch's masks depend on its place in the global batch, not on which process computes it
            torch.manual_seed(derive_seed(setup.seed, "step", update, dist.rank * accumulate + microbatch))
            last = microbatch == accumulate - 1
            with contextlib.nullcontext() if last or dist.world_size == 1 else self.wrapped.no_sync():
                with self.autocast():
                    loss = setup.loss(self.wrapped(batch.images), batch.targets) / accumulate
                state.scaler.scale(loss).backward()
            total, ids = total + loss.detach(), ids + batch.ids.tolist()
        value = float(total)
        norm = self.clip()
        scale = state.scaler.get_scale()
        if dist.any(not (math.isfinite(value) and math.isfinite(norm)))[0]:
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
        """The gradient norm after unscaling, limited to optim.clip_grad_norm where that is given."""
        state, limit = self.state, self.setup.optim.clip_grad_norm
        state.scaler.unscale_(state.optimizer)
        if limit is None:
            norm = float(nn.utils.get_total_norm(p.grad for p in state.model.parameters() if p.grad is not None))
        else:
            norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), limit))
        # fp16 overflows are the scaler's business: it skips the step and lowers the scale
        return 0.0 if state.scaler.is_enabled() else norm

    def count(self, loss: float, seconds: float) -> None:
        """Moves the position past a step and records it every `log_every` steps."""
        setup, here = self.setup, self.state.position
        here.step, here.global_step = here.step + 1, here.global_step + 1
        here.loss_sum += loss
        here.images += setup.trainer.batch_size
        here.seconds += seconds
        here.training_seconds += seconds
        rate = self.state.optimizer.param_groups[0]["lr"]
        if here.global_step % setup.trainer.log_every == 0:
            mean = float(setup.dist.sum(torch.tensor(loss, dtype=torch.float64))) / setup.dist.world_size
            self.record({"kind": "step", "step": here.global_step, "epoch": here.epoch + 1, "loss": mean, "lr": rate})
        setup.progress.advance(loss, rate)
        if self.trace is not None:
            self.trace.step()

    def finish_epoch(self, result: Optional[dict]) -> None:
        """Record, best, checkpoint; then nothing of the epoch is left to be done again."""
        setup, here = self.setup, self.state.position
        mean = float(setup.dist.sum(torch.tensor(here.loss_sum, dtype=torch.float64))) / setup.dist.world_size
        record = {
            "kind": "epoch",
            "step": here.global_step,
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
        setup.progress.finish_epoch(record)
        if better and setup.dist.is_main:
            weights = {**self.state.weights(), "epoch": here.epoch}
            checkpoint.save(weights, setup.run.checkpoints / "best.pt")
        self.save()
        if setup.dist.any(setup.stop.number != 0)[0]:
            self.leave(saved=True)

    def record(self, record: dict) -> None:
        if self.setup.dist.is_main:
            self.setup.run.append(record)
            self.setup.tracker.log(record)

    def save(self) -> None:
        here, dist = self.state.position, self.setup.dist
        sums = dist.gather(here.loss_sum)
        if dist.is_main:
            state = self.state.state_dict(sums, self.microbatches)
            checkpoint.save(state, self.setup.run.checkpoints / "last.pt", keep_previous=True)
        self.saved_at = time.monotonic()

    def leave(self, saved: bool = False) -> None:
        """Saves and raises Interrupted, in every process."""
        if not saved:
            self.save()
        here = self.state.position
        numbers = self.setup.dist.gather(self.setup.stop.number)
        self.setup.stop.number = next(number for number in numbers if number)
        where = f"after {here.epoch} epochs and {here.step} steps" if here.step else f"after {here.epoch} epochs"
        raise self.setup.stop.interrupted(f"interrupted {where}, all saved in {self.setup.run.path}")

    def diverge(self, loss: float, norm: float, ids: list[int]) -> None:
        """Leaves evidence and raises Diverged, in every process, before anything was updated."""
        setup, here = self.setup, self.state.position
        seen = setup.dist.gather({"loss": str(loss), "gradient_norm": str(norm), "sample_ids": ids})
        path = setup.run.path / "diverged.json"
        if setup.dist.is_main:
            path.write_text(
                json.dumps({"epoch": here.epoch + 1, "step": here.global_step + 1, "processes": seen}, indent=1)
            )
        raise Diverged(
            f"loss {loss}, gradient norm {norm} in epoch {here.epoch + 1}, step {here.global_step + 1}, which changed "
            f"nothing; its samples are named in {path}; a lower optim.lr, a longer optim.warmup_epochs or "
            "optim.clip_grad_norm=1 may help"
        )

    @contextlib.contextmanager
    def profiler(self):
        """With trainer.profile: steps 5 to 10 traced into the run directory."""
        if not self.setup.trainer.profile or not self.setup.dist.is_main:
            yield
            return
        target = self.setup.run.path / "trace.json"
        ready = torch.profiler.schedule(wait=3, warmup=1, active=6, repeat=1)
        with torch.profiler.profile(schedule=ready, on_trace_ready=lambda p: p.export_chrome_trace(str(target))) as p:
            self.trace = p
            yield
        self.setup.progress.info(f"trace of 6 steps: {target} (open in https://ui.perfetto.dev)")
