"""The report's pictures as SVG, the same to the byte from the same records."""

import io
import math

import matplotlib

from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.statistics import estimate

matplotlib.use("svg")
import matplotlib.pyplot as plt  # after the choice of what draws

STEADY = {"svg.hashsalt": "dropkey", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
STEADY |= {"axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left"}
# Tol's "bright" and "muted" schemes, told apart with any kind of colour vision; the baseline is grey
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#332288", "#dd7733", "#222222", "#44aa99")
GREY = "#666666"
DASHES = ("-", "--", ":")


def save(figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return text.getvalue()


def forest(comparison: Comparison) -> str:
    """Differences to the baseline with 95 % intervals, a panel per column; every seed's difference as a dot."""
    table = comparison.table
    rows = [row for row in table.rows if row != table.baseline]
    with matplotlib.rc_context(STEADY):
        count = len(table.columns)
        size = (2.8 + 3.6 * count, 1.1 + 0.34 * len(rows))
        figure, axes = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, column in zip(axes[0], table.columns, strict=True):
            base = comparison.cells[table.baseline, column].values
            axis.axvline(0, color=GREY, linewidth=1)
            for height, row in enumerate(rows):
                cell = comparison.cells[row, column]
                one = cell.to_baseline
                if one is None:
                    continue
                if one.low is not None:
                    axis.plot(
                        [one.low, one.high], [height, height], color=COLOURS[0], linewidth=2, solid_capstyle="butt"
                    )
                dots = [cell.values[seed] - base[seed] for seed in sorted(cell.values.keys() & base.keys())]
                axis.plot(dots, [height + 0.22] * len(dots), ".", color=GREY, markersize=4, alpha=0.7)
                axis.plot(one.mean, height, "s", color=COLOURS[0], markersize=6)
            axis.set_title(column)
            axis.set_xlabel(f"top-1 minus that of '{table.baseline}' (points)")
            axis.set_yticks(range(len(rows)), rows)
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", alpha=0.25)
            axis.spines["left"].set_visible(False)
        return save(figure)


def curves(comparison: Comparison) -> str:
    """Training loss and watched top-1 over epochs: mean and a band of one sample deviation; rows that were not
    trained but evaluated have none."""
    table = comparison.table
    trained = [row for row in table.rows.values() if not row.evaluate]
    with matplotlib.rc_context(STEADY):
        count = len(table.columns)
        size = (11, 0.4 + 3.3 * count + 0.18 * math.ceil(len(trained) / 3))
        figure, axes = plt.subplots(count, 2, figsize=size, squeeze=False, layout="constrained")
        for (left, right), column in zip(axes, table.columns, strict=True):
            for number, row in enumerate(trained):
                style = look(number, row.label == table.baseline)
                lines = [
                    entry["curve"]
                    for entry in comparison.done
                    if (entry["row"], entry["column"]) == (row.label, column) and entry.get("curve")
                ]
                band(left, lines, 1, style, row.label)
                band(right, lines, 2, style, row.label)
            left.set(ylabel="training loss", title=column if count > 1 else "")
            right.set(ylabel="top-1 (%)")
            for axis in (left, right):
                axis.set_xlabel("epoch")
                axis.grid(alpha=0.25)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        return save(figure)


def entropy(comparison: Comparison) -> str:
    """Normalised entropy of attention over depth: means over heads and seeds, bars of one sample deviation over
    seeds."""
    table = comparison.table
    trained = [row.label for row in table.rows.values() if not row.evaluate]
    with matplotlib.rc_context(STEADY):
        count = len(table.columns)
        size = (3 + 4.2 * count, 3.2 + 0.18 * math.ceil(len(trained) / (1 + count)))
        figure, axes = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, column in zip(axes[0], table.columns, strict=True):
            for number, row in enumerate(trained):
                runs = [
                    entry["heads"]
                    for entry in comparison.done
                    if (entry["row"], entry["column"]) == (row, column) and entry.get("heads")
                ]
                layers = [
                    estimate([sum(run[i]) / len(run[i]) for run in runs]) for i in range(len(runs[0]) if runs else 0)
                ]
                shift = 0.4 * ((number + 0.5) / len(trained) - 0.5)  # bars side by side
                axis.errorbar(
                    [layer + shift for layer in range(1, len(layers) + 1)],
                    [one.mean for one in layers],
                    [one.deviation or 0 for one in layers],
                    **look(number, row == table.baseline),
                    label=row,
                    linewidth=1.5,
                    elinewidth=0.8,
                    marker="o",
                    markersize=3,
                )
            axis.set(xlabel="attention layer", title=column if count > 1 else "")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.25)
        axes[0][0].set_ylabel("entropy of attention / log K")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1 + count, frameon=False)
        return save(figure)


def look(number: int, baseline: bool) -> dict:
    if baseline:
        return {"color": GREY, "linestyle": "-"}
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def band(axis, lines: list[list], place: int, style: dict, label: str) -> None:
    """One row's mean over seeds; the seeds' curves are cut to the shortest."""
    values: dict[int, list[float]] = {}
    for line in lines:
        for point in line:
            if point[place] is not None:
                values.setdefault(point[0], []).append(point[place])
    found = {epoch: estimate(seen) for epoch, seen in sorted(values.items()) if len(seen) == len(lines)}
    if not found:
        return
    means = [one.mean for one in found.values()]
    axis.plot(list(found), means, label=label, linewidth=1.5, **style)
    if len(lines) > 1:
        low = [one.mean - one.deviation for one in found.values()]
        high = [one.mean + one.deviation for one in found.values()]
        axis.fill_between(list(found), low, high, color=style["color"], alpha=0.15, linewidth=0)
