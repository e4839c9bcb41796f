"""Boxes drawn on images: found ones as lines, true ones dashed; of one image, and of runs side by side."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

import torch
from einops import repeat
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from dropkey.analysis.boxes import Found
from dropkey.plotting import COLORS, GREY, image_axis, looks, save, style, subplots, wrapped
from dropkey.tasks.marks import Mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, FALSE, TRUTH = "#33ddff", "#ff6644", "#ffffff"
BRIGHT = [color for color in COLORS if color not in ("#222222", "#332288")]  # those seen on a dark image
LEGEND = "cyan: right (overlap of half or more with an object of its class); red: false; white dashes: the truth"
LEAST = 480  # pixels of the shorter side of an image with boxes drawn
PIXELS = 224  # least width of an image in a figure of several
DPI = 150  # of saved pictures, as in `dropkey.plotting.STYLE`


def show(axis, colors: Tensor, picture: Tensor) -> None:
    """Coordinates of the axis are pixels of the picture, whatever the size of what is shown."""
    height, width = picture.shape[-2:]
    axis.imshow(colors.numpy(), extent=(0, width, height, 0))


def enlarged(picture: Tensor) -> Tensor:
    """C H W to H W 3, pixels as squares, so that an image has `PIXELS` or more."""
    factor = max(1, math.ceil(PIXELS / picture.shape[-1]))
    return repeat(picture, "c h w -> (h i) (w j) c", i=factor, j=factor).expand(-1, -1, 3)


def draw_marks(axis, marks: Sequence[Mark], size: tuple[int, int], scale: float = 1.0) -> None:
    """Truth first, below what was found, and the surest last. The label of a truth is written where it was missed.

    Args:
        size: height and width of the image in the axis's units.
        scale: of lines and letters.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    height, width = size
    for mark in merged(sorted(marks, key=lambda mark: -1 if mark.score is None else mark.score)):
        true, color = mark.score is None, color_of(mark)
        boxes = (mark.boxes * torch.tensor([width, height] * 2)).tolist()
        line = {"edgecolor": color, "linewidth": scale * (0.9 if true else 1.15), "fill": False}
        shadow = [withStroke(linewidth=line["linewidth"] + 1.2 * scale, foreground="#000000aa")]
        for left, top, right, bottom in boxes:
            dashes = {"linestyle": (0, (4, 3))} if true else {}
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, **line, **dashes, path_effects=shadow))
        if len(boxes) == 2:  # of a pair, a line from centre to centre
            ends = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes]
            axis.plot(*zip(*ends, strict=True), color=color, linewidth=line["linewidth"], path_effects=shadow)
        left, top, right, bottom = boxes[0]
        if not true:
            draw_label(axis, mark.label, left, top, "bottom", color, scale, size)
        elif mark.right is False:
            draw_label(axis, mark.label, left, bottom, "top", color, scale, size)
    axis.set(xlim=(0, width), ylim=(height, 0))


def merged(marks: Sequence[Mark]) -> list[Mark]:
    """Of those with the same boxes and color one, whose label has a line for each: the verbs of a pair. Answers have
    their score behind."""
    found: dict[tuple, Mark] = {}
    for mark in marks:
        text = mark.label if mark.score is None else f"{mark.label} {100 * mark.score:.0f}"
        key = (mark.score is None, color_of(mark), *mark.boxes.flatten().tolist())
        found[key] = replace(mark, label=f"{found[key].label}\n{text}" if key in found else text)
    return list(found.values())


def draw_label(axis, text: str, x: float, y: float, side: str, color: str, scale: float, size) -> None:
    """Outside of the box, but inside of the image."""
    height, width = size
    if side == "bottom" and y < 0.09 * height:
        side = "top"
    elif side == "top" and y > 0.91 * height:
        side = "bottom"
    place = {"ha": "right", "x": width} if x > 0.8 * width else {"ha": "left", "x": max(x, 0)}
    box = {"facecolor": color, "edgecolor": "none", "pad": 0.8 * scale, "alpha": 0.85}
    axis.text(**place, y=min(max(y, 0), height), s=text, va=side, color="black", fontsize=6.5 * scale, bbox=box)


