"""Images in a few large files: tar shards, read in place by offset, and whatever is laid out like them.

A shard is read through once for its index, which is cached; from then on any image is one read, as with single files,
so that order, workers and resume are those of image folders.
"""

import io
import json
import os
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from dropkey.config.schema import DataConfig
from dropkey.data.cache import cache_directory, cached_array, decoded
from dropkey.data.folders import existing_root
from dropkey.data.images import TAIL, damage_named, decode
from dropkey.data.splits import RawSplits, Split
from dropkey.errors import DataError

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
BLOCK = 512  # bytes of a tar header
FORMAT = 1  # raise when an index changes: old ones are then not found


class Shards:
    """Image i: `where[i]` = (shard, offset, bytes) of an encoded image. Names (bytes) are for messages."""

    places = None  # as Files has them; shards in two splits are refused by path

    def __init__(self, paths: list[str], names: np.ndarray, where: np.ndarray, channels: int):
        self.paths, self.names, self.where, self.channels = paths, names, where, channels

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        return f"{self.paths[self.where[row, 0]]}: {os.fsdecode(self.names[row])}"

    def content(self) -> bytes:
        """Names, places and each shard's last bytes."""
        digest = zlib.crc32(np.ascontiguousarray(self.where))
        for path in self.paths:
            with open(path, "rb") as file:
                file.seek(-min(TAIL, os.path.getsize(path)), os.SEEK_END)
                digest = zlib.crc32(file.read(), digest)
        return self.names.tobytes() + digest.to_bytes(4, "little")

    def stamp(self) -> Iterator[bytes]:
        yield from file_stamps(self.paths)
        yield self.where.tobytes()

    def picture(self, row: int) -> Image.Image:
        shard, offset, size = self.where[row].tolist()
        with damage_named(self.path(row)), open(self.paths[shard], "rb") as file:
            return decode(io.BytesIO(os.pread(file.fileno(), size, offset)), self.channels)


