"""Splits, readers, caches, augmentation and loaders; the data sets themselves are in dropkey.datasets.

dataset = datasets.load(cfg.data)
loader = train_loader(dataset, cfg.data, cfg.augment, batch_size=128, seed=0, device="cpu")
for batch in loader.epoch(0):
    ...  # batch.images, batch.targets, batch.ids
"""

from dropkey.data.loaders import (
    EvalLoader,
    FirstBatch,
    ImageBatch,
    TrainLoader,
    epoch_order,
    eval_loader,
    microbatch_begins,
    require_batch,
    train_loader,
)
from dropkey.data.splits import Dataset, Split

__all__ = [
    "Dataset",
    "EvalLoader",
    "FirstBatch",
    "ImageBatch",
    "Split",
    "TrainLoader",
    "epoch_order",
    "eval_loader",
    "microbatch_begins",
    "require_batch",
    "train_loader",
]
