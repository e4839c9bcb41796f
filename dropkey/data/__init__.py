"""Data sets, splits, loaders and augmentation.

    dataset = load(cfg.data)
    loader = train_loader(dataset, cfg.data, cfg.augment, batch_size=128, seed=0, device="cpu")
    for batch in loader.epoch(0):
        ...  # batch.images, batch.targets, batch.ids

Importing this touches no files; `load` reads them.
"""

from dropkey.data.loaders import Batch, EvalLoader, FirstBatch, TrainLoader, epoch_order, eval_loader, train_loader
from dropkey.data.sources import load
from dropkey.data.splits import Dataset, Split

__all__ = [
    "Batch",
    "Dataset",
    "EvalLoader",
    "FirstBatch",
    "Split",
    "TrainLoader",
    "epoch_order",
    "eval_loader",
    "load",
    "train_loader",
]
