"""The report's pictures as SVG. The same records give the same bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dropkey.metrics import Metric
from dropkey.plotting import (
    COLORS,
    CROWD,
    GREY,
    INK,
    PALE,
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
from dropkey.reproduction import content, tuning
from dropkey.reproduction.comparison import Comparison, contrasts, row_values
from dropkey.reproduction.statistics import estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forest(comparison: Comparison) -> str:
    """Differences to the baseline with 95 % intervals, a panel per column; every seed's difference is a dot."""
    table, metric = comparison.table, comparison.metric
    rows = [row for row in table.rows if row != table.baseline]
    with style():
        size = (2.8 + 3.6 * len(table.columns), 1.1 + 0.34 * len(rows))
        figure, axes = subplots(1, len(table.columns), size, sharey=True)
        for axis, column in zip(axes[0], table.columns, strict=True):
            base = comparison.cells[table.baseline, column].values
            axis.axvline(0, color=GREY, linewidth=1)
            for height, row in enumerate(rows):
                cell = comparison.cells[row, column]
                one = cell.to_baseline
                if one is None:
                    continue
                if one.low is not None:
                    axis.hlines(height, one.low, one.high, color=COLORS[0], linewidth=2)
                dots = [cell.values[seed] - base[seed] for seed in sorted(cell.values.keys() & base.keys())]
                axis.plot(dots, [height + 0.22] * len(dots), ".", color=GREY, markersize=4, alpha=0.7)
                axis.plot(one.mean, height, "s", color=COLORS[0], markersize=6)
            axis.set_title(column)
            axis.set_xlabel(f"{metric.label} minus that of '{table.baseline}'{unit_of(metric)}{better(metric)}")
            name_lines(axis, rows)
        return save(figure)


def name_lines(axis, labels: list[str]) -> None:
    """One label per line of a forest plot, the first on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)


@dataclass(frozen=True)
class Block:
    """What one panel shows of every row, or, where there are many rows, one group of panels."""

    column: str  # of the table
    label: str  # of the vertical axis
    draw: Callable[..., None]  # (axis, row, its look, where its marks are between -0.5 and 0.5 beside their place)


def curves(comparison: Comparison) -> str:
    """Training loss and the watched metric over epochs: mean over seeds, and a band of one sample deviation. Rows that
    were evaluated, not trained, have none."""
    columns, metric = comparison.table.columns, comparison.metric
    top = 100.0 if metric.proportion else math.inf
    blocks = []
    for column in columns:
        blocks.append(Block(column, "training loss", partial(band, comparison, column, 1, math.inf)))
        blocks.append(Block(column, content.named(metric), partial(band, comparison, column, 2, top)))
    return drawn(comparison, blocks, "epoch", (len(columns), 2), (11, 0.4 + 3.3 * len(columns)))


def entropy(comparison: Comparison) -> str:
    """Normalised entropy of attention over depth: means over heads and seeds, bars of one sample deviation over
    seeds."""
    columns = comparison.table.columns
    blocks = [Block(column, "entropy of attention / log K", partial(bars, comparison, column)) for column in columns]
    return drawn(comparison, blocks, "attention layer", (1, len(columns)), (3 + 4.2 * len(columns), 3.2))


def drawn(comparison: Comparison, blocks: list[Block], label: str, shape: tuple[int, int], size) -> str:
    """A panel for each block, in `shape` lines and columns; `label` is that of the horizontal axes."""
    rows, several = trained_rows(comparison), len(comparison.table.columns) > 1
    with style():
        if crowded(comparison):
            return save(small_multiples(comparison, blocks, label))
        figure, axes = subplots(*shape, size)
        for axis, block in zip(axes.flat, blocks, strict=True):
            for number, (row, look) in enumerate(rows.items()):
                block.draw(axis, row, look, (number + 0.5) / len(rows) - 0.5)
            axis.set(xlabel=label, ylabel=block.label, title=block.column if several else "")
            axis.grid()
        legend_below(figure, axes.flat)
        return save(figure)


def small_multiples(comparison: Comparison, blocks: list[Block], label: str) -> "Figure":
    """For each block a panel per row, with the baseline in grey."""
    baseline, rows = comparison.table.baseline, trained_rows(comparison)
    rows = [row for row in rows if row != baseline]
    figure = new_figure((10, len(blocks) * (0.7 + 1.7 * math.ceil(len(rows) / 4))))
    figure.get_layout_engine().set(rect=(0, 0.005, 1, 0.985))
    for part, block in zip(figure.subfigures(len(blocks), 1, squeeze=False).flat, blocks, strict=True):
        heading = f"{block.column}: {block.label}" if len(comparison.table.columns) > 1 else block.label
        part.suptitle(heading, x=0.01, ha="left", fontsize=10, weight="bold")
        for axis, row in zip(panels(part, len(rows)), rows, strict=True):
            block.draw(axis, baseline, {"color": GREY}, 0.0)
            block.draw(axis, row, {"color": COLORS[0]}, 0.0)
            axis.set_title(wrapped(row, 32), fontsize=8.5)
            axis.grid()
        part.supxlabel(label, fontsize=8)
    return figure


def trained_rows(comparison: Comparison) -> dict[str, dict]:
    """Label -> colour of its line."""
    trained = [row.label for row in comparison.table.rows.values() if not row.evaluate]
    found = {row: {"color": look["color"]} for row, look in zip(trained, looks(len(trained)), strict=True)}
    return found | {comparison.table.baseline: {"color": GREY}}


def crowded(comparison: Comparison) -> bool:
    """Whether lines of all rows in one panel would hide each other."""
    return len(trained_rows(comparison)) > CROWD


def band(comparison: Comparison, column: str, place: int, top: float, axis, row: str, look: dict, _: float) -> None:
    """One row's mean over seeds, at the epochs that all its seeds have.

    Args:
        place: of the value in a point of a curve.
        top: the largest value that there can be.
    """
    lines = [entry["curve"] for entry in comparison.done_in(row, column) if entry.get("curve")]
    values: dict[int, list[float]] = {}
    for point in (point for line in lines for point in line if point[place] is not None):
        values.setdefault(point[0], []).append(point[place])
    found = {epoch: estimate(seen) for epoch, seen in sorted(values.items()) if len(seen) == len(lines)}
    means = [one.mean for one in found.values()]
    if found:
        axis.plot(list(found), means, label=row, linewidth=1.5, **look)
    if len(lines) > 1:
        low = [one.mean - one.deviation for one in found.values()]
        high = [min(top, one.mean + one.deviation) for one in found.values()]
        axis.fill_between(list(found), low, high, color=look["color"], alpha=0.15, linewidth=0)


def bars(comparison: Comparison, column: str, axis, row: str, look: dict, shift: float) -> None:
    """One row's entropy over depth; no bar leaves [0, 1]."""
    measured = [entry for entry in comparison.done_in(row, column) if entry.get("heads")]
    runs = [entry["heads"] for entry in measured]
    means = [estimate([sum(heads) / len(heads) for heads in layer]) for layer in zip(*runs, strict=True)]
    known = [entry["layers"] for entry in measured if len(entry.get("layers", ())) == len(means)]
    kinds = known[0] if known else [{}] * len(means)
    lines = {"linewidth": 1.5, "elinewidth": 0.8, "marker": "o", "markersize": 3, **look}
    for part in lines_of(kinds):
        layers = [means[layer] for _, layer in part]
        below = [min(one.deviation or 0, one.mean) for one in layers]
        above = [min(one.deviation or 0, 1 - one.mean) for one in layers]
        places = [place + 0.4 * shift for place, _ in part]
        axis.errorbar(places, [one.mean for one in layers], (below, above), label=row, **lines)
        row = None  # one line of the legend
    if any(kinds):
        axis.set_xticks(range(1, len(kinds) + 1), ticks_of(kinds))
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)


