"""Checkpoints: written atomically, verified, loadable without running code; the previous one is kept."""

import contextlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Callable, Optional

import torch

from dropkey.errors import StorageError
from dropkey.records import replace_file

FORMAT = 1  # of the state's layout


def verify(path: Path) -> None:
    """Compares every record of the file with its CRC-32.

    Raises:
        StorageError: the file is cut short or altered.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (
        Exception
    ) as error:  # BadZipFile, zlib.error, struct.error, UnicodeDecodeError: whatever flipped bits lead to
        raise StorageError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if broken is not None:
        raise StorageError(f"{path} is damaged: checksum of {broken} is wrong")


def save(state: dict, path: Path, *, keep_previous: bool = False) -> None:
    """Writes `state` (tensors and plain Python only) to `path`, atomically; see `replace_file`.

    With `keep_previous`, the old file is kept as previous.pt.
    """

    link = path.with_name(".previous")

    def verify_and_keep(temporary: Path) -> None:
        verify(temporary)
        if keep_previous and path.exists():
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # a second name, so that a checkpoint exists at every moment
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)

    replace_file(path, lambda file: torch.save({"format": FORMAT, **state}, file), verify_and_keep)
    if keep_previous and link.exists():  # now, as the old file may be damaged and previous.pt the last intact one
        with contextlib.suppress(OSError):  # the new file is safe
            os.replace(link, path.with_name("previous.pt"))


def is_old_format(path: Path) -> bool:
    """Whether the file begins as torch wrote checkpoints before 1.6: a bare pickle, which carries no checksums."""
    with open(path, "rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def load(path: Path) -> dict:
    """The state in `path`, on the CPU.

    Raises:
        StorageError: missing, damaged, or with anything but tensors and plain Python inside (its code is not run).
    """
    path = Path(path)
    if not path.exists():
        raise StorageError(f"{path} does not exist")
    if not is_old_format(path):
        verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StorageError(f"{path} is refused: {reason}") from None


def load_last(directory: Path, info: Callable[[str], None]) -> Optional[dict]:
    """The newest intact checkpoint of a run, or None if it has none.

    Raises:
        StorageError: there are checkpoints and all are damaged.
    """
    problems = []
    for name in ("last.pt", "previous.pt"):
        if (directory / name).exists():
            try:
                state = load(directory / name)
            except StorageError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                info(f"{problem}; going back to {name}")
            return state
    if problems:
        raise StorageError(f"{'; '.join(problems)}; no intact checkpoint is left, start over with overwrite=true")
    return None


def remove_temporaries(directory: Path) -> None:
    """Deletes the half-written files of a killed process."""
    for leftover in [*directory.glob(".*.pt.*"), *directory.glob(".previous")]:
        with contextlib.suppress(OSError):
            leftover.unlink()
