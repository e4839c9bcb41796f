"""An image from anywhere, as evaluation in training would see it."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dropkey import shapes
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
        picture = resize_center_crop(opened(image, self.channels), self.image_size, self.crop_pct)
        return self.normalize(to_tensor(picture))


def opened(image: Picture, channels: int) -> Image.Image:
    """As 8-bit grey or RGB. DataError names a file that cannot be read."""
    return convert(image if isinstance(image, Image.Image) else open_image(str(image), channels), channels)


def info_fault(info: dict) -> str:
    """What is wrong with what was read back of a model of images with named classes; "" if nothing is."""
    usable = {
        **{"architecture": str, "num_classes": int, "label_names": [str], "model_args": dict},
        "pretrained_cfg": {"input_size": [int], "mean?": [shapes.NUMBER], "std?": [shapes.NUMBER]},
    }
    if wrong := shapes.problem(info, usable):
        return wrong
    names, size = info["label_names"], info["pretrained_cfg"]["input_size"]
    if len(names) != info["num_classes"]:
        return f"it has {len(names)} label_names for {info['num_classes']} classes"
    return "" if len(size) == 3 and min(size) > 0 else f"pretrained_cfg.input_size is {size}, not C H W"
