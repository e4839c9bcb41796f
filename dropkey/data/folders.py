"""Image folders: <split>/<class>/<image>, read by class name."""

import logging
import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from dropkey.config.schema import DataConfig
from dropkey.data.cache import decoded
from dropkey.data.images import Files
from dropkey.data.splits import RawSplits, Split
from dropkey.errors import DataError

Place = tuple[int, int]  # device and inode: one folder or file, whatever path leads to it

log = logging.getLogger(__name__)


def existing_root(data: DataConfig, layout: str) -> Path:
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root.absolute()}; set data.root to the folder that holds {layout}")
    return root


def read_splits(places: dict[str, Path | None], layout: str, data: DataConfig) -> RawSplits:
    """The splits in those folders (train, val, test; None where there is none), of the classes in train.

    Raises:
        DataError: no classes, other classes in another split, an empty class, what is no image in an image's place.
    """
    classes = [path.name for path in class_folders(places["train"])]
    if not classes:
        raise DataError(f"no class folders in {places['train'].absolute()}; data.root must hold {layout}")
    splits = {name: read_split(place, classes, data) for name, place in places.items() if place is not None}
    return RawSplits(classes, splits["train"], splits.get("val"), splits.get("test"))


def read_split(place: Path, classes: list[str], data: DataConfig) -> Split:
    present = {path.name for path in class_folders(place)}
    for names, problem in (
        (sorted(set(classes) - present), "lacks"),
        (sorted(present - set(classes)), "has, unlike the training images,"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(f"{place} {problem} {len(names)} class folder(s): {listed}. All splits need the same")
    names, places, targets, seen = [], [], [], folders_above(place)
    for name in classes:
        if (there := place_of(place / name)) in seen:
            raise DataError(f"class folder {place / name} leads to a folder that has its name already; remove one")
        seen.add(there)
    for label, name in enumerate(classes):
        files = sorted(images_below(place / name, name, seen))
        if not files:
            raise DataError(f"class folder {place / name} is empty (no {' '.join(IMG_EXTENSIONS)}); remove or fill it")
        names += [file for file, _ in files]
        places += [key for _, key in files]
        targets += [label] * len(files)
    files = Files(place, names, data.channels, np.array(places, dtype=np.uint64))
    return Split.whole(decoded(files, data) if data.in_memory else files, targets)


def images_below(folder: Path | str, inside: str, seen: set[Place]) -> list[tuple[str, int]]:
    """The images in a folder and those in it: path after `inside`, and a number that is the same for the same file.

    Links are followed, but not to folders that were `seen`: one that leads back would multiply the images.

    Raises:
        DataError: a link that leads nowhere; a pipe or device under an image's name, which would block its reader.
    """
    found, (device, _) = [], place_of(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(inside, entry.name)
            if entry.is_dir():
                if (there := place_of(entry.path)) not in seen:
                    seen.add(there)
                    found += images_below(entry.path, path, seen)
                elif entry.is_symlink():
                    log.warning("%s leads to a folder that is read elsewhere; it is passed over", entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                if not entry.is_file():
                    what = "a link that leads nowhere" if entry.is_symlink() else "no regular file"
                    raise DataError(f"{entry.path} is {what}; restore the image or remove it")
                there = place_of(entry.path) if entry.is_symlink() else (device, entry.inode())
                found.append((path, hash(there) % 2**64))
    return found


def place_of(path: Path | str) -> Place:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def folders_above(place: Path) -> set[Place]:
    place = place.resolve()
    return {place_of(folder) for folder in (place, *place.parents)}


def class_folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    found = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    for path in found:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link that leads nowhere; restore what it leads to, or remove it")
    return [path for path in found if path.is_dir()]
