"""Classifies images with a trained run: dropkey predict run=<run> <image, folder or pattern> ...

    dropkey predict run=vit_4x64 photo.jpg more/ 'other/*.png'
    dropkey predict run=vit_4x64 more/ monte_carlo=16 output=predictions.csv

The images are prepared as in the evaluation of training. With monte_carlo=16 the regularizer is left on: probabilities
are means of 16 passes, and beside them stands their standard deviation over the passes, in points. A run is a path,
name, hash, or the beginning of one. An image that cannot be read is named, the others are classified, and the exit
code is 3; otherwise exit codes are as in train.
"""

import csv
import glob
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dropkey.config.check import in_range, require
from dropkey.config.run_lookup import find_run
from dropkey.config.schema import DEVICES
from dropkey.config.script_args import arg, parse, run_script
from dropkey.errors import DataError, StorageError, say
from dropkey.records import replace_file

BATCH = 64
FORMATS = ("table", "json", "csv")
WIDTH = 80  # characters of a line at most


@dataclass
class Args:
    run: str = arg("", "the run")
    k: int = arg(5, "how many classes to show of each image")
    monte_carlo: int = arg(0, "passes with the regularizer on, 2 or more; 0: one pass without")
    format: str = arg("table", "what to print", choices=FORMATS)
    output: str = arg("", "file .json or .csv to write instead")
    weights: str = arg("last", "last, best, or a checkpoint file")
    device: str = arg("auto", "where to compute", choices=DEVICES)
    root: Optional[str] = arg(None, "where the run's images are now; needed once for runs without model.json")


def is_argument(word: str) -> bool:
    return word in ("-h", "--help") or ("=" in word and not os.path.exists(word))


def find_images(words: list[str]) -> list[str]:
    """Files as given, folders as the images in them (sorted, with those of folders inside), patterns as what fits.

    Raises:
        ConfigError: a folder without images, a pattern that nothing fits.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    for word in words:
        one = [word] if os.path.exists(word) or not glob.has_magic(word) else sorted(glob.glob(word, recursive=True))
        require(bool(one), f"{word} fits no file")
        for path in one:
            inside = [path]
            if os.path.isdir(path):
                files = [file for file in Path(path).rglob("*") if file.suffix.lower() in IMG_EXTENSIONS]
                inside = sorted(str(file) for file in files if not file.name.startswith("."))
            require(bool(inside), f"{path} holds no image ({' '.join(IMG_EXTENSIONS)})")
            found += inside
    return list(dict.fromkeys(found))


def predictions(model, paths: list[str], args: Args) -> Iterator[tuple[str, list[dict] | None]]:
    """Each image with its classes, or None where it cannot be read, which is printed."""
    import torch

    for start in range(0, len(paths), BATCH):
        images, chosen = {}, {}
        for path in paths[start : start + BATCH]:
            try:
                images[path] = model.transform(path)
            except DataError as error:
                say(f"error: {error}")
        if images:
            found = model.predict(torch.stack(list(images.values())), monte_carlo=args.monte_carlo)
            chosen = dict(zip(images, found.top(args.k), strict=True))
        for path in paths[start : start + BATCH]:
            yield path, chosen.get(path)


def shortened(text: str, width: int, keep_end: bool = False) -> str:
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"


def widths(images: list[str], classes: list[str], figures: int) -> tuple[int, int]:
    """Of the columns of images and of classes, where the figures have so many characters."""
    left = min(max(map(len, images)), (WIDTH - figures) // 2)
    return left, min(max(map(len, classes)), WIDTH - figures - left - 4)


def table(image: str, top: list[dict], left: int, middle: int) -> str:
    """A line per class; the image's name stands in the first."""
    lines = []
    for choice in top:
        spread = f" ±{100 * choice['spread']:5.1f}" if "spread" in choice else ""
        name = "" if lines else shortened(image, left, keep_end=True)
        label = shortened(choice["label"], middle)
        lines.append(f"{name:<{left}}  {label:<{middle}}  {100 * choice['score']:5.1f} %{spread}")
    return "\n".join(lines)


def as_csv(found: list[tuple[str, list[dict]]]) -> str:
    text = io.StringIO()
    rows = [{"image": image, "rank": n, **choice} for image, top in found for n, choice in enumerate(top, 1)]
    writer = csv.DictWriter(text, rows[0] if rows else ["image", "rank", "label", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(found: list[tuple[str, list[dict]]]) -> str:
    return json.dumps([{"image": image, "top": top} for image, top in found], indent=2, ensure_ascii=False) + "\n"


def store(text: str, path: Path) -> None:
    """StorageError where it cannot be written; it is printed then, because it took its time."""
    try:
        replace_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))
    except StorageError as error:
        print(text, end="")
        raise StorageError(f"the predictions above are not stored: {error}") from error


def main(words: list[str]) -> int:
    args = parse(Args, [word for word in words if is_argument(word)], __doc__)
    require(bool(args.run), "run= is missing, such as run=runs/<directory>")
    in_range("k", args.k, "above 0")
    suffix = Path(args.output).suffix[1:]
    require(not args.output or suffix in FORMATS[1:], f"output={args.output} must end in .json or .csv")
    form = suffix or args.format
    named = [word for word in words if not is_argument(word)]
    require(bool(named), "no images: name files, folders or patterns after run=")
    directory, paths = find_run(args.run), find_images(named)

    from dropkey import loading  # imports torch and timm: seconds, so after the checks

    model = loading.load(directory, args.weights, device=args.device, root=args.root)
    columns = widths(paths, model.classes, figures=14 if args.monte_carlo else 7)
    found, unread = [], 0
    for image, top in predictions(model, paths, args):
        if top is None:
            unread += 1
        elif form == "table":
            print(table(image, top, *columns), flush=True)
        else:
            found.append((image, top))
    if form != "table":
        text = {"json": as_json, "csv": as_csv}[form](found)
        if args.output:
            store(text, Path(args.output))
            print(f"wrote  {args.output}  ({len(found)} images)")
        else:
            print(text, end="")
    if unread:
        say(f"error: {unread} of {len(paths)} images could not be read")
    return DataError.exit_code if unread else 0


def start() -> None:
    run_script(main)
