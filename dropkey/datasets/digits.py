"""Digits: 1,797 grey images of 8 x 8 pixels in 10 classes, embedded in scikit-learn."""

import numpy as np

from dropkey.config.schema import DataConfig
from dropkey.data.splits import RawSplits, array_split


def read(data: DataConfig) -> RawSplits:
    from sklearn.datasets import load_digits  # takes a second to import

    images, targets = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)  # grey levels 0 to 16
    return RawSplits([str(digit) for digit in range(10)], array_split(images, targets, data), None, None)