@dataclass
class Index:
    paths: list[str]  # files that hold the images
    names: list[str] = field(default_factory=list)
    where: list[tuple[int, int, int]] = field(default_factory=list)  # number of the file, offset, bytes
    labels: list[int | str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # names of the labels 0, 1, ... where they have names


# ------------------------------------------------------------------------------------------------- which files


def find_shards(root: Path, suffix: str) -> dict[str, list[Path]]:
    """The files of each split, by a word in their name or folder; all are for training where none has such a word.

    Raises:
        DataError: none, some without a word, no training shards, one missing, one in two splits.
    """
    found = defaultdict(list)
    for path in sorted(path for path in root.rglob(f"*{suffix}") if not path.name.startswith(".")):
        words = re.findall("[a-z]+", str(path.relative_to(root)).lower())
        found[next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")].append(path)
    if list(found) == [""]:
        found = {"train": found[""]}
    if "" in found:
        raise DataError(f"{found[''][0]}: of which split? Its name needs train, val or test, as those of others have")
    if "train" not in found:
        raise DataError(f"no training shards (*train*{suffix}) in {root.absolute()}; set data.root to where they are")
    seen = {}
    for name, paths in found.items():
        require_all(paths)
        for path in paths:
            if (other := seen.setdefault(path.resolve(), name)) != name:
                raise DataError(f"{path} ({name}) and a shard of {other} are the same file; remove one of them")
    return dict(found)


def require_all(paths: list[Path]) -> None:
    """DataError: a gap in the numbers of shards, or fewer than their names say (00000-of-00014)."""
    series = defaultdict(set)
    for path in paths:
        if numbered := re.fullmatch(r"(.*?)(\d+)(-of-(\d+).*|[^\d]*)", path.name):
            before, number, after, total = numbered.groups()
            series[path.parent, before, after, total].add(int(number))
    for (folder, before, after, total), numbers in series.items():
        expected = set(range(int(total)) if total else range(min(numbers), max(numbers) + 1))
        if missing := sorted(expected - numbers):
            raise DataError(
                f"{folder} lacks {len(missing)} of {len(expected)} shards {before}*{after}: the first is number "
                f"{missing[0]}; restore it"
            )


def file_stamps(paths: list) -> Iterator[bytes]:
    for path in paths:
        status = os.stat(path)
        yield b"%b\0%d\0%d\0" % (os.fsencode(os.path.realpath(path)), status.st_size, status.st_mtime_ns)


# ------------------------------------------------------------------------------------------------------ splits


def read_shards(root: Path, suffix: str, data: DataConfig, build: Callable) -> RawSplits:
    """`build(paths, name)` makes the Index of a split's shards; `name` is the same for the same files.

    Raises:
        DataError: shards that are missing or damaged, other classes in another split.
    """
    found = {name: cached_index(paths, build) for name, paths in find_shards(root, suffix).items()}
    labels, names = found["train"]["labels"], found["train"]["classes"]
    classes = np.unique(labels) if labels.dtype.kind == "S" else np.arange(max(len(names), labels.max() + 1))
    splits = {}
    for name, index in found.items():
        own = index["labels"]
        if own.dtype.kind == "i" and (own < 0).all():
            continue  # the test images of some published sets have no labels
        strange = np.setdiff1d(own, classes) if own.dtype.kind == classes.dtype.kind else own
        if len(strange):
            raise DataError(f"{root}: the {name} shards have class {text(strange[0])}, unlike the training shards")
        files = [text(path) for path in index["paths"]]
        store = Shards(files, index["names"], index["where"], data.channels)
        splits[name] = Split.whole(decoded(store, data) if data.in_memory else store, np.searchsorted(classes, own))
    names = names if len(names) == len(classes) else classes
    return RawSplits([text(name) for name in names], splits["train"], splits.get("val"), splits.get("test"))


def text(value: bytes | np.integer) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def cached_index(paths: list[Path], build: Callable[[list[Path], str], Index]) -> dict[str, np.ndarray]:
    """The fields of an Index: bytes, but for `where` and for labels that are numbers."""
    stamp = json.dumps([FORMAT, build.__name__]).encode() + b"".join(file_stamps(paths))
    name = sha256(stamp).hexdigest()[:32]

    def make() -> np.ndarray:
        found = build(paths, name)
        if not found.names:
            raise DataError(f"no images in {paths[0]}{' and others' if len(paths) > 1 else ''}; set data.root")
        words = any(isinstance(label, str) for label in found.labels)
        arrays = {"where": np.array(found.where, dtype=np.int64)}
        arrays["labels"] = encoded(found.labels) if words else np.array(found.labels, dtype=np.int64)
        file = io.BytesIO()
        np.savez(file, **arrays, **{key: encoded(getattr(found, key)) for key in ("paths", "names", "classes")})
        return np.frombuffer(file.getbuffer(), dtype=np.uint8)

    for _ in range(2):
        array = cached_array(f"{name}.index.npy", None, make)
        with np.load(io.BytesIO(array.tobytes()), allow_pickle=False) as arrays:
            index = dict(arrays)
        if all(os.path.exists(path) for path in index["paths"]):
            break
        (cache_directory() / f"{name}.index.npy").unlink(missing_ok=True)  # the copied images were deleted
    return index


def encoded(texts: list) -> np.ndarray:
    return np.array([os.fsencode(str(one)) for one in texts], dtype=bytes)


# ------------------------------------------------------------------------------------------------- tar shards


def read_tar_shards(data: DataConfig) -> RawSplits:
    """WebDataset's layout (<key>.jpg beside <key>.cls, or <key>.json with a label), or timm's: <class>/<image> in a
    tar, or a tar of one tar per class, as ILSVRC2012_img_train.tar is."""
    return read_shards(existing_root(data, "train*.tar and val*.tar"), ".tar", data, index_tars)


def index_tars(paths: list[Path], name: str) -> Index:
    index, labelled = Index([str(path) for path in paths]), None
    for number, path in enumerate(paths):
        images, labels = {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for name, offset, size in members(tar):
                    key, _, extension = name.rpartition("/")[2].partition(".")
                    key = (name.rpartition("/")[0], key)
                    if f".{extension}".lower().endswith(IMG_EXTENSIONS):
                        if key in images:
                            raise DataError(f"{path}: {name} and {images[key][0]} have one key; rename one")
                        images[key] = (name, offset, size)
                    elif extension in ("cls", "json"):
                        labels.setdefault(key, (name, offset, size))
            with open(path, "rb") as file:
                file.seek(-BLOCK, os.SEEK_END)
                if any(file.read()):  # a tar ends in blocks of zeros
                    raise tarfile.ReadError("it ends early")
                texts = {
                    key: label_of(path, name, os.pread(file.fileno(), size, offset))
                    for key, (name, offset, size) in labels.items()
                    if key in images
                }
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"cannot read shard {path}: {' '.join(str(error).split())}; restore it") from error
        labelled = bool(labels) if labelled is None and images else labelled
        for key, (name, offset, size) in images.items():
            index.names.append(name)
            index.where.append((number, offset, size))
            index.labels.append(texts[key] if labelled and key in texts else folder_label(path, name, labelled))
        if lonely := sorted(labels.keys() - images.keys()):
            raise DataError(f"{path}: {labels[lonely[0]][0]} has no image of that key beside it; restore the shard")
    return index


def members(tar: tarfile.TarFile, start: int = 0, folder: str = "") -> Iterator[tuple[str, int, int]]:
    """(name, offset in the outermost file, bytes) of each file in a tar and in the tars in it."""
    for member in tar:
        if member.isfile() and member.name.endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from members(inner, start + member.offset_data, f"{folder}{Path(member.name).stem}/")
        elif member.isfile() and not Path(member.name).name.startswith("."):
            yield folder + member.name, start + member.offset_data, member.size


def label_of(path: Path, name: str, content: bytes) -> int | str:
    """Of a .cls or .json file beside an image."""
    try:
        text = content.decode().strip()
        if name.endswith(".json"):
            facts = json.loads(text)
            text = next(str(facts[key]) for key in ("label", "cls") if key in facts)
        if not text:
            raise ValueError
    except (ValueError, StopIteration, TypeError):
        raise DataError(f"{path}: {name} holds no label; it needs a number, a name, or label in JSON") from None
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def folder_label(path: Path, name: str, labelled: bool) -> str:
    folder = Path(name).parent.name
    if labelled or not folder:
        raise DataError(f"{path}: {name} has no label: neither a .cls or .json beside it nor a class folder")
    return folder
