"""timm's random resized crop and RandAugment for whole batches, on the device.

Equal in distribution to timm's transforms of single pictures, and each operation to Pillow's (dropkey.data.operations).
All numbers are drawn on the CPU for the global batch of an optimizer step; a microbatch takes its rows of them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.data.auto_augment import NAME_TO_OP, RandAugment
from torch import Tensor

from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data import operations
from dropkey.data.augment import rand_augment
from dropkey.data.images import to_device
from dropkey.errors import ConfigError
from dropkey.seeds import derive_seed

ATTEMPTS = 10  # at a box inside the image; then timm takes the whole image
RATIO = (math.log(3 / 4), math.log(4 / 3))  # of a box, width / height
NONE = -1  # an operation that is passed over
ENTRIES = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}  # of an affine matrix
FACTORS = {  # functions of timm, by name, and what computes them from their argument alone
    **dict.fromkeys(("color", "desaturate"), operations.color),
    **{"sharpness": operations.sharpness},
    **dict.fromkeys(("gaussian_blur", "gaussian_blur_rand"), operations.gaussian_blur),
}


def either(level: Tensor, uniform: Tensor) -> Tensor:
    """With a sign by chance."""
    return torch.where(uniform > 0.5, -level, level)


def factor(level: Tensor, uniform: Tensor, unused: dict) -> Tensor:
    return level * 1.8 + 0.1


def increasing_factor(level: Tensor, uniform: Tensor, unused: dict) -> Tensor:
    return (1 + either(level * 0.9, uniform)).clamp(min=0.1)


ENHANCERS = ("Color", "Contrast", "Brightness", "Sharpness")
ARGUMENTS = {  # timm's LEVEL_TO_ARG of tensors: level = magnitude / 10, a uniform number each, timm's hparams
    **dict.fromkeys(ENHANCERS, factor),
    **{f"{name}Increasing": increasing_factor for name in ENHANCERS},
    "Rotate": lambda level, uniform, _: either(level * 30, uniform),
    "ShearX": lambda level, uniform, _: either(level * 0.3, uniform),
    "ShearY": lambda level, uniform, _: either(level * 0.3, uniform),
    "TranslateX": lambda level, uniform, given: either(level * given["translate_const"], uniform),
    "TranslateY": lambda level, uniform, given: either(level * given["translate_const"], uniform),
    "TranslateXRel": lambda level, uniform, _: either(level * 0.45, uniform),
    "TranslateYRel": lambda level, uniform, _: either(level * 0.45, uniform),
    "Posterize": lambda level, *_: (level * 4).floor(),
    "PosterizeIncreasing": lambda level, *_: 4 - (level * 4).floor(),
    "PosterizeOriginal": lambda level, *_: (level * 4).floor() + 4,
    "Solarize": lambda level, *_: (level * 256).floor().clamp(max=256),
    "SolarizeIncreasing": lambda level, *_: 256 - (level * 256).floor().clamp(max=256),
    "SolarizeAdd": lambda level, *_: (level * 110).floor().clamp(max=128),
    "Desaturate": lambda level, *_: 1 - (0.5 + 0.5 * level).clamp(max=1),
    "GaussianBlur": lambda level, *_: (0.1 + 1.9 * level).clamp(max=2),
    "GaussianBlurRand": lambda level, uniform, _: 0.1 + (2 * level.clamp(max=1) - 0.1) * uniform,
}


class DeviceAugment:
    """uint8 B C H W -> the same: random resized crop if `crop`, then RandAugment, where `augment` asks for them.

    Raises:
        ConfigError: a policy that timm refuses.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int, device: torch.device, *, crop: bool):
        self.crop = RandomBoxes(data, augment, device) if crop and augment.crop_scale is not None else None
        self.layers = BatchRandAugment(data, augment, device) if augment.rand_augment is not None else None
        self.seed = seed

    def draw(self, epoch: int, step: int, batch: int) -> list[Tensor]:
        """float64 (batch, columns) on the CPU, for the crop and each layer: what happens to the images of an optimizer
        step's global batch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment pictures", epoch, step))
        uniform = partial(torch.rand, batch, dtype=torch.float64, generator=generator)
        return [plan for part in (self.crop, self.layers) if part is not None for plan in part.draw(uniform)]

    def __call__(self, images: Tensor, plans: list[Tensor], own: slice) -> Tensor:
        """`own`: the rows of the plans for these images, which may be changed in place."""
        plans = [plan[own] for plan in plans]
        if self.crop is not None:
            images = self.crop(images, plans.pop(0))
        for plan in plans:
            self.layers(images, plan)
        return images


def _cubic(uniform: Callable[[int], Tensor], augment: AugmentConfig) -> Tensor:
    draws = uniform(1)
    return (draws < 0.5).double() if augment.interpolation == "random" else torch.ones_like(draws)


class RandomBoxes:
    """A plan's columns: top, left, height, width, bicubic. Images are square already."""

    def __init__(self, data: DataConfig, augment: AugmentConfig, device: torch.device):
        self.size, self.augment, self.device = data.image_size, augment, device

    def draw(self, uniform: Callable[[int], Tensor]) -> list[Tensor]:
        (low, high), size = self.augment.crop_scale, self.size
        area = (low + (high - low) * uniform(ATTEMPTS)) * size**2
        ratio = (RATIO[0] + (RATIO[1] - RATIO[0]) * uniform(ATTEMPTS)).exp()
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round().clamp_(min=1)
        sides = torch.cat([sides, torch.full_like(sides[:, :1], size)], 1)
        first = (sides <= size).all(2).int().argmax(1)
        side = sides[torch.arange(len(sides)), first]
        return [torch.cat([(uniform(2) * (size - side + 1)).floor(), side, _cubic(uniform, self.augment)], 1)]

    def __call__(self, images: Tensor, plan: Tensor) -> Tensor:
        boxes = to_device(plan.float(), self.device)
        return operations.resized_crop(images, boxes[:, :4], self.size, boxes[:, 4] > 0)


