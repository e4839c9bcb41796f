"""CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes."""

from pathlib import Path

from torchvision.datasets import CIFAR10

from dropkey.config.schema import DataConfig
from dropkey.data.cache import file_lock
from dropkey.data.splits import RawSplits, array_split
from dropkey.errors import DataError


def read(data: DataConfig) -> RawSplits:
    return read_cifar(CIFAR10, data)


def read_cifar(source: type, data: DataConfig) -> RawSplits:
    """From torchvision's files under `data.root`, downloaded there where they are missing.

    Raises:
        DataError: they are missing or damaged, and were not downloaded.
    """
    place = Path(data.root, source.base_folder)
    how = f"download {source.url} and unpack it in {data.root}, or set data.root to where it is"
    try:
        train = source(data.root, train=True)
    except (RuntimeError, OSError):
        if not data.download:
            raise DataError(f"no intact {data.name} in {place} and data.download=false; {how}") from None
        try:
            with file_lock(place):
                train = source(data.root, train=True, download=True)
        except (RuntimeError, OSError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"no intact {data.name} in {place}, and its download failed ({reason}); {how}") from error
    test = source(data.root, train=False)
    splits = [array_split(part.data.transpose(0, 3, 1, 2), part.targets, data) for part in (train, test)]
    return RawSplits(list(train.classes), splits[0], None, splits[1])
