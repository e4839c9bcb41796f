"""CIFAR-100 (Krizhevsky, 2009): as CIFAR-10, in 100 classes."""

from torchvision.datasets import CIFAR100

from dropkey.config.schema import DataConfig
from dropkey.data.splits import RawSplits
from dropkey.datasets.cifar10 import read_cifar


def read(data: DataConfig) -> RawSplits:
    return read_cifar(CIFAR100, data)
