"""Operations on batches of images, each with an argument per image, that give what Pillow gives for each image alone.

Images are uint8, B C H W with C = 1 or 3, in and out; arguments (B,) are on the same device. The point-wise operations
equal Pillow's exactly, the geometric ones up to single grey levels. An image's result does not depend on the others.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = (-1, 0, 1, 2)  # pixels in a row that bicubic interpolation looks at
STEPS = 2**15  # of resampling weights: sums of weight x pixel are then exact in float32, in any order


def luminance(images: Tensor) -> Tensor:
    """int32 B 1 H W, as Pillow converts to grey."""
    images = images.int()
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """From `base` (factor 0) to the images (1) and beyond; uint8."""
    base = base.float()
    return (base + factor.float().view(-1, 1, *[1] * (images.dim() - 2)) * (images - base)).clamp_(0, 255).byte()


def color(images: Tensor, factor: Tensor) -> Tensor:
    return blend(luminance(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    smooth, (height, width) = images.int(), images.shape[2:]
    around = sum(smooth[:, :, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
    centre = smooth[:, :, 1:-1, 1:-1]
    centre.copy_((2 * (around + 4 * centre) + 13).div_(26, rounding_mode="floor"))  # of 13 parts, rounded
    return blend(smooth, images, factor)


def gaussian_blur(images: Tensor, radius: Tensor) -> Tensor:
    """Three box blurs in each direction (Gwosdek et al., 2011), as Pillow does."""
    variance = radius.double().cpu() ** 2 / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    box = whole + part
    weights = (box[:, None] + 1 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1) / (2 * box[:, None] + 1)
    weights = weights.float().to(images.device).view(len(images), -1, 1, 1, 1).unbind(1)
    for _ in range(2):
        for _ in range(3):
            padded = F.pad(images.float(), (reach, reach, 0, 0), mode="replicate").unfold(3, images.shape[3], 1)
            images = sum(weight * padded[:, :, :, k] for k, weight in enumerate(weights)).add_(0.5).byte()
        images = images.transpose(2, 3)
    return images


# ------------------------------------------------------------------------------------- each grey level by itself


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """`tables`: uint8 (B, 1 or C, 256), the new value of each grey level."""
    tables = tables.expand(-1, images.shape[1], -1).flatten()
    return tables.index_select(0, _levels(images).flatten()).view(images.shape)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    lost = (8 - bits.int().clamp(0, 8)).view(-1, 1, 1)
    return _ramp(images) >> lost << lost


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    ramp = _ramp(images)
    return torch.where(ramp < threshold.view(-1, 1, 1), ramp, 255 - ramp)


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    ramp = _ramp(images)
    return torch.where(ramp < 128, (ramp + added.int().view(-1, 1, 1)).clamp_(max=255), ramp)


def invert(images: Tensor, unused: Tensor) -> Tensor:
    return (255 - _ramp(images)).expand(len(images), -1, -1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    ramp = _ramp(images)
    return blend(torch.zeros_like(ramp), ramp, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = luminance(images).flatten(1)
    pixels = grey.shape[1]
    mean = (2 * grey.sum(1) + pixels).div(2 * pixels, rounding_mode="floor")
    return blend(mean.view(-1, 1, 1), _ramp(images), factor)


def auto_contrast(images: Tensor, unused: Tensor) -> Tensor:
    """Stretches each channel to 0 ... 255."""
    exact = torch.float32 if images.device.type == "mps" else torch.float64  # which MPS lacks
    low, high = (bound.to(exact)[..., None] for bound in images.flatten(2).aminmax(dim=2))
    ramp, scale = _ramp(images), torch.full_like(high, 255) / (high - low)  # 255 / x would be 255 * (1 / x)
    return torch.where(high > low, (ramp * scale + -low * scale).clamp_(0, 255).int(), ramp)


def equalize(images: Tensor, unused: Tensor) -> Tensor:
    """Makes the histogram of each channel flat."""
    levels = _levels(images).flatten().long()
    count = torch.zeros(images.shape[0] * images.shape[1] * 256, dtype=torch.int32, device=images.device)
    count = count.scatter_add_(0, levels, torch.ones_like(levels, dtype=torch.int32)).view(*images.shape[:2], 256)
    brightest = images.flatten(2).amax(2, keepdim=True).long()
    step = (count.sum(2, keepdim=True) - count.gather(2, brightest)).div(255, rounding_mode="floor")
    below, safe = count.cumsum(2) - count, step.clamp(min=1)
    flat = (safe // 2 + below).div(safe, rounding_mode="floor").clamp_(max=255)
    return torch.where(step > 0, flat, _ramp(images))


TABLES = {f.__name__: f for f in (posterize, solarize, solarize_add, invert, brightness, contrast)}
TABLES |= {f.__name__: f for f in (auto_contrast, equalize)}


def _ramp(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.int32, device=images.device).view(1, 1, -1)


def _levels(images: Tensor) -> Tensor:
    """int32 (B * C, H * W): the place of each pixel's level among the tables of all channels."""
    planes = images.reshape(images.shape[0] * images.shape[1], -1)
    return planes.int() + 256 * torch.arange(len(planes), dtype=torch.int32, device=images.device)[:, None]


