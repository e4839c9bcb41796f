"""The content of a report: its numbers as text, the rows of its tables, and its sentences."""

import math
from collections import Counter
from typing import Optional

from dropkey.metrics import Metric
from dropkey.reproduction.comparison import Cell, Comparison
from dropkey.reproduction.statistics import Difference

NONE, UNKNOWN = "–", "not known"


def number(value: Optional[float], digits: int, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def interval(one: Difference, digits: int) -> str:
    return NONE if one.low is None else f"[{number(one.low, digits, '+')}, {number(one.high, digits, '+')}]"


def p_value(p: Optional[float]) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}".rstrip("0").rstrip(".") if p < 1 else "1"


def mean(cell: Cell, metric: Metric) -> str:
    """mean ± sample deviation (n), or (3/5) where seeds are missing"""
    done, seeds = len(cell.values), len(cell.values) + len(cell.unfinished)
    count = f"({done})" if done == seeds else f"({done}/{seeds})"
    if cell.estimate is None:
        return f"{NONE} {count}"
    spread = "" if cell.estimate.deviation is None else f" ± {number(cell.estimate.deviation, metric.digits)}"
    return f"{number(cell.estimate.mean, metric.digits)}{spread} {count}"


def in_brackets(cell: Cell, metric: Metric) -> str:
    one = cell.to_baseline
    return f"{number(one.mean, metric.digits, '+')} {interval(one, metric.digits)}" if one else NONE


def named(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def in_units(metric: Metric) -> str:
    """What a difference of this metric is measured in."""
    unit = "percentage points" if metric.unit == "%" else metric.unit
    return f"{metric.label} ({unit})" if unit else metric.label


# ------------------------------------------------------------------------------------------- tables of the report


def overview(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    table = comparison.table
    head = ["", *[f"ours: {column}" for column in table.columns], *[f"paper: {column}" for column in table.paper]]
    rows = []
    for row in table.rows:
        ours = [mean(comparison.cells[row, column], comparison.metric) for column in table.columns]
        rows.append([row, *ours, *papers(comparison, row)])
    return head, rows


def papers(comparison: Comparison, row: str) -> list[str]:
    values = [results.get(row) for results in comparison.table.paper.values()]
    return [UNKNOWN if value is None else number(value, comparison.metric.digits) for value in values]


def claims(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    several = len(comparison.table.columns) > 1
    head = ["claim", *["column"] * several, "difference", "95 % interval", "seeds", "t-test p, Holm", "verdict"]
    rows, digits = [], comparison.metric.digits
    for found in comparison.findings:
        one = found.difference
        numbers = [NONE] * 4
        if one:
            numbers = [number(one.mean, digits, "+"), interval(one, digits), str(one.n), p_value(one.adjusted)]
        rows.append([str(found.claim), *[found.column] * several, *numbers, found.verdict])
    return head, rows


def differences(comparison: Comparison, column: str) -> tuple[list[str], list[list[str]]]:
    digits, cells = comparison.metric.digits, comparison.column(column)
    others = {metric.key: (named(metric), metric.digits) for metric in comparison.metrics[1:]}
    others["train_loss"] = ("training loss", 3)
    if any(cell.others["entropy"] for cell in cells):
        others["entropy"] = ("entropy", 3)
    head = ["", "difference", "95 % interval", "sign-flip p", "Holm", *(label for label, _ in others.values())]
    rows = []
    for cell in cells:
        one, numbers = cell.to_baseline, [NONE] * 4
        if cell.row == comparison.table.baseline:
            numbers = ["baseline", "", "", ""]
        elif one:
            p = f"{p_value(one.p)} (least {p_value(one.least_p)})"
            numbers = [number(one.mean, digits, "+"), interval(one, digits), p, p_value(one.adjusted)]
        found = [(cell.others[key], digits) for key, (_, digits) in others.items()]
        rows.append([cell.row, *numbers, *(number(one and one.mean, digits) for one, digits in found)])
    return head, rows


# --------------------------------------------------------------------------------------------------------- sentences


def about(comparison: Comparison) -> str:
    table = comparison.table
    runs = "; ".join(f"{column}: {trainings(comparison, column)}" for column in table.columns)
    overrides = f" Overrides of every run: `{' '.join(comparison.overrides)}`." if comparison.overrides else ""
    return f"Scale `{table.scale}`: {table.about}. Ours is {runs}.{overrides}"


def trainings(comparison: Comparison, column: str) -> str:
    """Data, resolution and length of the baseline's training, and the rows that were trained in another way."""
    facts = {entry["row"]: entry["facts"] for entry in comparison.records if entry["column"] == column}
    usual = facts[comparison.table.baseline]
    others: dict[str, list[str]] = {}
    for label, row in comparison.table.rows.items():
        if facts[label] != usual:
            start = f", starting from the runs of '{row.of}'" if row.of else ""
            others.setdefault(facts[label] + start, []).append(f"'{label}'")
    return "; ".join([usual, *(f"{' and '.join(labels)}: {how}" for how, labels in others.items())])


def overview_caption(comparison: Comparison) -> str:
    text = "Mean ± sample standard deviation over seeds (number of seeds)."
    means = [cell.estimate.mean for cell in comparison.cells.values() if cell.estimate]
    if comparison.metric.proportion and means:
        share, count = sum(means) / len(means) / 100, min(entry["samples"] for entry in comparison.done)
        error = number(100 * math.sqrt(share * (1 - share) / count), 2)
        text += f" The choice of the {count:,} test samples adds ± {error} (binomial standard error), which is the same"
        text += " for all rows and not in the deviations."
    if comparison.table.paper:
        text += " The paper's numbers are from other models, resolutions and trainings: compare orders, not values."
    return text


def unfinished(comparison: Comparison) -> list[str]:
    found = []
    for (row, column), cell in comparison.cells.items():
        for state, reason in dict.fromkeys(cell.unfinished.values()):
            seeds = ", ".join(str(seed) for seed, how in cell.unfinished.items() if how == (state, reason))
            place = f"{row}, {column}" if len(comparison.table.columns) > 1 else row
            found.append(f"{place}, seed {seeds}: {state}{': ' + reason if reason else ''}")
    return found


def provenance(comparison: Comparison) -> list[str]:
    done = comparison.done
    if not done:
        return ["no run is finished yet"]

    def counted(values: list[str]) -> str:
        counts = Counter(values)
        return values[0] if len(counts) == 1 else ", ".join(f"{value} ({n} cells)" for value, n in counts.items())

    parts = sorted({part for entry in done for part in entry["code"]})
    code = [f"{part} {counted([e['code'][part] for e in done if part in e['code']])}" for part in parts]
    trained = {entry["run"]: entry["seconds"] for entry in done}
    return [
        f"code: {', '.join(code)}",
        *(f"{key}: {counted([str(entry[key]) for entry in done])}" for key in ("commit", "torch", "hardware", "data")),
        f"{len(trained)} runs, {sum(trained.values()) / 3600:.1f} hours of training in total",
        f"{len(done)} of {len(comparison.records)} cells and seeds finished",
    ]
