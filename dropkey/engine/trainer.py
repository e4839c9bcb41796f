"""The training loop, for every task, model and data set. Read it top to bottom."""

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
from dropkey.engine.optim import base_lr, build_autocast, build_optimizer, build_schedule, duration
from dropkey.engine.progress import Progress
from dropkey.engine.state import State
from dropkey.errors import Diverged
from dropkey.records import RunDirectory

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
        options, dist = self.options, self.dist
        steps_per_epoch = len(self.train_loader)
        self.steps, epochs = duration(options.epochs, options.max_steps, steps_per_epoch)

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
        self.saved_at = time.monotonic()
        self.trace: Optional[torch.profiler.profile] = None
        self.fixed_divisors: Optional[dict[str, float]] = None

        # 2. Resume.
        self.resume(steps_per_epoch)

        # 3. Wrapping. Evaluation and checkpoints keep using the bare model.
        self.wrapped = torch.compile(model) if options.compile else model
        evaluated = self.wrapped
        if ema is not None:
            evaluated = torch.compile(ema.module) if options.compile else ema.module
        if dist.world_size > 1:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            unused = options.find_unused_parameters
            self.wrapped = DistributedDataParallel(self.wrapped, ids, find_unused_parameters=unused)

        # 4. Epochs.
        here, self.stop.checks = self.state.position, True
        with self.profiler():
            while here.epoch < epochs:
                self.train_epoch(min(steps_per_epoch, self.steps - here.epoch * steps_per_epoch))
                last = here.epoch + 1 == epochs
                result = self.evaluate(evaluated) if last or (here.epoch + 1) % options.eval_every == 0 else None
                self.finish_epoch(result)
        return self.state

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
                before = time.perf_counter()
                loss = self.step([next(microbatches) for _ in range(self.options.grad_accum_steps)])
                self.count(loss, time.perf_counter() - before)
                stop, late = self.asked() if self.dist.world_size == 1 else self.agreed
                if stop:
                    self.leave()
                if late and here.step < steps:
                    self.save()

    def asked(self) -> tuple[bool, bool]:
        """Whether this process is to stop, or to save."""
        late = time.monotonic() - self.saved_at > 60 * self.options.checkpoint_minutes
        return self.stop.number != 0, late

    def step(self, microbatches: list) -> float:
        """One optimizer step; returns this process's share of the loss, so that the mean over processes is the loss."""
        state, dist, count = self.state, self.dist, len(microbatches)
        global_step = state.position.global_step
        self.schedule.step_update(global_step)
        divisors = self.divisors(microbatches)
        total = 0.0
        for index, batch in enumerate(microbatches):
            # random numbers depend on the place in the global batch, not on which process computes it
            self.seed_microbatch(global_step, dist.rank * count + index)
            with contextlib.nullcontext() if index == count - 1 or dist.world_size == 1 else self.wrapped.no_sync():
                with self.autocast():
                    losses = self.task.losses(self.wrapped, batch)
                    loss = sum(losses[key] * (dist.world_size / divisors[key]) for key in losses)  # DDP averages
                state.scaler.scale(loss).backward()
            total = total + loss.detach()
        # the device is waited for once; in float32, where the norm of a half-precision model does not overflow
        value, norm = torch.stack([total.float(), self.clip_gradients().float()]).tolist()
        scale = state.scaler.get_scale()
        # the processes meet once a step, so one that is asked to stop now stops after the next step
        diverged, *self.agreed = dist.any(not (math.isfinite(value) and math.isfinite(norm)), *self.asked())
        if diverged:
            self.diverge(value, norm, microbatches)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        new_scale = state.scaler.get_scale()
        if new_scale < FP16_MIN_SCALE:
            self.diverge(value, math.nan, microbatches)
        if state.ema is not None and new_scale >= scale:  # fp16: a lower scale means that the step was skipped
            state.ema.update(state.model, global_step)
        return value

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

    def count(self, loss: float, seconds: float) -> None:
        """Moves the position past a step and records it every `log_every` steps."""
        here = self.state.position
        here.step, here.global_step = here.step + 1, here.global_step + 1
        here.loss_sum += loss
        here.samples += self.options.batch_size
        here.seconds += seconds
        here.training_seconds += seconds
        lr = base_lr(self.state.optimizer)
        if here.global_step % self.options.log_every == 0:
            mean = self.dist.mean(loss)
            record = {"kind": "step", "step": here.global_step, "epoch": here.epoch + 1, "loss": mean, "lr": lr}
            self.record({**record, "seconds": here.seconds, "share_done": here.global_step / self.steps})
        self.progress.advance(loss, lr)
        if self.trace is not None:
            self.trace.step()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        began = time.perf_counter()
        model.eval()
        task = self.task
        result = evaluate(
            lambda batch: task.predict(model, batch),
            task.scores(),
            self.eval_loader,
            self.dist,
            self.stop,
            self.autocast,
        )
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

    def diverge(self, loss: float, norm: float, microbatches: list) -> None:
        """Saves the evidence and raises Diverged, in every process, before anything was updated."""
        here, path = self.state.position, self.run.path / "diverged.json"
        ids = [number for batch in microbatches for number in batch.ids.tolist()]
        seen = self.dist.gather({"loss": str(loss), "gradient_norm": str(norm), "sample_ids": ids})
        if self.dist.is_main:
            evidence = {"epoch": here.epoch + 1, "step": here.global_step + 1, "processes": seen}
            path.write_text(json.dumps(evidence, indent=1))
        raise Diverged(
            f"loss {loss}, gradient norm {norm} in epoch {here.epoch + 1}, step {here.global_step + 1}; the weights "
            f"were not updated with it, its samples are listed in {path}; a lower optim.lr, a longer "
            "optim.warmup_epochs or optim.clip_grad_norm=1 may help"
        )

    @contextlib.contextmanager
    def profiler(self):
        """With trainer.profile: steps 5 to 10 traced into the run directory."""
        if not self.options.profile or not self.dist.is_main:
            yield
            return
        target = self.run.path / "trace.json"
        ready = torch.profiler.schedule(wait=3, warmup=1, active=6, repeat=1)
        with torch.profiler.profile(schedule=ready, on_trace_ready=lambda p: p.export_chrome_trace(str(target))) as p:
            self.trace = p
            yield
        self.progress.info(f"trace of 6 steps: {target} (open in https://ui.perfetto.dev)")
