"""How fast one core decodes and crops photographs, and how many cores it takes to feed eight GPUs.

The decoders take turns on the same files. Those that are not installed are left out: simplejpeg, PyTurboJPEG.
"""

import io
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from dropkey.config.check import require
from dropkey.config.compose import compose
from dropkey.config.schema import AugmentConfig, DataConfig
from dropkey.data import augment as augmentation
from dropkey.data.augment import rand_augment, seeded
from dropkey.data.images import decode
from dropkey.provenance import git_commit, versions
from dropkey.records import hardware
from dropkey.reproduction.cost import BACKWARD, PEAKS, of_model

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
GPUS, UTILISATION = 8, 0.4
USED = "Pillow, cropped by torch (as dropkey.data does)"
Pixels = Image.Image | torch.Tensor


def decoders() -> dict[str, Callable[[bytes], Pixels]]:
    found = {
        "Pillow": lambda content: decode(io.BytesIO(content), 3),
        "torchvision": lambda content: decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB
        ),
    }
    try:
        import simplejpeg

        found["simplejpeg"] = lambda content: Image.fromarray(simplejpeg.decode_jpeg(content, fastdct=False))
    except ImportError:
        pass
    try:
        from turbojpeg import TJPF_RGB, TurboJPEG

        turbo = TurboJPEG()
        found["PyTurboJPEG"] = lambda content: Image.fromarray(turbo.decode(content, pixel_format=TJPF_RGB))
    except (ImportError, RuntimeError, OSError):  # without the library
        pass
    return found


def box_of(width: int, height: int) -> tuple[int, int, int, int]:
    return RandomResizedCropAndInterpolation.get_params(Image.new("1", (width, height)), SCALE, RATIO)


def cropped(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[1:] if isinstance(pixels, torch.Tensor) else pixels.size[::-1]
    return resized_crop(pixels, *box_of(width, height), (SIZE, SIZE), InterpolationMode.BICUBIC, antialias=True)


def used(content: bytes) -> torch.Tensor:
    picture = decode(io.BytesIO(content), 3)
    return augmentation.resized_crop(picture, box_of(*picture.size), SIZE, "bicubic")


def drafted(content: bytes) -> Image.Image:
    """Decoded at a half or less where the crop is still SIZE pixels then: libjpeg leaves out frequencies."""
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        top, left, tall, wide = box_of(width, height)
        least = max(SIZE / tall, SIZE / wide)
        picture.draft("RGB", (int(width * least) + 1, int(height * least) + 1))
        across, down = picture.width / width, picture.height / height
        box = (top * down, left * across, max(1, tall * down), max(1, wide * across))
        return resized_crop(picture.convert("RGB"), *map(int, box), (SIZE, SIZE), InterpolationMode.BICUBIC)


def measure(contents: list[bytes], rounds: int) -> list[dict]:
    """Images per second of processor time, so that other programs do not count: medians over rounds of all files."""
    augment = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")
    policy = rand_augment(augment.rand_augment, DataConfig(image_size=SIZE, mean=[0.485, 0.456, 0.406]))
    ways = {USED: {"crop": used}, "Pillow, draft mode": {"crop": drafted}}
    for name, read in decoders().items():
        ways[name] = {"decode": read, "crop": lambda content, read=read: cropped(read(content))}
    pillow = ways["Pillow"]
    pillow["crop and RandAugment"] = lambda content: policy(pillow["crop"](content))
    times = {(name, what): [] for name, steps in ways.items() for what in steps}
    for number in range(rounds + 1):  # the first one warms up
        for (name, what), found in times.items():
            with seeded(number):  # the same boxes for all
                begin = time.process_time()
                for content in contents:
                    ways[name][what](content)
                found.append(time.process_time() - begin)
    rows = []
    for name, steps in ways.items():
        speeds = {what: round(len(contents) / statistics.median(times[name, what][1:])) for what in steps}
        ratio = statistics.median(
            pillow / own for pillow, own in zip(times["Pillow", "crop"][1:], times[name, "crop"][1:], strict=True)
        )
        apart = difference(contents, steps["decode"], ways["Pillow"]["decode"]) if "decode" in steps else None
        rows.append({"decoder": name, **speeds, "crop over Pillow": round(ratio, 2), "largest difference": apart})
    return rows


def difference(contents: list[bytes], one: Callable, other: Callable) -> int:
    """The most by which a pixel differs, of 255."""
    most = 0
    for content in contents:
        arrays = [
            pixels.permute(1, 2, 0).numpy() if isinstance(pixels, torch.Tensor) else np.asarray(pixels)
            for pixels in (one(content), other(content))
        ]
        most = max(most, int(np.abs(arrays[0].astype(int) - arrays[1]).max()))
    return most


def needs(speed: float) -> list[dict]:
    """Cores that feed eight GPUs, for each experiment on ImageNet; `speed`: images/s of a core."""
    rows = []
    for file in sorted((Path(__file__).parents[1] / "configs" / "experiment").glob("imagenet_*.yaml")):
        flop, _ = of_model(compose([f"experiment={file.stem}"]))
        row = {"experiment": file.stem, "GFLOP/image": round(flop / 1e9, 1)}
        for gpu in ("a100", "h100"):
            rate = GPUS * PEAKS[gpu] * 1e12 * UTILISATION / ((1 + BACKWARD) * flop)
            row |= {f"images/s of 8 {gpu}": round(rate), f"cores for 8 {gpu}": round(rate / speed)}
        rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows])


def run(root: str, rounds: int, output: Path) -> None:
    paths = sorted(path for kind in ("*.JPEG", "*.jpg") for path in Path(root).rglob(kind))
    require(bool(root) and bool(paths), f"root={root}: decoding takes a folder with photographs (*.JPEG, *.jpg)")
    contents = [path.read_bytes() for path in paths]
    torch.set_num_threads(1)
    random.seed(0)
    decoding = measure(contents, rounds)
    cores = needs(next(row["crop"] for row in decoding if row["decoder"] == USED))
    photographs = {"photographs": len(contents), "kB": round(sum(map(len, contents)) / len(contents) / 1000)}
    result = {"what": "decoding", "hardware": hardware(), "rounds": rounds, **photographs, "pixels": SIZE}
    result |= {"utilisation": UTILISATION, "versions": versions(), "commit": git_commit()}
    path = output / "decoding-cpu.json"
    path.write_text(json.dumps({**result, "rows": decoding, "needs": cores}, indent=1) + "\n")
    print(f"{markdown(decoding)}\n\n{markdown(cores)}\n\n{hardware()}; written to {path}", flush=True)
