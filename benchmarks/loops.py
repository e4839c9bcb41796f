"""Training loops over the same images: a bare one, this project's, and one made of timm's parts as in its train.py.

Each is a function that trains so many steps. Images are random bytes in memory: how fast they are read from a disk is
another question (scripts/benchmark.py decoding).
"""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dropkey import tasks
from dropkey.build import build_regularized, microbatch_hook
from dropkey.config.check import check
from dropkey.config.compose import compose
from dropkey.config.schema import DataConfig, TrainConfig
from dropkey.data.images import Pixels
from dropkey.data.splits import RawSplits, Split
from dropkey.engine.distributed import DistContext
from dropkey.engine.optim import build_autocast
from dropkey.engine.progress import Progress
from dropkey.engine.tracking import NoOpTracker
from dropkey.engine.trainer import Trainer
from dropkey.records import RunDirectory

WORKERS = 2


def noise(data: DataConfig) -> RawSplits:
    """The data set: random images, those of the training and one for each class to test."""
    shape = (data.max_train_samples + data.num_classes, 3, data.image_size, data.image_size)
    pixels = Pixels(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    whole = Split.whole(pixels, np.arange(shape[0]) % data.num_classes)
    rows = torch.arange(shape[0]).split([data.max_train_samples, data.num_classes])
    classes = [str(number) for number in range(data.num_classes)]
    return RawSplits(classes, whole.subset(rows[0]), None, whole.subset(rows[1]))


def config(model: dict, batch: int, steps: int, amp: str, device: torch.device, compiled: bool, *words) -> TrainConfig:
    settings = {
        "model.name": model["model_name"],
        "model.patch_size": model["patch_size"],
        "model.depth": model.get("depth", "null"),
        **dict.fromkeys(("model.embed_dim", "model.num_heads", "model.mlp_ratio"), "null"),
        "data.name": "benchmarks.loops:noise",
        "data.image_size": model["img_size"],
        "data.num_classes": model["num_classes"],
        "data.max_train_samples": batch * steps,
        "data.val_fraction": 0,
        "trainer.batch_size": batch,
        "trainer.amp": amp,
        "trainer.compile": compiled,
        "trainer.device": device.type,
        "augment.hflip": 0.5,
        "augment.crop_padding": 4,
        "logger.name": "none",
    }
    return check(compose(["data=cifar10", *(f"{key}={value}" for key, value in settings.items()), *words]))


def ways(model: dict, batch: int, steps: int, amp: str, device: torch.device, compiled: bool):
    """The loops by name, the one to compare with first; and the config that they share."""
    none, drops = (
        config(model, batch, steps, amp, device, compiled, f"regularizer={name}") for name in ("none", "dropkey")
    )
    made = {
        "bare loop": bare(none, steps),
        "this project": ours(none),
        "this project, DropKey": ours(drops),
        "timm's parts": timms(none, steps),
    }
    return made, none


def ours(cfg: TrainConfig) -> Callable[[], None]:
    """One epoch of the real loop, with all it does in an epoch: augmentation, checks, schedule, records."""
    task, dist = tasks.build(cfg), DistContext.start(cfg.trainer.device)
    data = task.load_data()
    model, _ = build_regularized(task, data, dist)
    place = tempfile.TemporaryDirectory(prefix="dropkey-benchmark-")  # lives as long as the function that is returned
    trainer = Trainer(
        task=task,
        model=model,
        train_loader=task.train_loader(data, dist),
        eval_loader=None,
        seed_microbatch=microbatch_hook(cfg, model, 1),
        options=cfg.trainer,
        optim=cfg.optim,
        run=RunDirectory(Path(place.name)),
        dist=dist,
        stop=SimpleNamespace(number=0),
        tracker=NoOpTracker(),
        progress=Progress(cfg.trainer.epochs, show=False),
    )
    trainer.prepare()

    def epoch(_=place) -> None:
        trainer.train_epoch(len(trainer.train_loader))
        here = trainer.state.position
        here.epoch, here.step = here.epoch + 1, 0

    return epoch


def bare(cfg: TrainConfig, steps: int) -> Callable[[], None]:
    """Same model, optimizer and autocast, batches that are ready; nothing else."""
    task, dist = tasks.build(cfg), DistContext.start(cfg.trainer.device)
    data = task.load_data()
    model, _ = build_regularized(task, data, dist)
    model = torch.compile(model) if cfg.trainer.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, fused=True)
    autocast = build_autocast(cfg.trainer.amp, dist.device)
    batches = list(task.train_loader(data, dist).epoch(0))

    def train() -> None:
        for batch in batches[:steps]:
            with autocast():
                loss = F.cross_entropy(model(batch.images), batch.targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


class Pictures(torch.utils.data.Dataset):
    """The same images as PIL pictures, which timm's transforms take; again and again, as one epoch without an end."""

    def __init__(self, split: Split):
        self.split, self.transform = split, None

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index %= len(self.split)
        picture = self.split.images.picture(int(self.split.rows[index]))
        return (self.transform(picture) if self.transform else picture), int(self.split.targets[index])


def timms(cfg: TrainConfig, steps: int) -> Callable[[], None]:
    """timm's loader, optimizer, schedule, scaler and meters, put together as in its train.py with default options, but
    for the augmentation, which is a crop and a mirror, and fewer workers. These read a few batches ahead while the
    others are measured, which is to its advantage."""
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, NativeScaler

    task, dist = tasks.build(cfg), DistContext.start(cfg.trainer.device)
    data = task.load_data()
    cuda = dist.device.type == "cuda"
    model = task.build_model(data, pretrained=False, fused=True).to(dist.device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=300, updates_per_epoch=steps)
    scaler = NativeScaler(device=dist.device.type) if cfg.trainer.amp == "fp16" else None
    model = torch.compile(model) if cfg.trainer.compile else model
    loader = create_loader(
        Pictures(data.train),
        input_size=(3, data.image_size, data.image_size),
        batch_size=cfg.trainer.batch_size,
        is_training=True,
        use_prefetcher=cuda,
        scale=(0.64, 1.0),
        color_jitter=None,
        interpolation="bicubic",
        num_workers=WORKERS,
        device=dist.device,
    )
    autocast, losses, updates = build_autocast(cfg.trainer.amp, dist.device), AverageMeter(), 0
    model.train()
    batches = iter(loader)

    def train() -> None:
        nonlocal updates
        for images, targets in itertools.islice(batches, steps):
            if not cuda:
                images, targets = images.to(dist.device), targets.to(dist.device)
            with autocast():
                loss = F.cross_entropy(model(images), targets)
            if scaler is not None:
                scaler(loss, optimizer)
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if updates % 50 == 0:
                losses.update(loss.item(), len(images))
            schedule.step_update(num_updates=updates, metric=losses.avg)

    return train
