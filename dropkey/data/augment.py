"""Augmentation in two stages. Every random number is derived from the run's seed and the image's place in the epoch.

1. Pictures, in the decoding workers: random resized crop of timm. Images in memory are cropped by
   dropkey.data.device_augment.
2. Batches, on the device: RandAugment (dropkey.data.device_augment), mirror, padded crop, normalisation, timm's random
   erasing; then mixup or cutmix of timm, or the erasing last.
Images in memory and images decoded on demand share the second stage, so `data.in_memory` does not change it.
Shape letters: B images, C channels, H and W height and width.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data.images import resize_center_crop, to_device, to_tensor
from dropkey.errors import ConfigError
from dropkey.seeds import derive_seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch (CPU), and restores their state afterwards."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class EvalPicture:
    """Resize the shorter side, then crop the centre."""

    def __init__(self, size: int, crop: float = 1.0):
        self.size, self.crop = size, crop

    def __call__(self, picture: Image.Image, key: tuple) -> Image.Image:
        return resize_center_crop(picture, self.size, self.crop)


class TrainPicture:
    """timm's random resized crop, or resize and centre crop; `key` holds the parts of this picture's seed."""

    def __init__(self, data: DataConfig, augment: AugmentConfig):
        self.size, self.scale = data.image_size, augment.crop_scale
        self.interpolations = ("bilinear", "bicubic") if augment.interpolation == "random" else ("bicubic",)

    def __call__(self, picture: Image.Image, key: tuple) -> Image.Image | torch.Tensor:
        if self.scale is None:
            return resize_center_crop(picture, self.size)
        with seeded(derive_seed(*key)):
            box = RandomResizedCropAndInterpolation.get_params(picture, self.scale, (3 / 4, 4 / 3))
            return resized_crop(picture, box, self.size, random.choice(self.interpolations))


def resized_crop(picture: Image.Image, box: tuple[int, int, int, int], size: int, interpolation: str) -> torch.Tensor:
    """uint8 C H W, antialiased. torch resizes several times as fast as Pillow; single pixels are a level apart."""
    top, left, height, width = box
    pixels = to_tensor(picture.crop((left, top, left + width, top + height)))
    return F.interpolate(pixels[None], (size, size), mode=interpolation, antialias=True)[0]


def rand_augment(policy: str, data: DataConfig, interpolation: str = "bicubic"):
    """timm's RandAugment; uncovered corners are filled with the data's mean colour. ConfigError if timm refuses it."""
    fill = tuple(min(255, round(255 * value)) for value in per_channel(data.mean, data.channels))
    hparams = {
        "translate_const": int(data.image_size * 0.45),  # pixels, as in DeiT
        "img_mean": fill if data.channels == 3 else fill[0],
    }
    if interpolation == "bicubic":  # else timm draws bilinear or bicubic
        hparams["interpolation"] = Image.Resampling.BICUBIC
    try:
        transform = rand_augment_transform(policy, hparams)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augment.rand_augment={policy} is not a RandAugment policy of timm, such as rand-m9-mstd0.5-inc1"
        ) from error
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = posterize_to_black
    return transform


def posterize_to_black(picture: Image.Image, bits: int, **unused) -> Image.Image:
    """timm's strongest posterize keeps 0 bits, which is black; Pillow 13 and later refuse that."""
    return posterize(picture, bits) if bits > 0 else Image.new(picture.mode, picture.size)


def per_channel(values, channels: int):
    """Mean or std as one float per channel; null means 0.5."""
    values = [0.5] if values is None else list(values)
    return values * channels if len(values) == 1 else values


class Normalize:
    """uint8 B C H W -> float32 B C H W: (x / 255 - mean) / std."""

    def __init__(self, data: DataConfig, device: torch.device):
        mean, std = (torch.tensor(per_channel(v, data.channels), dtype=torch.float64) for v in (data.mean, data.std))
        self.shift = (mean * 255).float().view(-1, 1, 1).to(device)
        self.scale = (1 / (std * 255)).float().view(-1, 1, 1).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(self.shift).mul_(self.scale)


