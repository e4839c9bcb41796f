"""Image stores: files that are decoded on demand, or decoded images in memory.

Both have a length and return one image as a PIL picture of `channels` channels.
Shape letters: N images, C channels, H and W height and width (always equal after `fit`).
"""

import errno
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from dropkey.errors import DataError, Interrupted

SAMPLE, TAIL = 5_000, 4_096  # files whose content counts in `Files.content`, and how many bytes of each
MODES = {1: "L", 3: "RGB"}  # PIL's name for so many 8-bit channels


class Files:
    """Image files below `root`, decoded when asked for.

    `places`: uint64 (N,), the same for the same file under two names, to find images that are in two splits.
    """

    def __init__(self, root: Path, names: list[str], channels: int, places: np.ndarray | None = None):
        self.root = Path(root)
        # One array of bytes: a list of a million strings would be copied into every worker by reference counting.
        self.names = np.array([os.fsencode(name) for name in names])
        self.channels, self.places = channels, places

    def __len__(self) -> int:
        return len(self.names)

    def content(self) -> bytes:
        """Names, and of a fixed sample of the files sizes and last bytes: on a network each file takes a while."""
        digest = zlib.crc32(self.names.tobytes())
        for row in range(0, len(self), 1 + len(self) // SAMPLE):
            with open(self.path(row), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - TAIL, 0))
                digest = zlib.crc32(file.read() + size.to_bytes(8, "little"), digest)
        return self.names.tobytes() + digest.to_bytes(4, "little")

    def stamp(self) -> Iterator[bytes]:
        """Changes with any file's path, size or modification time."""
        yield os.fsencode(self.root.resolve())  # train/ and test/ may hold equal names, sizes and times
        for row, name in enumerate(self.names):
            status = os.stat(self.path(row))
            yield b"%b\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[row]))

    def picture(self, row: int) -> Image.Image:
        return open_image(self.path(row), self.channels)


class Pixels:
    """Decoded images: uint8, N C H W, and the files they are from. One copy per device, shared by all splits and
    loaders."""

    def __init__(self, images: np.ndarray, files: Files | None = None):
        self.images, self.files = torch.from_numpy(images), files
        self._on: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def content(self) -> bytes:
        return zlib.crc32(self.images.numpy()).to_bytes(4, "little")  # as fast as reading

    def on(self, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":
            return self.images
        if device not in self._on:
            self._on[device] = self.images.to(device)
        return self._on[device]

    def __getstate__(self) -> dict:  # worker processes decode; what lies on a GPU stays with the main process
        return {"images": self.images, "files": None, "_on": {}}

    def picture(self, row: int) -> Image.Image:
        return to_picture(self.images[row].numpy())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor, copied to the device without waiting for it (pageable memory would make CUDA wait)."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def to_picture(array_CHW: np.ndarray) -> Image.Image:
    if len(array_CHW) == 1:
        return Image.fromarray(array_CHW[0])
    return Image.fromarray(np.ascontiguousarray(array_CHW.transpose(1, 2, 0)))


def to_tensor(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    """uint8, C H W; a tensor as it is."""
    if isinstance(picture, torch.Tensor):
        return picture
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def open_image(path: str, channels: int) -> Image.Image:
    """Decodes a file and converts it to `channels` channels of 8 bits. DataError names a file that cannot be read."""
    with damage_named(path), open(path, "rb", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        return decode(file, channels)


def decode(file: BinaryIO, channels: int) -> Image.Image:
    with Image.open(file) as picture:
        picture.load()
        return convert(picture, channels)


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What goes wrong with an image, as a DataError that names it."""
    try:
        yield
    except (MemoryError, Interrupted):
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything: SyntaxError, struct.error, ...
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: nothing is wrong with this one
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is of no kind of image that Pillow knows"
        raise DataError(f"cannot read image {path}: {reason}. Restore the file or remove it") from error


def open_at_once(path: str, flags: int) -> int:
    """For `open`: a pipe without a writer does not block it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def convert(picture: Image.Image, channels: int) -> Image.Image:
    """To 8-bit grey or RGB. Transparency is dropped; 16-bit values are scaled (PIL would clip them)."""
    if picture.mode.startswith("I"):
        values = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)  # PIL reads some 16-bit PNG as 32-bit "I"
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if picture.mode == "P" or picture.mode == "PA":
        picture = picture.convert("RGBA")  # palettes with transparency make PIL warn on the direct way
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def resize_center_crop(picture: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """Resize the shorter side to size / crop (bicubic, antialiased), then cut out the size x size centre."""
    shorter = int(size / crop)
    if min(picture.size) != shorter:
        picture = resize(picture, shorter, InterpolationMode.BICUBIC)
    return picture if picture.size == (size, size) else center_crop(picture, size)
