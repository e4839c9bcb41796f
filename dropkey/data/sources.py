"""Reading data sets: digits (embedded in scikit-learn), CIFAR (torchvision's files), image folders, ImageNet."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from dropkey.config.schema import DataConfig
from dropkey.data.cache import decoded, locked, require_room
from dropkey.data.images import Files, Pixels, convert, resize_center_crop, to_picture, to_tensor
from dropkey.data.splits import Dataset, Split, hold_out, limit
from dropkey.errors import ConfigError, DataError

VAL_NAMES = ("val", "valid", "validation")
FOLDER_LAYOUT = "{train,val,test}/<class>/<image>, or <class>/<image>"
IMAGENET_LAYOUT = "train/<wnid>/<image>.JPEG and val/<wnid>/<image>.JPEG (ILSVRC 2012, to be had from image-net.org)"


class RawSplits(NamedTuple):
    """What a data set brings of its own; splits it lacks are held out afterwards."""

    classes: list[str]
    train: Split
    val: Split | None
    test: Split | None


def load(data: DataConfig) -> Dataset:
    """The data set with its splits: test is the set's own, else its val, else held out of train; val likewise.

    Raises:
        DataError: images missing, unreadable, too many for memory, or unlike what `data` says of them.
        ConfigError: data.crop_pct below 1 with images kept in memory.
    """
    if data.in_memory and data.crop_pct != 1:
        raise ConfigError(
            f"data.crop_pct={data.crop_pct} needs data.in_memory=false: images in memory are kept at data.image_size, without "
            "a margin to cut off; or set data.crop_pct=1"
        )
    found = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar}.get(data.name, _folder)(data)
    classes, train, val, test = found
    if data.num_classes is not None and data.num_classes != len(classes):
        raise DataError(
            f"data.num_classes={data.num_classes} but {data.name} has {len(classes)} classes"
            + (f" under {data.root}" if data.name in ("folder", "imagenet") else "")
            + f"; set data.num_classes={len(classes)}, or null to take what is found"
        )
    if test is None and val is not None:
        test, val = val, None
    if test is None:
        train, test = hold_out(train, data.test_fraction, "test")
    if val is None and data.val_fraction > 0:
        train, val = hold_out(train, data.val_fraction, "val")
    if data.max_train_samples is not None:
        train = limit(train, data.max_train_samples)
    return Dataset(train, val, test, classes, data.channels, data.image_size)


# ------------------------------------------------------------------------------------------------ arrays


def _digits(data: DataConfig) -> RawSplits:
    from sklearn.datasets import load_digits  # takes a second to import

    images, targets = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)  # grey levels 0 to 16
    return RawSplits([str(digit) for digit in range(10)], _array_split(images, targets, data), None, None)


def _cifar(data: DataConfig) -> RawSplits:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if data.name == "cifar10" else CIFAR100
    place = Path(data.root, kind.base_folder)
    how = f"download {kind.url} and unpack it in {data.root}, or set data.root to where it is"
    try:
        train = kind(data.root, train=True)
    except (RuntimeError, OSError):
        if not data.download:
            raise DataError(f"no intact {data.name} in {place} and data.download=false; {how}") from None
        try:
            with locked(place):
                train = kind(data.root, train=True, download=True)
        except (RuntimeError, OSError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"no intact {data.name} in {place}, and its download failed ({reason}); {how}") from error
    test = kind(data.root, train=False)
    splits = [_array_split(part.data.transpose(0, 3, 1, 2), part.targets, data) for part in (train, test)]
    return RawSplits(list(train.classes), splits[0], None, splits[1])


def _array_split(images: np.ndarray, targets, data: DataConfig) -> Split:
    """Images uint8 N C H W with data.channels channels, at data.image_size where they are to be kept in memory."""
    size = data.image_size if data.in_memory else images.shape[-1]
    shape = (len(images), data.channels, size, size)
    require_room(shape)
    if images.shape != shape:
        given, images = images, np.empty(shape, dtype=np.uint8)
        for row, image in enumerate(given):
            images[row] = to_tensor(resize_center_crop(convert(to_picture(image), data.channels), size)).numpy()
    return _whole(Pixels(np.ascontiguousarray(images)), targets)


def _whole(images, targets) -> Split:
    return Split(images, torch.arange(len(images)), torch.as_tensor(np.asarray(targets), dtype=torch.int64))


# ----------------------------------------------------------------------------------------------- folders


def _folder(data: DataConfig) -> RawSplits:
    root = Path(data.root).expanduser()
    layout = IMAGENET_LAYOUT if data.name == "imagenet" else FOLDER_LAYOUT
    if not root.is_dir():
        raise DataError(f"no folder {root.absolute()}; set data.root to the folder that holds {layout}")
    places = {"train": root / "train", "val": _first_folder(root, VAL_NAMES), "test": _first_folder(root, ("test",))}
    if data.name == "imagenet":
        places["test"] = None  # ImageNet's own has no labels
        for name in ("train", "val"):
            if places[name] is None or not places[name].is_dir():
                raise DataError(f"no folder {root.absolute() / name}; {data.name} is expected as {layout}")
    elif not _folders(places["train"]):  # no splits, or a class called train
        for name in ("val", "test"):
            if places[name] is not None and _folders(places[name]):
                raise DataError(f"{root} has {places[name].name}/ but no train/<class>/; expected {layout}")
        places = {"train": root, "val": None, "test": None}
    classes = [path.name for path in _folders(places["train"])]
    if not classes:
        raise DataError(f"no class folders in {places['train'].absolute()}; data.root must hold {layout}")
    splits = {name: _read_split(place, classes, data) for name, place in places.items() if place is not None}
    return RawSplits(classes, splits["train"], splits.get("val"), splits.get("test"))


def _read_split(place: Path, classes: list[str], data: DataConfig) -> Split:
    present = {path.name for path in _folders(place)}
    for names, problem in (
        (sorted(set(classes) - present), "lacks"),
        (sorted(present - set(classes)), "has, unlike the training images,"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(f"{place} {problem} {len(names)} class folder(s): {listed}. All splits need the same")
    names, targets = [], []
    for label, name in enumerate(classes):
        files = _image_names(place, name)
        if not files:
            raise DataError(f"class folder {place / name} is empty (no {' '.join(IMG_EXTENSIONS)}); remove or fill it")
        names += files
        targets += [label] * len(files)
    files = Files(place, names, data.channels)
    return _whole(decoded(files, data) if data.in_memory else files, targets)


def _image_names(place: Path, class_name: str) -> list[str]:
    """Paths relative to `place`, sorted; folders within the class's and links are followed."""
    names = []
    for folder, subfolders, files in os.walk(place / class_name, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = os.path.relpath(folder, place)
        names += [os.path.join(inside, name) for name in files if _is_image(name)]
    return sorted(names)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)