def denormalized(images: torch.Tensor, data: DataConfig) -> torch.Tensor:
    """The inverse of `Normalize`, in [0, 1]."""
    mean, std = (torch.tensor(per_channel(v, data.channels)).view(-1, 1, 1) for v in (data.mean, data.std))
    return (images * std + mean).clamp(0, 1)


class BatchAugment:
    """uint8 B C H W -> float32 B C H W: mirror, crop out of a border, normalise; and `erase_some`.

    The numbers it needs are a row of `draw` and a seed per image, so a batch may be cut into microbatches at will.
    """

    COLUMNS = 4

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int, device: torch.device):
        self.normalize = Normalize(data, device)
        self.hflip, self.padding, self.black = augment.hflip, augment.crop_padding, augment.border == "black"
        self.size, self.channels, self.seed, self.device = data.image_size, data.channels, seed, device
        self.erasing = augment.random_erasing
        self.erase = RandomErasing(probability=1.0, mode="pixel", device=device)
        if device.type == "cuda":  # where the noise comes from; the training loop seeds it again before each microbatch
            self.generator = torch.cuda.default_generators[device.index or 0]
        else:
            self.generator = torch.default_generator

    def draw(self, epoch: int, step: int, batch: int) -> torch.Tensor:
        """float64 (batch, COLUMNS) in [0, 1) on the CPU, for the global batch of one optimizer step."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment batch", epoch, step))
        return torch.rand(batch, self.COLUMNS, dtype=torch.float64, generator=generator)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        flip, down, right, _ = draws.unbind(1)
        mirrored = flip < self.hflip
        if self.hflip or self.padding > 0:
            steps = 2 * self.padding + 1
            images = self._shift(images, mirrored, (down * steps).long(), (right * steps).long())
        return self.normalize(images)

    def erase_some(self, images: torch.Tensor, draws: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        """In place, with noise. `position` is that of the first image in the epoch."""
        erase = draws[:, 3]
        if self.erasing > 0:
            with seeded(0):  # leaves the generators of the host as they were
                for index in (erase < self.erasing).nonzero().flatten().tolist():
                    image_seed = derive_seed(self.seed, "erasing", epoch, position + index)
                    random.seed(image_seed)
                    self.generator.manual_seed(image_seed)
                    self.erase(images[index])  # in place
        return images

    def _shift(self, images, mirrored, down, right):
        """The window `down` and `right` pixels into the image with its border, then mirrored.

        The border is never built: indices reach back into the image.
        """
        here = torch.arange(self.size)
        places = here + down[:, None] - self.padding
        if self.padding > 0:  # whole lines of pixels first: index_select copies them many times faster than gather
            rows = to_device(self._reflect(places), self.device)
            planes = torch.arange(images.shape[0] * self.channels, device=self.device).view(-1, self.channels, 1)
            lines = (planes * self.size + rows[:, None, :]).flatten()
            images = images.reshape(-1, self.size).index_select(0, lines).view(images.shape)
        columns = torch.where(mirrored[:, None], here.flip(0), here)
        columns = columns + right[:, None] - self.padding
        found = to_device(self._reflect(columns), self.device)
        images = images.gather(3, found[:, None, None, :].expand_as(images))
        if self.black and self.padding > 0:
            above, beside = (to_device((one < 0) | (one >= self.size), self.device) for one in (places, columns))
            images.masked_fill_(above[:, None, :, None] | beside[:, None, None, :], 0)
        return images

    def _reflect(self, index):
        last = self.size - 1
        return last - (last - index.abs()).abs()


class Mix:
    """Mixup or cutmix of a microbatch, and label smoothing. Targets stay class ids (int64) where none of them is on,
    else they become float32 B x classes, each row with sum 1."""

    def __init__(self, augment: AugmentConfig, classes: int):
        self.classes, self.smoothing, self.mixup = classes, augment.label_smoothing, None
        if augment.mixup_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0):
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=classes,
            )

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, *key):
        if self.mixup is not None:
            with seeded(derive_seed(*key)):
                return self.mixup(images, targets)
        if self.smoothing > 0:
            return images, mixup_target(targets, self.classes, smoothing=self.smoothing)
        return images, targets
