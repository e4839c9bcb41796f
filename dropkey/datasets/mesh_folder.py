"""Images with meshes of one's own: square crops, and a file meshes.npz with the body and all meshes (docs/mesh.md).

Bodies such as SMPL, and what is derived from them, have licences of their own and come from the user.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dropkey.config.schema import DataConfig
from dropkey.data.cache import decoded
from dropkey.data.folders import existing_root
from dropkey.data.images import SAMPLE, Files, damage_named
from dropkey.errors import DataError
from dropkey.mesh.samples import Body, Meshes, Split
from dropkey.seeds import derive_seed

FILE = "meshes.npz"
BODY = ("template", "regressor", "hips", "middle", "coarse", "faces")
KINDS = {"files": np.str_, "split": np.str_, **dict.fromkeys(("hips", "middle", "coarse", "faces"), np.integer)}
NAMES = {np.str_: "text", np.integer: "integers", np.floating: "floating-point numbers"}
ANY = "any"  # size
SPLITS = ("train", "val", "test")


def read(data: DataConfig, seed: int) -> Meshes:
    """`seed` draws the images for validation where the file names none (data.val_fraction), and those for training
    where data.max_train_samples limits them.

    Raises:
        DataError: a file that is missing, damaged, or unlike what docs/mesh.md says.
    """
    root = existing_root(data, f"{FILE} and the images that it names")
    found = read_arrays(root / FILE)
    files = Files(root, found["files"].tolist(), data.channels)
    for row in range(0, len(files), 1 + len(files) // SAMPLE):  # on a network more would take long
        with damage_named(files.path(row)), Image.open(files.path(row)) as picture:
            if picture.width != picture.height:
                raise ValueError(f"it has {picture.width} x {picture.height} pixels and must be square")
    images = decoded(files, data) if data.in_memory else files
    vertices, points = (torch.from_numpy(found[key].astype(np.float32)) for key in ("vertices", "points"))
    whole = Split(images, torch.arange(len(files)), vertices, points)
    train, val, test = (whole.subset(torch.from_numpy(np.flatnonzero(found["split"] == name))) for name in SPLITS)
    held = 0 if len(val) else round(data.val_fraction * len(train))
    count = len(train) - held if data.max_train_samples is None else data.max_train_samples
    if not 0 < count <= len(train) - held or not len(test):
        raise DataError(
            f"{root / FILE} has {len(train)} images for training and {len(test)} for test; data.max_train_samples="
            f"{data.max_train_samples} and data.val_fraction={data.val_fraction} must leave some"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive_seed("mesh folder", seed)))
    val = train.subset(order[:held].sort().values) if held else val if len(val) else None
    train = train.subset(order[held : held + count].sort().values)
    return Meshes(Body(*(found[key] for key in BODY)), train, val, test)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays, with shapes and indices that fit one another, and finite numbers.

    Raises:
        DataError: not so.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            found = dict(content)
    except FileNotFoundError:
        raise DataError(f"no file {file.absolute()}; docs/mesh.md says what it holds") from None
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no .npz file of plain arrays, or damaged: {error}. Restore it") from None
    vertices, points, samples = (len(np.atleast_1d(found.get(key, 0))) for key in ("template", "regressor", "files"))
    shapes = {"template": (vertices, 3), "regressor": (points, vertices), "hips": (2,), "middle": (ANY,)}
    shapes |= {"coarse": (ANY,), "files": (samples,), "split": (samples,), "vertices": (samples, vertices, 3)}
    shapes |= {"faces": (ANY, 3), "points": (samples, points - 1, 3)}
    found.setdefault("faces", np.zeros((0, 3), dtype=np.int64))
    found.setdefault("points", np.zeros(shapes["points"], dtype=np.float32))
    for key, shape in shapes.items():
        if key not in found:
            raise DataError(f"{file} lacks the array {key}; docs/mesh.md says what it holds")
        if fault := fault_of(found[key], KINDS.get(key, np.floating), shape, points - 1 if key == "hips" else vertices):
            raise DataError(f"{file}: {key} {fault}")
    if unknown := set(found["split"].tolist()) - set(SPLITS):
        raise DataError(f"{file}: split has {min(unknown)!r}; it must be {', '.join(SPLITS)}")
    names, counts = np.unique(found["files"], return_counts=True)
    if counts.max() > 1:
        raise DataError(f"{file} names {names[counts.argmax()]} {counts.max()} times; each image has one mesh")
    return found


def fault_of(array: np.ndarray, kind: type, shape: tuple, count: int) -> str:
    """What is wrong with an array; integers are indices into so many. Empty if nothing is."""
    fits = array.ndim == len(shape) and all(want in (ANY, has) for want, has in zip(shape, array.shape, strict=True))
    if not fits or not np.issubdtype(array.dtype, kind):
        wanted = " x ".join(map(str, shape))
        return f"is {array.dtype.name} of shape {array.shape}; it must be {NAMES[kind]}, {wanted}"
    if kind is np.floating and not np.isfinite(array).all():
        return "has a value that is no finite number"
    if not array.size and shape != (ANY, 3):  # there may be no faces
        return "is empty"
    if kind is np.integer and array.size and not 0 <= array.min() <= array.max() < count:
        return f"has indices from {array.min()} to {array.max()}; there are {count}, counted from 0"
    return ""
