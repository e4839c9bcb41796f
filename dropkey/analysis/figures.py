"""The figures of analysis: entropy over depth, masks, schedules. Those with images: map_figures.py."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from einops import rearrange

from dropkey import regularizers, schedules
from dropkey.plotting import (
    COLORS,
    CROWD,
    MARKERS,
    PALE,
    SILVER,
    image_axis,
    legend_below,
    lines_of,
    looks,
    new_figure,
    panels,
    save,
    style,
    subplots,
    ticks_of,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKS = (("dropkey", None), ("dropkey_block", 3), ("dropkey_cross", 5), ("dropkey_cross", "full"))  # figure 3
DRAWS = 4096  # masks over which a mean ratio is taken
ENTROPY = "attention entropy / log K"


def plot_entropy(records: list[list[dict]], labels: list[str], path: Path) -> None:
    """Saves `entropy_figure`."""
    save(entropy_figure(records, labels), path)


def entropy_figure(records: list[list[dict]], labels: list[str]) -> "Figure":
    """Normalised entropy over depth: a dot for each head, a line through the means over heads. Many lines get a panel
    each, where the others are grey.

    Args:
        records: for each line the entropy.json of its runs, which differ in the seed alone.
        labels: one per line.
    """
    labels = [
        label + (f", {len(group)} seeds" if len(group) > 1 else "")
        for group, label in zip(records, labels, strict=True)
    ]
    with style():
        if len(records) > CROWD:
            return entropy_panels(records, labels)
        figure, ((axis,),) = subplots(1, 1, (max(4.8, 1.6 + 0.42 * max(len(one[0]["layers"]) for one in records)), 3.2))
        draw_entropy(axis, records, labels)
        if len(records) > 1:
            legend_below(figure, [axis])
    return figure


def draw_entropy(axis, records: list[list[dict]], labels: list[str]) -> None:
    """Lines of entropy over depth, side by side so that none hides another; see `plot_entropy`."""
    for index, (group, label, look) in enumerate(zip(records, labels, looks(len(records)), strict=True)):
        shift = 0.34 * ((index + 0.5) / len(records) - 0.5)
        for number, part in enumerate(lines_of(group[0]["layers"])):
            means = []
            for place, layer in part:
                heads = entropies_of(group, layer)
                means.append(sum(heads) / len(heads))
                one = {"marker": look["marker"], "color": look["color"], "linestyle": "none"}
                axis.plot([place + shift] * len(heads), heads, **one, alpha=0.45, markersize=3.5, markeredgewidth=0)
            places = [place + shift for place, _ in part]
            axis.plot(places, means, **look, markersize=5.5, label=label if number == 0 else None)
    deepest = max((group[0]["layers"] for group in records), key=len)
    axis.set_xticks(range(1, len(deepest) + 1), ticks_of(deepest))
    axis.set(xlabel="attention layer", ylabel=ENTROPY)
    axis.grid(axis="y")


def entropy_panels(records: list[list[dict]], labels: list[str]) -> "Figure":
    """A panel for each line of `plot_entropy`, the others in grey behind it."""
    lines = math.ceil(len(records) / 4)
    figure = new_figure((10, 0.6 + 1.95 * lines))
    means = []  # of each line its parts: places and means over heads
    for group in records:
        heads = [
            [(place, entropies_of(group, layer)) for place, layer in part] for part in lines_of(group[0]["layers"])
        ]
        means.append([[(place, sum(values) / len(values)) for place, values in part] for part in heads])
    axes = panels(figure, len(records))
    for axis, group, own, label in zip(axes, records, means, labels, strict=True):
        for part in itertools.chain.from_iterable(means):
            axis.plot(*zip(*part, strict=True), color=SILVER, linewidth=0.8)
        for place, layer in itertools.chain.from_iterable(lines_of(group[0]["layers"])):
            heads = entropies_of(group, layer)
            axis.plot([place] * len(heads), heads, "o", color=COLORS[0], alpha=0.45, markersize=3, markeredgewidth=0)
        for part in own:
            axis.plot(*zip(*part, strict=True), "o-", color=COLORS[0], markersize=4, linewidth=1.8)
        axis.set_title(wrapped(label, 34), fontsize=8.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
    figure.supxlabel("attention layer", fontsize=9)
    figure.supylabel(ENTROPY, fontsize=9)
    return figure


def entropies_of(group: list[dict], layer: int) -> list[float]:
    """The normalised entropy of every head of every run."""
    return [value for record in group for value in record["layers"][layer]["normalised"]]


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