def color_of(mark: Mark) -> str:
    if mark.score is None:
        return TRUTH
    return BRIGHT[mark.group % len(BRIGHT)] if mark.right is None else RIGHT if mark.right else FALSE


def drawn(picture: Tensor, marks: Sequence[Mark], over: Optional[Tensor] = None, scale: float = 1.2) -> "Figure":
    """The image alone with its boxes, or colors H W 3 in its place; enlarged by a whole number so that its shorter side
    has `LEAST` pixels.

    Args:
        scale: of lines and letters.
    """
    from matplotlib.figure import Figure

    height, width = picture.shape[-2:]
    factor = max(1, math.ceil(LEAST / min(height, width)))
    figure = Figure(figsize=(width * factor / DPI, height * factor / DPI))
    axis = figure.add_axes((0, 0, 1, 1))
    colors = picture.permute(1, 2, 0).expand(-1, -1, 3) if over is None else over
    image_axis(axis)
    smooth = None if over is not None or factor == 1 else "nearest"
    axis.imshow(colors.numpy(), extent=(0, width, height, 0), interpolation=smooth)
    draw_marks(axis, marks, (height, width), scale * max(1.0, min(height, width) * factor / 600))
    return figure


def save_drawn(picture: Image.Image, answers: list[tuple[str, float, list]], classes: list[str], path: Path) -> None:
    """
    Args:
        answers: label, score, and boxes (left, top, right, bottom in pixels of the image) of each.
    """
    size = torch.tensor([picture.width, picture.height] * 2)
    groups = {label: number for number, label in enumerate(classes)}
    marks = [Mark(torch.tensor(boxes) / size, label, groups.get(label, 0), score) for label, score, boxes in answers]
    with style():
        save(drawn(pil_to_tensor(picture) / 255, marks), path)


def plot_boxes(
    pictures: list[Tensor], titles: list[str], runs: list[list[Found]], headings: list[str], path: Path
) -> None:
    """What runs find in the same images: a row for each image, a column for each run.

    Args:
        pictures: C H W in [0, 1] each.
        titles: one per image.
        headings: one per run: what it is, and its result.
    """
    large = max(max(picture.shape[-2:]) for picture in pictures) >= LEAST
    side = 3.8 if large else 2.1
    heights = [side * picture.shape[-2] / picture.shape[-1] for picture in pictures]
    with style():
        figure, axes = subplots(
            len(pictures),
            len(runs),
            (side * len(runs) + 0.4, sum(heights) + 0.3 * len(pictures) + 0.8),
            gridspec_kw={"height_ratios": heights},
        )
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, hspace=0.01, wspace=0.01)
        for column, (found, heading, look) in enumerate(zip(runs, headings, looks(len(runs)), strict=True)):
            axes[0, column].set_title(
                wrapped(heading, int(13 * side)), loc="center", color=look["color"], weight="bold"
            )
            for axis, picture, one in zip(axes[:, column], pictures, found, strict=True):
                image_axis(axis)
                show(axis, enlarged(picture), picture)
                draw_marks(axis, one.marks, picture.shape[-2:])
                axis.set_xlabel(str(one), fontsize=8, labelpad=2, color=GREY)
        for axis, title in zip(axes[:, 0], titles, strict=True):
            axis.set_ylabel(title, fontsize=8)
        figure.supxlabel(wrapped(LEGEND, int(15 * side * len(runs))), fontsize=8)
        save(figure, path)


def as_pixels(figure: "Figure") -> Tensor:
    """H W 3 in [0, 1] of what is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    size = canvas.get_width_height()[::-1]
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(*size, 4)[..., :3] / 255
