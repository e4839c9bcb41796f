"""Any image folder: {train,val,test}/<class>/<image>, or <class>/<image> with splits held out by class."""

from pathlib import Path

from dropkey.config.schema import DataConfig
from dropkey.data.folders import class_folders, existing_root, read_splits
from dropkey.data.splits import RawSplits
from dropkey.errors import DataError

LAYOUT = "{train,val,test}/<class>/<image>, or <class>/<image>"
VAL_NAMES = ("val", "valid", "validation")


def read(data: DataConfig) -> RawSplits:
    """Raises DataError: no such folder, or one with another layout."""
    root = existing_root(data, LAYOUT)
    places = {"train": root / "train", "val": _first(root, VAL_NAMES), "test": _first(root, ("test",))}
    if not class_folders(places["train"]):  # no splits, or a class called train
        for name in ("val", "test"):
            if places[name] is not None and class_folders(places[name]):
                raise DataError(f"{root} has {places[name].name}/ but no train/<class>/; expected {LAYOUT}")
        places = {"train": root, "val": None, "test": None}
    return read_splits(places, LAYOUT, data)


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)