# ---------------------------------------------------------------------------------------------------- geometry


def affine(images: Tensor, matrices: Tensor, bicubic: Tensor, fill: Tensor, moves: str = "xy") -> Tensor:
    """The pixel at (x, y) is taken from (a x + b y + c, d x + e y + f), measured to pixel centres.

    Shapes: matrices float32 (B, 6); bicubic bool (B,), else bilinear; fill uint8 (C,), for what is from outside.
    `moves`: x or y where pixels move in that direction only, which is quicker.
    """
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    across, down = a * x + b * y + c, d * x + e * y + f
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    left, top = (across - 0.5).floor(), (down - 0.5).floor()
    right_by, down_by = (across - 0.5 - left)[:, None], (down - 0.5 - top)[:, None]
    cubic, planes = bicubic.view(-1, 1, 1, 1), images.flatten(2).float()
    columns = [(left.int() + tap).clamp_(0, width - 1) for tap in (TAPS if "x" in moves else (0,))]
    lines = []
    for tap in TAPS if "y" in moves else (0,):
        start = (top.int() + tap).clamp_(0, height - 1) * width
        places = torch.stack([start + column for column in columns], 1).view(count, 1, -1).long()
        pixels = planes.gather(2, places.expand(-1, channels, -1)).view(count, channels, -1, height, width)
        lines.append(_between(pixels.unbind(2), right_by, cubic))
    values = _between(lines, down_by, cubic).clamp_(0, 255).byte()
    return torch.where(outside[:, None], fill.view(1, -1, 1, 1), values)


def _between(pixels: Sequence[Tensor], by: Tensor, cubic: Tensor) -> Tensor:
    """Of four, `by` of the way from the second to the third."""
    if len(pixels) == 1:
        return pixels[0]
    p, q, r, s = pixels
    curve = 2 * (p - q) + r - s + by * (q - p + s - r)
    return q + by * torch.where(cubic, r - p + by * curve, r - q)


def resized_crop(images: Tensor, boxes: Tensor, size: int, bicubic: Tensor) -> Tensor:
    """Boxes int (B, 4): top, left, height, width. Antialiased; bool bicubic (B,), else bilinear."""
    top, left, height, width = boxes.view(-1, 4, 1, 1).float().unbind(1)
    across = _resampling(left, width, images.shape[3], size, bicubic)
    down = _resampling(top, height, images.shape[2], size, bicubic)
    lines = _to_levels(images.float().flatten(1, 2) @ across.mT).unflatten(1, images.shape[1:3])
    return _to_levels(down[:, None] @ lines).byte()


def _resampling(start: Tensor, length: Tensor, given: int, size: int, bicubic: Tensor) -> Tensor:
    """float32 (B, size, given): the weight of each pixel of a line in each new one."""
    pixel = torch.arange(given, device=start.device) - start
    scale = length / size
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    cubic = torch.where(x < 1, near, far) * (x < 2)
    weights = torch.where(bicubic.view(-1, 1, 1), cubic, (1 - x).clamp(min=0)) * ((pixel >= 0) & (pixel < length))
    return (weights / weights.sum(2, keepdim=True) * STEPS).round_() / STEPS


def _to_levels(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)
