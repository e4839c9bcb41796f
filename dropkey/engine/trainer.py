"""The training loop, for every task, model and data set. Read it top to bottom."""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Callable, Optional

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dropkey.config.schema import OptimConfig, TrainerConfig
from dropkey.engine import checkpoint
from dropkey.engine.begun import Begun, diverged, usable
from dropkey.engine.distributed import DistContext, StopSignal
from dropkey.engine.evaluate import evaluate
from dropkey.engine.optim import base_lr, build_autocast, build_optimizer, build_schedule, duration, skips_by_itself
from dropkey.engine.progress import Progress
from dropkey.engine.state import State
from dropkey.engine.trace import traced
from dropkey.records import RunDirectory

MEETING_SECONDS = 1.0  # about so often the processes of a job agree on whether to go on
FP16_MIN_SCALE = 2.0**-14  # of the loss; below, gradients overflow for another reason than their size


@dataclass
class Trainer:
    """One training: `fit` goes from the run's last checkpoint, if it has one, to the end."""

    task: object  # losses, normalisers, predict, scores, metrics: see dropkey.tasks.base.Task
    model: nn.Module
    train_loader: object  # len = optimizer steps per epoch; epoch(number, start) -> microbatches
    eval_loader: object  # of the split watched after each epoch
    seed_microbatch: Callable[[int, int], None]  # (optimizer step, place in the global batch)
    options: TrainerConfig
    optim: OptimConfig
    run: RunDirectory
    dist: DistContext
    stop: StopSignal
    tracker: object  # log(record)
    progress: Progress

    def fit(self) -> State:
        """The state at the end.

        Raises:
            Interrupted: a signal came; the state is saved.
            Diverged: the loss or the gradient is not finite; nothing was updated with it.
        """
        self.prepare()
        here, self.stop.checks, per_epoch = self.state.position, True, len(self.train_loader)
        trace = self.options.profile and self.dist.is_main
        with traced(trace, self.run.path / "trace.json", self.progress.info) as self.trace:
            while here.epoch < self.epochs:
                self.train_epoch(min(per_epoch, self.steps - here.epoch * per_epoch))
                last = here.epoch + 1 == self.epochs
                self.finish_epoch(self.evaluate() if last or (here.epoch + 1) % self.options.eval_every == 0 else None)
        return self.state

    def prepare(self) -> None:
        """All that is needed before the first step."""
        options, dist = self.options, self.dist
        steps_per_epoch = len(self.train_loader)
        self.steps, self.epochs = duration(options.epochs, options.max_steps, steps_per_epoch)

        # 1. State: everything that a checkpoint holds. The moving average is a copy made before wrapping.
        memory = torch.channels_last if options.channels_last else torch.preserve_format
        model = self.model.to(dist.device, memory_format=memory)
        optimizer = build_optimizer(model, self.optim)
        self.schedule = build_schedule(optimizer, self.optim, self.steps, steps_per_epoch)
        scaler = torch.amp.GradScaler(dist.device.type, enabled=options.amp == "fp16")
        ema = None
        if options.ema_decay is not None:
            ema = ModelEmaV3(model, decay=options.ema_decay, use_warmup=options.ema_warmup)
        self.state = State(model, optimizer, scaler, ema)
        self.autocast = build_autocast(options.amp, dist.device)
        self.saved_at, self.trace = time.monotonic(), None
        self.fixed_divisors: Optional[dict[str, float]] = None
        self.bad = torch.zeros((), device=dist.device)  # how many steps were not finite, on the device
        self.begun: Optional[Begun] = None  # the step whose figures the host has not read
        self.fault: Optional[dict] = None  # what this process knows of a step that was not finite
        self.step_seconds, self.meets_at = 0.0, 0  # the step at which the processes meet again

        # 2. Resume.
        self.resume(steps_per_epoch)

        # 3. Wrapping. Evaluation and checkpoints keep using the bare model.
        self.wrapped = torch.compile(model) if options.compile else model
        self.evaluated = self.wrapped
        if ema is not None:
            self.evaluated = torch.compile(ema.module) if options.compile else ema.module
        if dist.world_size > 1:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            unused = options.find_unused_parameters
            self.wrapped = DistributedDataParallel(self.wrapped, ids, find_unused_parameters=unused)

    def resume(self, steps_per_epoch: int) -> None:
        """Goes back to the last intact checkpoint, and the records with it."""
        saved = checkpoint.load_last(self.run.checkpoints, self.progress.info)
        here = self.state.position
        if saved is not None:
            notice = self.state.load_state_dict(saved, self.dist.rank, self.shape)
            here = self.state.position
            if notice:
                self.progress.info(notice)
            self.progress.info(f"resuming after {here.epoch} epochs and {here.step} of {steps_per_epoch} steps")
        if self.dist.is_main:
            self.run.truncate(here.global_step, here.epoch, self.state.record)

    @property
    def shape(self) -> tuple[int, int]:
        """(processes, microbatches of each per optimizer step)"""
        return self.dist.world_size, self.options.grad_accum_steps

    # ------------------------------------------------------------------------------------------------- one epoch

    def train_epoch(self, steps: int) -> None:
        here = self.state.position
        self.wrapped.train()
        self.epoch_began = here.samples, here.training_seconds
        self.progress.start_epoch(here.epoch + 1, steps, here.step)
        microbatches = self.train_loader.epoch(here.epoch, here.step)  # a generator
        with contextlib.closing(microbatches):
            while here.step < steps:
                with self.timed():
                    begun = self.step([next(microbatches) for _ in range(self.options.grad_accum_steps)])
                    self.settle()  # the step before, so that the device always has one to work on
                    self.begun = begun
                if self.trace is not None:
                    self.trace.step()
                stop, late = self.meet()
                if stop:
                    self.leave()
                if late and here.step < steps:
                    self.save()
        with self.timed():
            self.drain()

    def step(self, microbatches: list) -> Begun:
        """Begins one optimizer step, without waiting for the device. Its loss is this process's share: the mean over
        processes is the loss."""
        state, dist, here, count = self.state, self.dist, self.state.position, len(microbatches)
        self.schedule.step_update(here.global_step)
        divisors = self.divisors(microbatches)
        total = 0.0
        for index, batch in enumerate(microbatches):
            # random numbers depend on the place in the global batch, not on which process computes it
            self.seed_microbatch(here.global_step, dist.rank * count + index)
            with contextlib.nullcontext() if index == count - 1 or dist.world_size == 1 else self.wrapped.no_sync():
                with self.autocast():
                    losses = self.task.losses(self.wrapped, batch)
                    loss = sum(losses[key] * (dist.world_size / divisors[key]) for key in losses)  # DDP averages
                # a loss that is not finite makes gradients that are not, which the other processes see too
                state.scaler.scale(loss).backward(1 + 0 * loss.detach())
            total = total + loss.detach()
        # in float32, where the norm of a half-precision model does not overflow
        figures = torch.stack([total.float(), self.clip_gradients().float()])
        # nothing is updated with what is not finite, nor after it
        if skips_by_itself(state.optimizer):
            self.bad += (~figures.isfinite()).any()
            if not state.scaler.is_enabled():  # which looks at the gradients of this step itself
                state.optimizer.found_inf = self.bad.clamp(max=1)
            state.scaler.step(state.optimizer)
        elif figures.isfinite().all():  # waits for the device
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.model, here.global_step)
        here.step, here.global_step = here.step + 1, here.global_step + 1
        here.samples += self.options.batch_size
        place = {"step": here.global_step, "epoch": here.epoch + 1, "ids": [batch.ids for batch in microbatches]}
        return Begun.at(figures, lr=base_lr(state.optimizer), **place)

    def settle(self, at_rest: bool = False) -> None:
        """Reads the figures of the step begun last, and records them every `log_every` steps."""
        begun, self.begun = self.begun, None
        if begun is None:
            return
        (loss, norm), logged = begun.read(), begun.step % self.options.log_every == 0
        mean = self.dist.mean(loss) if logged else loss  # in every process, whatever it has found
        if self.fault is None and not usable(loss, norm):
            self.fault = begun.fault(loss, norm)
        if self.fault is None and (logged or at_rest) and self.state.scaler.get_scale() < FP16_MIN_SCALE:
            self.fault = begun.fault(loss, math.nan)
        if self.fault is None:
            self.state.position.loss_sum += loss
            if logged and math.isfinite(mean):
                record = {"kind": "step", "step": begun.step, "epoch": begun.epoch, "loss": mean, "lr": begun.lr}
                seconds = self.state.position.seconds
                self.record({**record, "seconds": seconds, "share_done": begun.step / self.steps})
            self.progress.advance(loss, begun.lr)

    def meet(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save: what the processes agree on about once a second.

        Raises:
            Diverged: in every process, if one has found a fault.
        """
        here = self.state.position
        if self.dist.world_size > 1 and here.global_step < self.meets_at:
            return False, False
        late = time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes
        *flags, seconds = self.dist.max(self.fault is not None, self.stop.number != 0, late, self.step_seconds)
        self.meets_at = here.global_step + min(max(int(MEETING_SECONDS / max(seconds, 1e-3)), 1), 1000)
        if flags[0]:
            raise diverged(self.fault, self.run, self.dist)
        return bool(flags[1]), bool(flags[2])

    def drain(self) -> None:
        """Waits until all that was begun is done, and found good by every process.

        Raises:
            Diverged: in every process, if one has found a fault.
        """
        self.settle(at_rest=True)
        self.meets_at = 0
        self.meet()

    @contextlib.contextmanager
    def timed(self):
        """Counts the time within as that of an optimizer step."""
        here, before = self.state.position, time.perf_counter()
        yield
        self.step_seconds = time.perf_counter() - before
        here.seconds += self.step_seconds
        here.training_seconds += self.step_seconds

    def divisors(self, microbatches: list) -> dict[str, float]:
        """What each loss is divided by: its normaliser, summed over the microbatches of all processes."""
        if self.fixed_divisors is not None:
            return self.fixed_divisors
        parts = [self.task.normalisers(batch) for batch in microbatches]
        sums = torch.tensor([sum(part[key] for part in parts) for key in parts[0]], dtype=torch.float64)
        found = {key: max(value, 1.0) for key, value in zip(parts[0], self.dist.sum(sums).tolist(), strict=True)}
        if self.task.fixed_normalisers:
            self.fixed_divisors = found
        return found

    def clip_gradients(self) -> torch.Tensor:
        """The gradient norm after unscaling, limited to optim.clip_grad_norm where that is given."""
        state, limit = self.state, self.optim.clip_grad_norm
        state.scaler.unscale_(state.optimizer)
        if limit is None:
            norm = nn.utils.get_total_norm(p.grad for p in state.model.parameters() if p.grad is not None)
        else:
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), limit)
        # the scaler itself handles fp16 overflows: it skips the step and lowers the scale
        return torch.zeros_like(norm) if state.scaler.is_enabled() else norm

    def evaluate(self) -> dict[str, float]:
        began = time.perf_counter()
        predict, scores = partial(self.task.predict, self.evaluated.eval()), self.task.scores()
        result = evaluate(predict, scores, self.eval_loader, self.dist, self.stop, self.autocast)
        self.state.position.seconds += time.perf_counter() - began
        if result is None:
            self.leave()
        return result

    def finish_epoch(self, result: Optional[dict]) -> None:
        """Record, best, checkpoint; afterwards nothing of the epoch is left to be done again."""
        here, watched = self.state.position, self.task.metrics[0]
        samples, seconds = here.samples - self.epoch_began[0], here.training_seconds - self.epoch_began[1]
        record = {
            "kind": "epoch",
            "step": here.global_step,
            "epoch": here.epoch + 1,
            "train_loss": self.dist.mean(here.loss_sum) / max(here.step, 1),
            "lr": self.state.optimizer.param_groups[0]["lr"],
            **{f"eval_{k}": v for k, v in (result or {}).items() if k != "samples"},
            "seconds": here.seconds,
            "samples_per_second": samples / max(seconds, 1e-9) if samples else None,  # none left after a resume
        }
        here.epoch, here.step, here.loss_sum = here.epoch + 1, 0, 0.0
        better = False
        if result is not None:
            here.last = result[watched.key]
            better = here.best is None or watched.better(here.last, here.best)
        if better:
            here.best, here.best_epoch = here.last, here.epoch
        self.record(record)
        self.progress.finish_epoch(record)
        if better and self.dist.is_main:
            weights = {**self.state.weights(), "epoch": here.epoch}
            checkpoint.save(weights, self.run.checkpoints / "best.pt")
        self.save()
        if self.dist.any(self.stop.number != 0)[0]:
            self.leave(saved=True)

    # ---------------------------------------------------------------------------------------- records and endings

    def record(self, record: dict) -> None:
        self.state.record = record
        if self.dist.is_main:
            self.run.append(record)
            self.tracker.log(record)

    def save(self) -> None:
        self.drain()
        sums = self.dist.gather(self.state.position.loss_sum)
        if self.dist.is_main:
            state = self.state.state_dict(sums, self.shape)
            checkpoint.save(state, self.run.checkpoints / "last.pt", keep_previous=True)
        self.saved_at = time.monotonic()

    def leave(self, saved: bool = False) -> None:
        """Saves and raises Interrupted, in every process."""
        if not saved:
            self.save()
        here = self.state.position
        self.stop.number = next(number for number in self.dist.gather(self.stop.number) if number)
        where = f"after {here.epoch} epochs and {here.step} steps" if here.step else f"after {here.epoch} epochs"
        raise self.stop.interrupted(f"interrupted {where}, all saved in {self.run.path}")
