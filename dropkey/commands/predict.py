"""Shows a trained run's answers to images: dropkey predict run=<run> <image, folder or pattern> ...

    dropkey predict run=vit_4x64 photo.jpg more/ 'other/*.png'
    dropkey predict run=vit_4x64 more/ monte_carlo=16 output=predictions.csv
    dropkey predict run=detr_small photo.jpg threshold=0.7 draw=drawn

The images are prepared as in the evaluation of training. A run that finds boxes gives their left,top right,bottom in
pixels of the image. With monte_carlo=16 the regularizer stays on: probabilities (and boxes) are means of 16 passes,
shown with their standard deviation over the passes, in points. A run is a path, name or hash, or the beginning of one.
An image that cannot be read is named, the others are processed, and the exit code is 3; otherwise exit codes are as in
train.
"""

import csv
import glob
import io
import json
import os
from collections import Counter
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
BOX = 21  # of them, for a box
SIDES = ("left", "top", "right", "bottom")


@dataclass
class Args:
    run: str = arg("", "the run")
    k: Optional[int] = arg(None, "how many classes or boxes to show for each image; null: 5 classes, all boxes")
    threshold: Optional[float] = arg(None, "for a run that finds boxes, the lowest score shown; null: 0.5")
    draw: str = arg("", "folder for copies of the images with their boxes drawn")
    monte_carlo: int = arg(0, "passes with the regularizer on, 2 or more; 0: one pass without")
    format: str = arg("table", "what to print", choices=FORMATS)
    output: str = arg("", "a .json or .csv file to write instead of printing")
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
    """Each image with its classes or boxes, or None where it cannot be read, which is printed."""
    most = {} if args.k is None else {"k": args.k}
    for start in range(0, len(paths), BATCH):
        images, chosen = {}, {}
        for path in paths[start : start + BATCH]:
            try:
                images[path] = model.transform(path)
            except DataError as error:
                say(f"error: {error}")
        if images:
            found = model.predict(list(images.values()), monte_carlo=args.monte_carlo, threshold=args.threshold)
            chosen = dict(zip(images, found.top(**most), strict=True))
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
    """A line per class or box; the image's name stands in the first."""
    lines = []
    if not top:
        return f"{shortened(image, left, keep_end=True):<{left}}  nothing found"
    for choice in top:
        spread = f" ±{100 * choice['spread']:5.1f}" if "spread" in choice else ""
        name = "" if lines else shortened(image, left, keep_end=True)
        label = shortened(choice["label"], middle)
        boxes = "".join("  {:>9} {:>9}".format(*corners(box)) for box in boxes_of(choice).values())
        lines.append(f"{name:<{left}}  {label:<{middle}}  {100 * choice['score']:5.1f} %{spread}{boxes}")
    return "\n".join(lines)


def boxes_of(choice: dict) -> dict[str, list[float]]:
    return {key: value for key, value in choice.items() if isinstance(value, list)}


def corners(box: list[float]) -> tuple[str, str]:
    left, top, right, bottom = (round(value) for value in box)
    return f"{left},{top}", f"{right},{bottom}"


def flat(choice: dict) -> dict:
    """With a column for each side of a box."""
    plain = {key: value for key, value in choice.items() if not isinstance(value, list)}
    for key, box in boxes_of(choice).items():
        plain |= {f"{key}_{side}": value for side, value in zip(SIDES, box, strict=True)}
    return plain


def draw(image: str, top: list[dict], classes: list[str], file: Path) -> None:
    from dropkey.analysis.box_figures import save_drawn
    from dropkey.tasks.preprocessing import opened

    save_drawn(
        opened(image, 3), [(one["label"], one["score"], [*boxes_of(one).values()]) for one in top], classes, file
    )


def drawn_files(images: list[str], folder: str) -> dict[str, Path]:
    """For each image <name>-boxes.png, with a number where another has that name."""
    names, found = Counter(), {}
    for image in images:
        names[stem := Path(image).stem] += 1
        number = f"-{names[stem]}" if names[stem] > 1 else ""
        found[image] = Path(folder) / f"{stem}-boxes{number}.png"
    return found


def as_csv(found: list[tuple[str, list[dict]]]) -> str:
    text = io.StringIO()
    rows = [{"image": image, "rank": n, **flat(choice)} for image, top in found for n, choice in enumerate(top, 1)]
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
    if args.k is not None:
        in_range("k", args.k, "above 0")
    suffix = Path(args.output).suffix[1:]
    require(not args.output or suffix in FORMATS[1:], f"output={args.output} must end in .json or .csv")
    form = suffix or args.format
    named = [word for word in words if not is_argument(word)]
    require(bool(named), "no images: name files, folders or patterns after run=")
    directory, paths = find_run(args.run), find_images(named)

    from dropkey import loading  # imports torch and timm: seconds, so after the checks

    model = loading.load(directory, args.weights, device=args.device, root=args.root)
    boxes = model.task.boxes_per_answer
    require(bool(boxes) or not args.draw, f"draw={args.draw} is for runs that find boxes")
    columns = widths(paths, model.classes, figures=(14 if args.monte_carlo else 7) + BOX * boxes)
    found, unread, drawn = [], 0, drawn_files(paths, args.draw)
    for image, top in predictions(model, paths, args):
        if args.draw and top is not None:
            draw(image, top, model.classes, drawn[image])
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
    if args.draw:
        say(f"drew   {args.draw}/  ({len(paths) - unread} images)")
    if unread:
        say(f"error: {unread} of {len(paths)} images could not be read")
    return DataError.exit_code if unread else 0


def start() -> None:
    run_script(main)
