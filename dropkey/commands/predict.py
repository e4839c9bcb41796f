"""Shows a trained run's answers to images: dropkey predict run=<run> <image, folder or pattern> ...

    dropkey predict run=vit_4x64 photo.jpg more/ 'other/*.png'
    dropkey predict run=vit_4x64 more/ monte_carlo=16 output=predictions.csv
    dropkey predict run=detr_small photo.jpg threshold=0.7 draw=drawn
    dropkey predict run=metro_small person.jpg draw=drawn meshes=drawn

The images are prepared as in the evaluation of training. A run that finds boxes gives their left,top right,bottom in
pixels of the image; one that finds meshes gives x, y and z of each joint in millimetres and its x,y in pixels. With
monte_carlo=16 the regularizer stays on: probabilities (boxes, meshes) are means of 16 passes, shown with their standard
deviation over the passes, in points (joints: in millimetres). A run is a path, name or hash, or the beginning of one.
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
from typing import Any, Optional

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
JOINT = {False: 36, True: 43}  # and for a joint, without or with its spread
SIDES = ("left", "top", "right", "bottom")
NAMES = {2: ("x", "y"), 3: ("x", "y", "z"), 4: SIDES}  # of the numbers of a point, a position, a box


@dataclass
class Args:
    run: str = arg("", "the run")
    k: Optional[int] = arg(None, "how many classes, boxes or joints to show for each image; null: 5 classes, else all")
    threshold: Optional[float] = arg(None, "for a run that finds boxes, the lowest score shown; null: 0.5")
    draw: str = arg("", "folder for copies of the images with their boxes or meshes drawn")
    meshes: str = arg("", "for a run that finds meshes, folder for one .obj file per image")
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


def predictions(model, paths: list[str], args: Args) -> Iterator[tuple[str, list[dict] | None, Any]]:
    """Each image with its classes, boxes or joints, and its mesh where that is found; None where it cannot be read,
    which is printed."""
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
            meshes = found if model.task.shows == "meshes" else [None] * len(images)
            chosen = dict(zip(images, zip(found.top(**most), meshes, strict=True), strict=True))
        for path in paths[start : start + BATCH]:
            yield path, *chosen.get(path, (None, None))


def shortened(text: str, width: int, keep_end: bool = False) -> str:
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"


def widths(images: list[str], classes: list[str], figures: int) -> tuple[int, int]:
    """Of the columns of images and of classes, where the figures have so many characters."""
    left = min(max(map(len, images)), (WIDTH - figures) // 2)
    return left, min(max(map(len, classes)), WIDTH - figures - left - 4)


def table(image: str, top: list[dict], left: int, middle: int) -> str:
    """A line per class, box or joint; the image's name stands in the first."""
    lines = []
    if not top:
        return f"{shortened(image, left, keep_end=True):<{left}}  nothing found"
    for choice in top:
        name = "" if lines else shortened(image, left, keep_end=True)
        label = shortened(choice["label"], middle)
        lines.append(f"{name:<{left}}  {label:<{middle}}  {figures(choice)}")
    return "\n".join(lines)


def figures(choice: dict) -> str:
    of_joint = "position" in choice
    spread = f" ±{(1000 if of_joint else 100) * choice['spread']:5.1f}" if "spread" in choice else ""
    if of_joint:
        x, y = choice["point"]
        return "".join(f"{1000 * value:7.0f}" for value in choice["position"]) + f" mm{spread}  {f'{x:.0f},{y:.0f}':>9}"
    boxes = "".join("  {:>9} {:>9}".format(*corners(box)) for box in boxes_of(choice).values())
    return f"{100 * choice['score']:5.1f} %{spread}{boxes}"


def boxes_of(choice: dict) -> dict[str, list[float]]:
    return {key: value for key, value in choice.items() if isinstance(value, list)}


def corners(box: list[float]) -> tuple[str, str]:
    left, top, right, bottom = (round(value) for value in box)
    return f"{left},{top}", f"{right},{bottom}"


def flat(choice: dict) -> dict:
    """With a column for each side of a box, or each coordinate."""
    plain = {key: value for key, value in choice.items() if not isinstance(value, list)}
    for key, box in boxes_of(choice).items():
        plain |= {f"{key}_{name}": value for name, value in zip(NAMES[len(box)], box, strict=True)}
    return plain


def draw(image: str, top: list[dict], mesh, classes: list[str], file: Path) -> None:
    from dropkey.analysis import box_figures, mesh_figures
    from dropkey.tasks.preprocessing import opened

    if mesh is not None:
        return mesh_figures.save_drawn(opened(image, 3), mesh, file)
    answers = [(one["label"], one["score"], [*boxes_of(one).values()]) for one in top]
    box_figures.save_drawn(opened(image, 3), answers, classes, file)


def files_for(images: list[str], folder: str, ending: str) -> dict[str, Path]:
    """For each image <name>-boxes.png, say, with a number where another has that name."""
    names, found, (kind, suffix) = Counter(), {}, ending.split(".")
    for image in images:
        names[stem := Path(image).stem] += 1
        number = f"-{names[stem]}" if names[stem] > 1 else ""
        found[image] = Path(folder) / f"{stem}-{kind}{number}.{suffix}"
    return found


def as_csv(found: list[tuple[str, list[dict], Any]]) -> str:
    text = io.StringIO()
    rows = [{"image": image, "rank": n, **flat(choice)} for image, top, _ in found for n, choice in enumerate(top, 1)]
    writer = csv.DictWriter(text, rows[0] if rows else ["image", "rank", "label", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(found: list[tuple[str, list[dict], Any]]) -> str:
    rows = [
        {"image": image, **({"top": top} if mesh is None else {"camera": mesh.camera.tolist(), "joints": top})}
        for image, top, mesh in found
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def write(text: str, path: Path) -> None:
    replace_file(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def store(text: str, path: Path) -> None:
    """StorageError where it cannot be written; it is printed then, because it took its time."""
    try:
        write(text, path)
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
    shows, mc = model.task.shows, bool(args.monte_carlo)
    require(shows != "classes" or not args.draw, f"draw={args.draw} is for runs that find boxes or meshes")
    require(shows == "meshes" or not args.meshes, f"meshes={args.meshes} is for runs that find meshes")
    numbers = JOINT[mc] if shows == "meshes" else (14 if mc else 7) + BOX * model.task.boxes_per_answer
    columns, found, unread = widths(paths, model.classes, numbers), [], 0
    pictures = files_for(paths, args.draw, "mesh.png" if shows == "meshes" else "boxes.png")
    objects = files_for(paths, args.meshes, "mesh.obj")
    for image, top, mesh in predictions(model, paths, args):
        if top is None:
            unread += 1
            continue
        if args.draw:
            draw(image, top, mesh, model.classes, pictures[image])
        if args.meshes:
            write(mesh.obj(), objects[image])
        if form == "table":
            print(table(image, top, *columns), flush=True)
        else:
            found.append((image, top, mesh))
    if form != "table":
        text = {"json": as_json, "csv": as_csv}[form](found)
        if args.output:
            store(text, Path(args.output))
            print(f"wrote  {args.output}  ({len(found)} images)")
        else:
            print(text, end="")
    for done, folder in (("drew  ", args.draw), ("wrote ", args.meshes)):
        if folder:
            say(f"{done} {folder}/  ({len(paths) - unread} images)")
    if unread:
        say(f"error: {unread} of {len(paths)} images could not be read")
    return DataError.exit_code if unread else 0


def start() -> None:
    run_script(main)
