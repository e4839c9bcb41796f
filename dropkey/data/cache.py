"""Decoded image files as one uint8 array, kept as a .npy file in ~/.cache/dropkey (or $DROPKEY_CACHE).

The file name is a hash of everything that the pixels depend on; a CRC-32 of four bytes follows the array. The directory
is the user's own: in one that others may write to, links are not followed and others' files not read.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from dropkey.config.schema import DataConfig
from dropkey.data.augment import EvalPicture
from dropkey.data.images import Files, Pixels
from dropkey.data.reading import Decoding, Request
from dropkey.errors import DataError, explained

FORMAT = 1  # raise when decoding changes: old files are then not found
LIMIT = 8 * 2**30  # bytes
CHUNK = 256  # images that a worker decodes at a time

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    return Path(os.environ.get("DROPKEY_CACHE") or Path.home() / ".cache" / "dropkey").expanduser()


def decoded(files: Files, data: DataConfig) -> Pixels:
    """All images at data.image_size, from the cache where it has them.

    Raises:
        DataError: an unreadable image, or more than 8 GiB of pixels.
    """
    shape = (len(files), data.channels, data.image_size, data.image_size)
    require_room(shape)

    def decode_all() -> np.ndarray:
        log.info("decoding %d images once, such as %s", len(files), files.path(0))
        return _decode(files, data, shape)

    return Pixels(cached_array(f"{fingerprint(files, data.image_size)}.npy", shape, decode_all), files)


def cached_array(name: str, shape: tuple[int, ...] | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The uint8 array of that file in the cache (shape None: of any); if it has none, one that `make` makes for it."""
    path = cache_directory() / name
    if not is_own_directory(path.parent):
        return make()
    with file_lock(path):
        array = _read(path, shape)
        if array is None:
            array = make()
            _write(path, array)
    return array


def is_own_directory(path: Path) -> bool:
    """Makes the directory; whether this user may trust it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = "" if path.stat().st_uid == os.geteuid() else "it belongs to another user"
    except OSError as error:
        reason = explained(error)
    if reason:
        log.warning("decoded images are not cached: cannot write in %s (%s); DROPKEY_CACHE=... moves it", path, reason)
    return not reason


def require_room(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape, dtype=np.int64))
    if size > LIMIT:
        raise DataError(
            f"{shape[0]} images of {shape[1]} x {shape[2]} x {shape[3]} need {size / 2**30:.1f} GiB in memory, more "
            f"than {LIMIT / 2**30:.0f}; set data.in_memory=false"
        )


def fingerprint(files: Files, image_size: int) -> str:
    """Changes with any file's path, size or modification time, and with the image size and channels."""
    digest = hashlib.sha256(json.dumps([FORMAT, image_size, files.channels]).encode())
    for part in files.stamp():
        digest.update(part)
    return digest.hexdigest()[:32]


def _decode(files: Files, data: DataConfig, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, dtype=np.uint8)
    requests = [Request(rows) for rows in torch.arange(len(files)).split(CHUNK)]
    reader = Decoding(files, EvalPicture(data.image_size), data.num_workers, torch.device("cpu"))
    try:
        for request, images in zip(requests, reader.read(requests), strict=True):
            array[int(request.rows[0]) :][: len(images)] = images.numpy()
    finally:
        reader.close()
    return array


def _read(path: Path, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """The array, memory-mapped so that processes share it; None if there is none or it is damaged."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ValueError("it is no file of this user")
        array = np.lib.format.open_memmap(path, mode="c")  # c: torch wants writable, the file stays as it is
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            checksum = int.from_bytes(file.read(4), "little")
        if array.dtype == np.uint8 and shape in (None, array.shape) and zlib.crc32(array) == checksum:
            return array
        reason = "checksum or shape is wrong"
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged header makes numpy raise what its parser happens to
        reason = str(error)
    log.warning("cache file %s is damaged (%s); reading the images again", path, reason)
    return None


def _write(path: Path, array: np.ndarray) -> None:
    """Written atomically. If the cache cannot be written, the run goes on without it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
            file.write(zlib.crc32(array).to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        log.warning("decoded images are not cached: cannot write %s (%s)", path, explained(error))
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process creates `path` while the others wait; where file locks do not work, each creates it for itself."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        except OSError as error:
            log.warning("cannot lock %s (%s)", path, explained(error))
        yield
