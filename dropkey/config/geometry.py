"""What the names of architectures imply: which there are, and how they cut an image into tokens. Imports no torch."""

import importlib.util
import math
import re
from functools import lru_cache
from pathlib import Path

from dropkey.config.schema import ModelConfig

SMALL_IMAGE = 96  # pixels; below, a patch of 16 leaves fewer than 6 x 6 tokens
SOFT_SPLITS = {"t2t_vit_small_image": ((3, 2, 1), (3, 2, 1))}  # kernel, stride, padding; all others:
IMAGENET_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def family(name: str) -> str:
    """The geometry that a model's name implies: vit, volo, t2t, ceit, or other, which is left to the model itself."""
    for prefix in ("t2t_vit", "volo", "ceit"):
        if name.startswith(prefix):
            return prefix.removesuffix("_vit")
    return "vit" if re.match(r"(vit|deit3?)_\w*patch\d+", name) else "other"


@lru_cache(maxsize=1)
def known_models() -> frozenset[str]:
    """Names of timm's registry and of ours, read from the source: importing timm takes 4 s, this 0.1 s."""
    folders = (Path(importlib.util.find_spec("timm").origin).parent, Path(__file__).parents[1])
    text = "\n".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("models/*.py"))
    timm, ours = r"^@register_model\s*\ndef (\w+)\(", r"^(\w+) = _?register\("
    return frozenset(re.findall(timm, text, re.MULTILINE) + re.findall(ours, text, re.MULTILINE))


def default_patch(name: str, image_size: int) -> int:
    """The patch in the name (VOLO 8, CeiT 16), or on small images one of 2 px or more for about 8 x 8 tokens."""
    if image_size >= SMALL_IMAGE:
        found = re.search(r"patch(\d+)", name)
        return int(found.group(1)) if found else {"ceit": 16}.get(family(name), 8)
    if family(name) in ("volo", "ceit"):
        return 4
    divisors = [size for size in range(2, image_size + 1) if image_size % size == 0]
    return min(divisors, default=1, key=lambda size: abs(image_size / size - 8))


def t2t_tokens(name: str, image_size: int) -> int:
    side = image_size
    for kernel, stride, padding in SOFT_SPLITS.get(name, IMAGENET_SPLITS):
        side = (side + 2 * padding - kernel) // stride + 1
    return max(side, 0) ** 2


def grid_side(model: ModelConfig, image_size: int, layers: list[str]) -> int | None:
    """Tokens on a side of the finest grid that these attention layers see; None: only the model itself knows."""
    kind = family(model.name)
    if kind == "t2t":
        return math.isqrt(t2t_tokens(model.name, image_size)) if "token" not in layers else None
    if kind == "volo":
        return image_size // model.patch_size // (1 if "outlook" in layers else 2)
    return image_size // model.patch_size if kind in ("vit", "ceit") else None
