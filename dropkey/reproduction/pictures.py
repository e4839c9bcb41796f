"""The report's pictures as SVG. The same records give the same bytes."""

import math

from dropkey.plotting import COLORS, GREY, save, style, subplots
from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.statistics import estimate

DASHES = ("-", "--", ":")


def forest(comparison: Comparison) -> str:
    """Differences to the baseline with 95 % intervals, a panel per column; every seed's difference is a dot."""
    table, metric = comparison.table, comparison.metric
    rows = [row for row in table.rows if row != table.baseline]
    unit = f" ({'points' if metric.unit == '%' else metric.unit})" if metric.unit else ""
    better = "" if metric.higher_is_better else ", lower is better"
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
            axis.set_xlabel(f"{metric.label} minus that of '{table.baseline}'{unit}{better}")
            axis.set_yticks(range(len(rows)), rows)
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
        return save(figure)


def curves(comparison: Comparison) -> str:
    """Training loss and the watched metric over epochs: mean over seeds, and a band of one sample deviation. Rows that
    were evaluated, not trained, have none."""
    metric, count = comparison.metric, len(comparison.table.columns)
    trained = trained_rows(comparison)
    with style():
        size = (11, 0.4 + 3.3 * count + 0.18 * math.ceil(len(trained) / 3))
        figure, axes = subplots(count, 2, size)
        for pair, column in zip(axes, comparison.table.columns, strict=True):
            for row, look in trained.items():
                lines = [entry["curve"] for entry in comparison.done_in(row, column) if entry.get("curve")]
                for axis, place in zip(pair, (1, 2), strict=True):
                    band(axis, lines, place, look, row)
            pair[0].set(ylabel="training loss", title=column if count > 1 else "")
            pair[1].set(ylabel=f"{metric.label} ({metric.unit})" if metric.unit else metric.label)
            for axis in pair:
                axis.set_xlabel("epoch")
                axis.grid()
        legend(figure, axes, 3)
        return save(figure)


def entropy(comparison: Comparison) -> str:
    """Normalised entropy of attention over depth: means over heads and seeds, bars of one sample deviation over
    seeds."""
    count, trained = len(comparison.table.columns), trained_rows(comparison)
    with style():
        size = (3 + 4.2 * count, 3.2 + 0.18 * math.ceil(len(trained) / (1 + count)))
        figure, axes = subplots(1, count, size, sharey=True)
        for axis, column in zip(axes[0], comparison.table.columns, strict=True):
            for number, (row, look) in enumerate(trained.items()):
                runs = [entry["heads"] for entry in comparison.done_in(row, column) if entry.get("heads")]
                layers = [estimate([sum(heads) / len(heads) for heads in layer]) for layer in zip(*runs, strict=True)]
                shift = 0.4 * ((number + 0.5) / len(trained) - 0.5)  # bars side by side
                places = [layer + shift for layer in range(1, len(layers) + 1)]
                spread = [one.deviation or 0 for one in layers]
                lines = {"linewidth": 1.5, "elinewidth": 0.8, "marker": "o", "markersize": 3, **look}
                axis.errorbar(places, [one.mean for one in layers], spread, label=row, **lines)
            axis.set(xlabel="attention layer", title=column if count > 1 else "")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid()
        axes[0][0].set_ylabel("entropy of attention / log K")
        legend(figure, axes, 1 + count)
        return save(figure)


def trained_rows(comparison: Comparison) -> dict[str, dict]:
    """Label -> colour and dashes."""
    trained = [row.label for row in comparison.table.rows.values() if not row.evaluate]
    looks = [
        {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i in range(len(trained))
    ]
    return dict(zip(trained, looks, strict=True)) | {comparison.table.baseline: {"color": GREY, "linestyle": "-"}}


def band(axis, lines: list[list], place: int, look: dict, label: str) -> None:
    """One row's mean over seeds, at the epochs that all its seeds have."""
    values: dict[int, list[float]] = {}
    for point in (point for line in lines for point in line if point[place] is not None):
        values.setdefault(point[0], []).append(point[place])
    found = {epoch: estimate(seen) for epoch, seen in sorted(values.items()) if len(seen) == len(lines)}
    means = [one.mean for one in found.values()]
    if found:
        axis.plot(list(found), means, label=label, linewidth=1.5, **look)
    if len(lines) > 1:
        low = [one.mean - one.deviation for one in found.values()]
        high = [one.mean + one.deviation for one in found.values()]
        axis.fill_between(list(found), low, high, color=look["color"], alpha=0.15, linewidth=0)


def legend(figure, axes, columns: int) -> None:
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
