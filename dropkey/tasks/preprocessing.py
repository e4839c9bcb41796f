"""An image from anywhere, as evaluation in training would see it."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dropkey.config.schema import DataConfig
from dropkey.data.augment import Normalize
from dropkey.data.images import convert, open_image, resize_center_crop, to_tensor

Picture = str | Path | Image.Image


class ImageTransform:
    """An image as the model takes it, to the bit what evaluation in training makes of it: converted to grey or RGB,
    shorter side resized (bicubic), centre cropped, normalised."""

    def __init__(self, data: DataConfig):
        self.channels, self.image_size, self.crop_pct = data.channels, data.image_size, data.crop_pct
        self.normalize = Normalize(data, torch.device("cpu"))

    def __call__(self, image: Picture) -> Tensor:
        """A path or a PIL image -> float32 C H W on the CPU. DataError names a file that cannot be read."""
        if not isinstance(image, Image.Image):
            image = open_image(str(image), self.channels)
        picture = resize_center_crop(convert(image, self.channels), self.image_size, self.crop_pct)
        return self.normalize(to_tensor(picture))
