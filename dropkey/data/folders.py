"""Image folders: <split>/<class>/<image>, read by class name."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from dropkey.config.schema import DataConfig
from dropkey.data.cache import decoded
from dropkey.data.images import Files
from dropkey.data.splits import RawSplits, Split
from dropkey.errors import DataError


def existing_root(data: DataConfig, layout: str) -> Path:
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root.absolute()}; set data.root to the folder that holds {layout}")
    return root


def read_splits(places: dict[str, Path | None], layout: str, data: DataConfig) -> RawSplits:
    """The splits in those folders (train, val, test; None where there is none), of the classes in train.

    Raises:
        DataError: no classes, other classes in another split, an empty class.
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
    names, targets = [], []
    for label, name in enumerate(classes):
        files = _image_names(place, name)
        if not files:
            raise DataError(f"class folder {place / name} is empty (no {' '.join(IMG_EXTENSIONS)}); remove or fill it")
        names += files
        targets += [label] * len(files)
    files = Files(place, names, data.channels)
    return Split.whole(decoded(files, data) if data.in_memory else files, targets)


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


def class_folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
