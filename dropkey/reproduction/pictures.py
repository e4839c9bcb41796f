"""The report's pictures as SVG. The same records give the same bytes."""

import math

from dropkey.metrics import Metric
from dropkey.plotting import COLORS, GREY, INK, PALE, save, style, subplots
from dropkey.reproduction import content, tuning
from dropkey.reproduction.comparison import Comparison, contrasts, row_values
from dropkey.reproduction.statistics import estimate

DASHES = ("-", "--", ":")


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
        for number, (row, column) in enumerate(places):
            curve = tuning.budget_curve(records, row, column)
            label, color = f"{row}, {column}" if several else row, COLORS[number % len(COLORS)]
            axes[0][0].plot(range(1, len(curve) + 1), curve, marker="o", markersize=4, color=color, label=label)
        axes[0][0].set(xlabel="candidates tried", ylabel=f"expected test {content.named(metric)}")
        axes[0][0].xaxis.get_major_locator().set_params(integer=True)
        axes[0][0].grid()
        legend(figure, axes, 2)
        return save(figure)


def unit_of(metric: Metric) -> str:
    return f" ({'points' if metric.unit == '%' else metric.unit})" if metric.unit else ""


def better(metric: Metric) -> str:
    return "" if metric.higher_is_better else ", lower is better"
