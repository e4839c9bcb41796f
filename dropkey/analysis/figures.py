"""The figures of analysis: attention maps, entropy over depth, masks, schedules."""

import itertools
import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from dropkey import regularizers, schedules
from dropkey.analysis.maps import AttentionMaps
from dropkey.plotting import COLORS, MARKERS, PALE, image_axis, save, style, subplots

MASKS = (("dropkey", None), ("dropkey_block", 3), ("dropkey_cross", 5), ("dropkey_cross", "full"))  # figure 3
DRAWS = 4096  # masks over which a mean ratio is taken
PIXELS = 224  # least width of an image in a figure of maps


def plot_maps(images: Tensor, titles: list[str], found: list[AttentionMaps], labels: list[str], path: Path) -> None:
    """Images in the first row, below them every map of every run, as colors over a faint image.

    Args:
        images: B C H W in [0, 1].
        titles: one per image.
        found: for each run, maps of these images.
        labels: one per run.
    """
    rows = [(label, i, run) for label, run in zip(labels, found, strict=True) for i in range(len(run.names))]
    size = (1.4 * len(titles) + 0.4, 1.4 * (1 + len(rows)) + 0.7)
    with style():
        figure, axes = subplots(1 + len(rows), len(titles), size)
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
        for axis in axes.flat:
            image_axis(axis)
        factor = max(1, math.ceil(PIXELS / images.shape[-1]))
        large = repeat(images, "b c h w -> b c (h i) (w j)", i=factor, j=factor)
        for column, (image, title) in enumerate(zip(large, titles, strict=True)):
            axes[0, column].imshow(rearrange(image, "c h w -> h w c").expand(-1, -1, 3).numpy())
            axes[0, column].set_title(title, fontsize=8, loc="center")
            for axis, (_, i, run) in zip(axes[1:, column], rows, strict=True):
                axis.imshow(overlay(image, run.values[column, i]).numpy())
        for axis, (label, i, run) in zip(axes[1:, 0], rows, strict=True):
            parts = [label] * (len(found) > 1) + [run.names[i]] * (len(run.names) > 1 or len(found) == 1)
            axis.set_ylabel("\n".join(line for part in parts for line in textwrap.wrap(part, 22)), fontsize=8)
        captions = [*dict.fromkeys(run.caption for run in found), "each map from 0 (black) to its own maximum (light)"]
        figure.supxlabel("\n".join(captions), fontsize=8)
        save(figure, path)


def overlay(image: Tensor, values: Tensor) -> Tensor:
    """A map (h w) upsampled over an image (C H W), as colors H W 3.

    Colors are multiplied by the image's brightness, as a mixture would turn bright pixels into other colors of the
    scale. Upsampling is bilinear, because bicubic draws dark rings around peaks.
    """
    from matplotlib import colormaps

    large = F.interpolate(values[None, None].float().cpu(), size=image.shape[-2:], mode="bilinear")[0, 0]
    colors = torch.as_tensor(colormaps["inferno"]((large / large.max()).numpy())[..., :3]).float()
    brightness = image.mean(0).unsqueeze(-1)
    return (colors * (0.7 + 0.3 * brightness) + 0.12 * brightness).clamp(max=1)


def plot_entropy(records: list[list[dict]], labels: list[str], path: Path) -> None:
    """Normalised entropy over depth: a dot for each head, a line through the means over heads.

    Args:
        records: for each line the entropy.json of its runs, which differ in the seed alone.
        labels: one per line.
    """
    deepest = max((group[0]["layers"] for group in records), key=len)
    width = max(4.8, 1.6 + 0.42 * len(deepest))
    columns = max(1, int(width / (0.6 + 0.07 * max(map(len, labels)))))  # of the legend, in 8 point
    with style():
        figure, ((axis,),) = subplots(1, 1, (width, 3.2 + 0.2 * math.ceil(len(labels) / columns)))
        for index, (group, label) in enumerate(zip(records, labels, strict=True)):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            shift = 0.34 * ((index + 0.5) / len(records) - 0.5)  # lines side by side, not on top of each other
            means = []
            for number, _ in enumerate(group[0]["layers"]):
                heads = [value for record in group for value in record["layers"][number]["normalised"]]
                means.append((number + 1 + shift, sum(heads) / len(heads)))
                axis.plot([means[-1][0]] * len(heads), heads, marker, color=color, alpha=0.5, markersize=3.5, mew=0)
            label += f", {len(group)} seeds" if len(group) > 1 else ""
            axis.plot(*zip(*means, strict=True), "-", marker=marker, color=color, markersize=5.5, label=label)
        axis.set_xticks(range(1, len(deepest) + 1), layer_ticks([layer["kind"] for layer in deepest]))
        axis.set(xlabel="attention layer", ylabel="attention entropy / log K")
        axis.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=columns)
        save(figure, path)


def layer_ticks(kinds: list[str]) -> list[str]:
    """Numbers of layers from 1; where kinds differ, each run of one kind has its name below the middle number."""
    ticks = [str(number) for number in range(1, len(kinds) + 1)]
    end = 0
    for kind, run in itertools.groupby(kinds) if len(set(kinds)) > 1 else ():
        begin, end = end, end + len(list(run))
        ticks[(begin + end - 1) // 2] += f"\n{kind}"
    return ticks


def plot_masks(ratio: float, grid: int, path: Path) -> None:
    """One query's mask under DropKey, DropKey-Block and DropKey-Cross (paper, figure 3) on a square grid of keys."""
    from matplotlib.colors import ListedColormap

    with style():
        figure, (axes,) = subplots(1, len(MASKS), (2.1 * len(MASKS), 2.75))
        for axis, (regularizer, window) in zip(axes, MASKS, strict=True):
            shape = (1, 1, DRAWS, grid * grid)
            drop = regularizers.draw_mask(regularizer, shape, ratio, seed=0, grid=(grid, grid), window=window)[0, 0]
            ratios = drop.float().mean(-1)
            typical = (ratios - ratio).abs().argmin()  # with few seed points the ratio of one draw varies a lot
            cells = rearrange(drop[typical], "(h w) -> h w", h=grid).numpy()
            axis.pcolormesh(cells, cmap=ListedColormap([PALE, COLORS[0]]), edgecolors="white")
            axis.set(aspect="equal")
            axis.invert_yaxis()
            image_axis(axis)
            axis.set_title(regularizer if window is None else f"{regularizer}, window {window}")
            axis.set_xlabel(f"dropped here {ratios[typical]:.3f}\nmean of {DRAWS:,} draws {ratios.mean():.3f}")
        figure.suptitle(f"Keys dropped for one query (dark), ratio {ratio:g}, {grid} × {grid} keys", fontsize=10)
        save(figure, path)


def plot_schedules(ratio: float, layers: int, path: Path) -> None:
    """The drop ratio of each attention layer under every schedule (paper, figure 6)."""
    with style():
        figure, ((axis,),) = subplots(1, 1, (5.6, 3.2))
        for color, marker, schedule in zip(COLORS, MARKERS, schedules.SCHEDULES, strict=False):
            values = schedules.ratios(schedule, ratio, 0.0, layers)
            label = f"{schedule} (mean {sum(values) / layers:.3g})"
            axis.plot(range(1, layers + 1), values, "-", marker=marker, color=color, markersize=4.5, label=label)
        axis.set(xlabel="attention layer", ylabel="drop ratio", ylim=(-0.04 * ratio, 1.12 * ratio))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid()
        figure.legend(loc="outside upper center", ncols=3)
        save(figure, path)