class BatchRandAugment:
    """A plan's columns, of which each layer has its own: number of the operation, argument, bicubic."""

    def __init__(self, data: DataConfig, augment: AugmentConfig, device: torch.device):
        policy: RandAugment = rand_augment(augment.rand_augment, data, augment.interpolation)
        self.layers, self.ops, self.odds = policy.num_layers, policy.ops, policy.choice_weights
        self.size, self.augment, self.device = data.image_size, augment, device
        possible = self.layers if self.odds is None else int((self.odds > 0).sum())
        if self.layers > possible:
            raise ConfigError(f"augment.rand_augment={augment.rand_augment}: it has {possible} operations to choose of")
        fill = self.ops[0].kwargs["fillcolor"]
        self.fill = torch.tensor(fill if isinstance(fill, tuple) else [fill], dtype=torch.uint8, device=device)
        self.functions = [NAME_TO_OP[operation.name].__name__ for operation in self.ops]
        self.groups = self.grouped()

    def grouped(self) -> dict[Callable, list[int]]:
        """What computes an operation -> the numbers of those that it computes together."""
        groups = {}
        geometry = {moves: partial(self._geometry, moves) for moves in ("x", "y", "xy")}
        for number, function in enumerate(self.functions):
            alike = self._tables if function in operations.TABLES else FACTORS.get(function)
            alike = alike or geometry["xy" if function == "rotate" else function.split("_")[1]]
            groups.setdefault(alike, []).append(number)
        return groups

    def draw(self, uniform: Callable[[int], Tensor]) -> list[Tensor]:
        if self.odds is None:  # with replacement
            chosen = (uniform(self.layers) * len(self.ops)).long()
        else:  # without: the next is who waits the shortest time
            chosen = (-uniform(len(self.ops)).log() / torch.from_numpy(self.odds)).argsort(1)[:, : self.layers]
        return [self._layer(chosen[:, layer], uniform) for layer in range(self.layers)]

    def _layer(self, chosen: Tensor, uniform: Callable[[int], Tensor]) -> Tensor:
        happens, noise, other = uniform(3).unbind(1)
        common = self.ops[0]  # magnitude and probability are the same in all
        magnitude = torch.full_like(noise, common.magnitude)
        if common.magnitude_std == math.inf:
            magnitude *= noise
        elif common.magnitude_std > 0:
            magnitude += common.magnitude_std * torch.special.ndtri(noise)
        level = magnitude.clamp(0, common.magnitude_max or 10) / 10
        argument = torch.zeros_like(level)
        for number, operation in enumerate(self.ops):
            if operation.level_fn is not None:
                rows = chosen == number
                argument[rows] = ARGUMENTS[operation.name](level[rows], other[rows], operation.hparams)
        number = torch.where(happens > common.prob, NONE, chosen).double()
        return torch.cat([number[:, None], argument[:, None], _cubic(uniform, self.augment)], 1)

    def __call__(self, images: Tensor, plan: Tensor) -> None:
        """In place."""
        for compute, numbers in self.groups.items():
            rows = torch.isin(plan[:, 0], torch.tensor(numbers)).nonzero().squeeze(1)
            if len(rows):
                there = to_device(rows, self.device)
                how = to_device(plan[rows, 1].float(), self.device) if compute in FACTORS.values() else plan[rows]
                images.index_copy_(0, there, compute(images.index_select(0, there), how))

    def _tables(self, images: Tensor, plan: Tensor) -> Tensor:
        tables = torch.empty(*images.shape[:2], 256, dtype=torch.uint8, device=self.device)
        for function, rows, arguments in self._each(plan):
            there = to_device(rows, self.device)
            some = operations.TABLES[function](images.index_select(0, there), to_device(arguments.float(), self.device))
            tables.index_copy_(0, there, some.byte().expand(-1, images.shape[1], -1))
        return operations.look_up(images, tables)

    def _geometry(self, moves: str, images: Tensor, plan: Tensor) -> Tensor:
        matrices = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(plan), 1)
        for function, rows, arguments in self._each(plan):
            if function == "rotate":
                matrices[rows] = rotation(arguments, self.size)
            else:
                scale = self.size if function.endswith("_rel") else 1
                matrices[rows, ENTRIES[function.removesuffix("_abs").removesuffix("_rel")]] = arguments * scale
        there = to_device(torch.cat([matrices, plan[:, 2:]], 1).float(), self.device)
        return operations.affine(images, there[:, :6], there[:, 6] > 0, self.fill, moves)

    def _each(self, plan: Tensor):
        """(function, rows, arguments) of each operation in a plan."""
        for number in plan[:, 0].unique().long().tolist():
            rows = (plan[:, 0] == number).nonzero().squeeze(1)
            yield self.functions[number], rows, plan[rows, 1]


def rotation(degrees: Tensor, size: int) -> Tensor:
    """float64 (B, 6): affine matrices that turn images about their centre."""
    cos, sin, centre = torch.cos(degrees.deg2rad()), -torch.sin(degrees.deg2rad()), size / 2
    return torch.stack([cos, sin, centre * (1 - cos - sin), -sin, cos, centre * (1 + sin - cos)], 1)
