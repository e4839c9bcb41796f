"""Bodies drawn over images and turned, found ones and true ones; and what a joint attends to, on the body."""

import math
from pathlib import Path
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from dropkey.analysis.box_figures import DPI, LEAST, enlarged, show
from dropkey.analysis.meshes import Found
from dropkey.plotting import GREY, image_axis, looks, save, style, subplots, wrapped
from dropkey.tasks.meshes import FoundMeshes

LIGHT = (-0.45, -0.6, -0.66)  # where it comes from: above and beside the viewer
SIDE_VIEW = 90  # degrees
BEHIND = "#8a8f98"  # bodies whose colors go from black to light
FOUND, TRUTH = "#33bbee", "#ee7733"
LEGEND = "blue: what is found, over the image and, beside it, seen from the right; orange: the truth"


def draw_body(axis, mesh: FoundMeshes, colors: Tensor, alpha: float = 0.75) -> None:
    """One mesh as its triangles that face the viewer, the nearest last; without faces, its vertices.

    Args:
        colors: 3, or one for each vertex, V 3.
    """
    from matplotlib.collections import PolyCollection

    flat, vertices, faces = mesh.flat(mesh.vertices), mesh.vertices, mesh.faces
    colors = colors.expand(len(vertices), 3)
    if not len(faces):
        order = vertices[:, 2].argsort(descending=True)
        axis.scatter(*flat[order].T, s=4, c=colors[order].numpy(), alpha=alpha, linewidths=0)
        return
    corners = vertices[faces]  # F 3 3
    normals = F.normalize(torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=-1)
    normals = normals * torch.linalg.det(corners.double()).sum().sign().float()  # of its volume: outwards
    light = (normals @ torch.tensor(LIGHT)).clamp_min(0)
    tint = colors[faces].mean(1) * (0.4 + 0.6 * light[:, None])
    order = corners[..., 2].mean(1).argsort(descending=True)
    order = order[normals[order, 2] < 0]
    look = {"facecolors": tint[order].numpy(), "edgecolors": "#00000040", "linewidths": 0.2, "alpha": alpha}
    axis.add_collection(PolyCollection(flat[faces][order].numpy(), **look))


def color(name: str) -> Tensor:
    return torch.tensor([int(name[at : at + 2], 16) / 255 for at in (1, 3, 5)])


def draw_turned(axis, meshes: Sequence[tuple[FoundMeshes, str]], size: tuple[int, int]) -> None:
    """Seen from the right of the image; two in one place, each in its color.

    Args:
        size: width and height of the image.
    """
    for mesh, name in meshes:
        draw_body(axis, mesh.turned(SIDE_VIEW), color(name), 0.9 if len(meshes) == 1 else 0.6)
    middle, half = size[0] / 2, min(size) / 2
    axis.set(xlim=(middle - half, middle + half), ylim=(size[1], 0), aspect="equal")
    image_axis(axis)


def draw_over(axis, picture: Tensor, mesh: Optional[FoundMeshes], name: str = FOUND) -> None:
    """The image C H W with a mesh over it."""
    image_axis(axis)
    show(axis, enlarged(picture), picture)
    if mesh is not None:
        draw_body(axis, mesh, color(name))
    height, width = picture.shape[-2:]
    axis.set(xlim=(0, width), ylim=(height, 0))


def drawn(picture: Tensor, mesh: FoundMeshes, truth: Optional[FoundMeshes] = None):
    """The mesh over the image, and beside it turned, with the truth if that is known; see `LEAST`."""
    from matplotlib.figure import Figure

    height, width = picture.shape[-2:]
    factor = max(1, math.ceil(LEAST / min(height, width))) / DPI
    side = min(height, width)
    figure = Figure(figsize=((width + side) * factor, height * factor))
    axes = [
        figure.add_axes((left / (width + side), 0, part / (width + side), 1))
        for left, part in ((0, width), (width, side))
    ]
    draw_over(axes[0], picture, mesh)
    draw_turned(axes[1], [*([(truth, TRUTH)] if truth else []), (mesh, FOUND)], (width, height))
    return figure


def save_drawn(picture: Image.Image, mesh: FoundMeshes, path: Path) -> None:
    with style():
        save(drawn(pil_to_tensor(picture) / 255, mesh), path)


def plot_meshes(
    pictures: list[Tensor], titles: list[str], runs: list[list[Found]], headings: list[str], path: Path
) -> None:
    """What runs find in the same images: a row for each image; for each run a column over the image, and one of the
    side view with the truth.

    Args:
        pictures: C H W in [0, 1] each.
        titles: one per image.
        headings: one per run: what it is, and its result.
    """
    side = 1.7
    with style():
        figure, axes = subplots(
            len(pictures), 1 + 2 * len(runs), (side * (1 + 2 * len(runs)) + 0.3, (side + 0.24) * len(pictures) + 0.8)
        )
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.01, wspace=0.01)
        for row, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            draw_over(axes[row, 0], picture, None)
            axes[row, 0].set_ylabel(title, fontsize=8)
            for number, (found, look) in enumerate(zip(runs, looks(len(runs)), strict=True)):
                over, turned, one = axes[row, 1 + 2 * number], axes[row, 2 + 2 * number], found[row]
                draw_over(over, picture, one.mesh)
                draw_turned(turned, [(one.truth, TRUTH), (one.mesh, FOUND)], picture.shape[:-3:-1])
                over.set_xlabel(str(one), fontsize=8, labelpad=2, color=GREY)
                if row == 0:
                    heading = wrapped(headings[number], int(14 * side))
                    over.set_title(heading, loc="left", color=look["color"], weight="bold")
        figure.supxlabel(wrapped(LEGEND, int(15 * side * (1 + 2 * len(runs)))), fontsize=8)
        save(figure, path)


def draw_attended(axis, mesh: FoundMeshes, values: Tensor, largest: Optional[Tensor] = None) -> None:
    """The mesh alone, each vertex in the color of its value; the lightest stands for `largest` (None: the
    largest value)."""
    from matplotlib import colormaps

    shares = values.float() / (values.max() if largest is None else largest)
    draw_body(axis, mesh, torch.from_numpy(colormaps["inferno"](shares.numpy())[:, :3]).float(), alpha=1.0)
    width, height = mesh.size.tolist()
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal", facecolor=BEHIND)
