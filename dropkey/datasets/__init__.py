"""Data sets: each is one file here, with a function `read(data)`, and one config in configs/data/.

dataset = load(cfg.data)  # cfg.data.name is a key of DATASETS, or `module:function` of your own
"""

import importlib
import inspect
from dataclasses import replace

from dropkey.config import schema
from dropkey.config.check import nearest
from dropkey.config.schema import DataConfig
from dropkey.data.splits import TEST_SEED, Dataset, Split, hold_out, limit, refuse_shared_images
from dropkey.errors import ConfigError, DataError, explained

DATASETS, SCENES, MESHES = (
    {name: f"dropkey.datasets.{name}:read" for name in names}
    for names in (schema.DATASETS, schema.SCENES, schema.MESHES)
)

TRAIN_SAMPLES = {
    **{"digits": 1_438, "cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167},
    **{"coco": 118_287, "hico_det": 38_118},
}


def load(data: DataConfig, seed: int = 0) -> Dataset:
    """The data set with its splits: test is its own, else its val, else held out of train; val likewise.

    With data.split_seed=run, `seed` draws the validation and the training images. Held-out test images are always the
    same, so that runs are compared on them.

    Raises:
        DataError: images missing, unreadable, too many for memory, in two splits, all of one class, or unlike what
            `data` says of them.
        ConfigError: no such data set; data.crop_pct below 1 with images kept in memory.
    """
    read = reader(data.name)
    try:
        found = read(data)
    except OSError as error:
        raise DataError(f"cannot read data={data.name}: {explained(error)}") from error
    if not isinstance(found, tuple) or [type(one) for one in found[:2]] != [list, Split] or len(found) != 4:
        raise ConfigError(f"data.name={data.name} must return a list of classes and three splits: train, val, test")
    classes, train, val, test = found
    if len(classes) < 2:
        where = f" under {data.root}" if data.name in schema.OWN_VALIDATION else ""
        raise DataError(f"data={data.name} has one class{where}: {classes[0]}; a classifier needs two or more")
    if data.num_classes is not None and data.num_classes != len(classes):
        raise DataError(
            f"data.num_classes={data.num_classes} but {data.name} has {len(classes)} classes"
            + (f" under {data.root}" if data.name in schema.OWN_VALIDATION else "")
            + f"; set data.num_classes={len(classes)}, or null to take what is found"
        )
    if test is None and val is not None:
        test, val = val, None
    if test is None:
        train, test = hold_out(train, data.test_fraction, "test", TEST_SEED)
    pool, drawn = train, seed if data.split_seed == "run" else data.split_seed
    if val is None and data.val_fraction > 0:
        train, val = hold_out(train, data.val_fraction, "val", drawn)
    if data.max_train_samples is not None:
        train = limit(train, data.max_train_samples, drawn)
    refuse_shared_images({"train": train, "val": val, "test": test})
    return Dataset(train, val, test, classes, data.channels, data.image_size, pool)


def preprocessed_as(other: DataConfig, own: DataConfig, split: str) -> DataConfig:
    """Another data set with a run's own image size, channels and normalisation. Nothing is held out of its training
    images unless that is the split to evaluate."""
    kept = {key: getattr(own, key) for key in ("image_size", "channels", "mean", "std")}
    return replace(other, **kept, val_fraction=other.val_fraction if split == "val" else 0.0)


def reader(name: str, known: dict[str, str] = DATASETS, arguments: int = 1):
    """The function of that data set, of those that a task knows, which takes so many arguments."""
    module, _, function = known.get(name, name).partition(":")
    if not function:
        raise ConfigError(f"data.name={name} is no data set for this task{nearest(name, known)} (or module:function)")
    try:
        found = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind(*range(arguments))
        return found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"data.name={name}: {error}") from None
