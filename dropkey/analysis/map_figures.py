"""The figures of attention over images: maps of runs, layers and heads; and runs side by side with their entropy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkey.analysis.answers import Answer
from dropkey.analysis.box_figures import PIXELS, draw_marks, enlarged, show
from dropkey.analysis.figures import draw_entropy
from dropkey.analysis.maps import AttentionMaps
from dropkey.analysis.mesh_figures import draw_attended
from dropkey.plotting import GREY, WRONG, image_axis, looks, new_figure, save, style, subplots, wrapped
from dropkey.tasks.marks import Mark
from dropkey.tasks.meshes import FoundMeshes

SCALE = "each map from 0 (black) to its own maximum (light)"
ROW_SCALE = "each row from 0 (black) to the largest value in it (light)"
FRAME = "red frame: wrong prediction"


@dataclass
class Seen:
    """What one run sees in some test images, and what it takes them for."""

    label: str
    maps: AttentionMaps
    answers: list[Answer]  # one per image, or none
    result: str = ""  # its metric on the whole test split, in words
    marks: Optional[list[list[Mark]]] = None  # of a run that finds boxes: per image the one found, and the true one
    points: Optional[list[tuple[float, float]]] = None  # x and y that attend, as shares of each image
    meshes: Optional[list[FoundMeshes]] = None  # of a run that finds meshes: one per image, on whose vertices maps are


def plot_maps(pictures: Sequence[Tensor], titles: list[str], runs: list[Seen], path: Path) -> None:
    """Images in the first row, below them every map of every run, as colors over a faint image.

    Args:
        pictures: C H W in [0, 1] each.
        titles: one per image.
    """
    rows = [(run, i) for run in runs for i in range(len(run.maps.names))]
    size = (1.4 * len(titles) + 0.4, 1.4 + 1.58 * len(rows) + 0.7)
    with style():
        figure, axes = subplots(1 + len(rows), len(titles), size)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
        for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            draw_image(axes[0, column], picture, runs[0], column)
            axes[0, column].set_title(wrapped(title, 20), fontsize=8, loc="center")
            for axis, (run, i) in zip(axes[1:, column], rows, strict=True):
                draw_map(axis, picture, run, i, column)
        for axis, (run, i) in zip(axes[1:, 0], rows, strict=True):
            parts = [run.label] * (len(runs) > 1) + [run.maps.names[i]] * (len(run.maps.names) > 1 or len(runs) == 1)
            axis.set_ylabel("\n".join(wrapped(part, 22) for part in parts), fontsize=8)
        captions = [*dict.fromkeys(run.maps.caption for run in runs), f"{SCALE}; {FRAME}" if runs[0].answers else SCALE]
        figure.supxlabel("\n".join(wrapped(text, int(15 * size[0])) for text in captions), fontsize=8)
        save(figure, path)


def plot_comparison(pictures: Sequence[Tensor], runs: list[Seen], records: list[list[dict]], path: Path) -> None:
    """What a regularizer does to attention (paper, figures 1 and 5): a row for each image, a column for each run, and
    beside them the entropy over depth of the same runs; a column's heading has the color of its line.

    Args:
        pictures: C H W in [0, 1] each.
        records: for each column the entropy.json of its runs, which differ in the seed alone.
    """
    left, right, height = 1.42 * (1 + len(runs)) + 0.2, 4.0, 1.55 * len(pictures) + 0.9
    with style():
        figure = new_figure((left + right, height))
        figure.get_layout_engine().set(
            w_pad=0.03, h_pad=0.03, hspace=0.02, wspace=0.02, rect=(0.004, 0.006, 0.992, 0.986)
        )
        maps, beside = figure.subfigures(1, 2, width_ratios=(left, right))
        axes = maps.subplots(len(pictures), 1 + len(runs), squeeze=False)
        for row, picture in enumerate(pictures):
            draw_image(axes[row, 0], picture, runs[0], row)
            largest = max(run.maps.values[row][0].max() for run in runs)
            for column, run in enumerate(runs, start=1):
                draw_map(axes[row, column], picture, run, 0, row, largest)
        for row, answer in enumerate(runs[0].answers):
            axes[row, 0].set_xlabel(wrapped(answer.true, 20), fontsize=8, labelpad=2)
        for axis, run, look in zip(axes[0, 1:], runs, looks(len(runs)), strict=True):
            heading = f"{wrapped(run.label, 16)}\n{run.result}".strip()
            axis.set_title(heading, loc="center", color=look["color"], weight="bold", fontsize=9)
        top, bottom = beside.subplots(2, 1, height_ratios=(height - 1.2, 1.2))
        draw_entropy(top, records, [run.label for run in runs])
        top.set_title("entropy of attention; small dots are heads")
        bottom.set_axis_off()
        seeds = sorted({len(group) for group in records})
        captions = [f"maps of the first seed; results and entropy of {' or '.join(map(str, seeds))} seeds"]
        captions = captions if seeds[-1] > 1 else []
        captions += [
            *dict.fromkeys(f"maps: {run.maps.caption}" for run in runs),
            f"{ROW_SCALE}; {FRAME}" if runs[0].answers else ROW_SCALE,
        ]
        bottom.text(0, 1, "\n".join(wrapped(text, 58) for text in captions), va="top", fontsize=8, color=GREY)
        save(figure, path)


def draw_image(axis, picture: Tensor, run: Seen, image: int) -> None:
    """With the true box, if boxes are looked for."""
    image_axis(axis)
    show(axis, enlarged(picture), picture)
    if run.marks:
        draw_marks(axis, [mark for mark in run.marks[image] if mark.score is None], picture.shape[-2:])


def draw_map(axis, picture: Tensor, run: Seen, which: int, image: int, largest: Optional[Tensor] = None) -> None:
    """One map over its image, and below it the predicted class; a wrong one is red and names the true class."""
    image_axis(axis)
    if run.meshes:
        draw_attended(axis, run.meshes[image], run.maps.values[image][which], largest)
    else:
        show(axis, overlay(picture, run.maps.values[image][which], largest), picture)
    if run.marks:
        draw_marks(axis, [mark for mark in run.marks[image] if mark.score is not None], picture.shape[-2:])
    if run.points:
        x, y = (share * side for share, side in zip(run.points[image], picture.shape[:-3:-1], strict=True))
        axis.plot(x, y, "o", markersize=5, markerfacecolor="none", markeredgecolor="white")
    if run.answers:
        answer = run.answers[image]
        axis.set_xlabel(wrapped(str(answer), 24), fontsize=8, labelpad=2, color=GREY if answer.right else WRONG)
        if not answer.right:
            axis.spines[:].set(visible=True, color=WRONG, linewidth=2)


def overlay(image: Tensor, values: Tensor, largest: Optional[Tensor] = None) -> Tensor:
    """A map (h w) upsampled over an image (C H W), as colors H W 3; the lightest stands for `largest` (None: the map's
    own maximum).

    Colors are multiplied by the image's brightness, as a mixture would turn bright pixels into other colors of the
    scale. Upsampling is bilinear, because bicubic draws dark rings around peaks.
    """
    from matplotlib import colormaps

    size = [max(PIXELS, side) for side in image.shape[-2:]]
    large = F.interpolate(values[None, None].float().cpu(), size=size, mode="bilinear")[0, 0]
    share = large / (values.max() if largest is None else largest).cpu()
    colors = torch.as_tensor(colormaps["inferno"](share.numpy())[..., :3]).float()
    brightness = F.interpolate(image[None], size=size, mode="bilinear")[0].mean(0).unsqueeze(-1)
    return (colors * (0.7 + 0.3 * brightness) + 0.12 * brightness).clamp(max=1)