def claims(comparison: Comparison) -> str:
    """Every claim with its interval; below it, where it is about the mean of several columns, each of these. Dots are
    seeds; the band is the margin of equivalence."""
    table, metric = comparison.table, comparison.metric
    lines = []  # label, estimate, seeds' differences, whether it is a claim
    for found in comparison.findings:
        numbers = contrasts(row_values(comparison, table.columns), found.claim)
        lines.append((str(found.claim), found.decision.estimate or found.difference, numbers, True))
        for column, one in comparison.summaries.get(found.claim.label, ({}, None))[0].items():
            lines.append((column, one, contrasts(row_values(comparison, (column,)), found.claim), False))
    with style():
        figure, axes = subplots(1, 1, (7.2, 1.0 + 0.32 * len(lines)))
        axis = axes[0][0]
        if table.design.margin:
            axis.axvspan(-table.design.margin, table.design.margin, color=PALE, linewidth=0)
        axis.axvline(0, color=GREY, linewidth=1)
        for height, (_, one, numbers, is_claim) in enumerate(lines):
            if one is None:
                continue
            color = COLORS[0] if is_claim else GREY
            if one.low is not None:
                axis.hlines(height, one.low, one.high, color=color, linewidth=2.5 if is_claim else 1.2)
            axis.plot(list(numbers.values()), [height + 0.24] * len(numbers), ".", color=GREY, markersize=3, alpha=0.6)
            axis.plot(one.mean, height, "s", color=color, markersize=6 if is_claim else 4)
        axis.set_xlabel(f"difference in {metric.label}{unit_of(metric)}{better(metric)}")
        name_lines(axis, [label if is_claim else f"{label}  " for label, _, _, is_claim in lines])
        for text, (_, _, _, is_claim) in zip(axis.get_yticklabels(), lines, strict=True):
            text.set_color(INK if is_claim else GREY)
        return save(figure)


def tuning_budget(comparison: Comparison) -> str:
    """The expected test result over the number of candidates tried, a line per tuned row."""
    records, metric = comparison.head["tuning"], comparison.metric
    places = list(dict.fromkeys((entry["row"], entry["column"]) for entry in records))
    several = len({column for _, column in places}) > 1
    with style():
        figure, axes = subplots(1, 1, (5.2, 3.2))
        for (row, column), one in zip(places, looks(len(places)), strict=True):
            curve = tuning.budget_curve(records, row, column)
            label = f"{row}, {column}" if several else row
            axes[0][0].plot(range(1, len(curve) + 1), curve, markersize=4, label=label, **one)
        axes[0][0].set(xlabel="candidates tried", ylabel=f"expected test {content.named(metric)}")
        axes[0][0].xaxis.get_major_locator().set_params(integer=True)
        axes[0][0].grid()
        legend_below(figure, axes.flat)
        return save(figure)


def unit_of(metric: Metric) -> str:
    return f" ({'points' if metric.unit == '%' else metric.unit})" if metric.unit else ""


def better(metric: Metric) -> str:
    return "" if metric.higher_is_better else ", lower is better"
