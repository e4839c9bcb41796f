"""The content of a report: its numbers as text, the rows of its tables, and its sentences."""

from typing import Optional

from dropkey.metrics import Metric
from dropkey.reproduction import results, statistics, tuning
from dropkey.reproduction.comparison import Cell, Comparison, Finding, contrasts, row_values
from dropkey.reproduction.jobs import row_overrides
from dropkey.reproduction.statistics import Estimate
from dropkey.reproduction.tables import Row, Table

NONE, UNKNOWN = "–", "not known"
PHASES = ("validation", "test")


def number(value: Optional[float], digits: int, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def interval(one: Estimate, digits: int) -> str:
    return NONE if one.low is None else ends(one.low, one.high, digits)


def ends(low: float, high: float, digits: int) -> str:
    return f"[{number(low, digits, '+')}, {number(high, digits, '+')}]"


def spread(one: Estimate, digits: int) -> str:
    """mean ± sample deviation"""
    text = "" if one.deviation is None else f" ± {number(one.deviation, digits)}"
    return f"{number(one.mean, digits)}{text}"


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
    return f"{spread(cell.estimate, metric.digits)} {count}"


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


def recipes(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """How every row is trained: regularizer, ratio over depth, and the overrides that make it this row. A row that was
    tuned in each column by itself has a line for each."""
    table, rows = comparison.table, []
    known = results.settings_of(comparison.head)
    for label, row in table.rows.items():
        lines: dict[tuple, list[str]] = {}
        for column in table.columns:
            lines.setdefault(recipe(table, row, column, known.get((label, column), {})), []).append(column)
        for line, columns in lines.items():
            rows.append([label if len(lines) == 1 else f"{label}: {', '.join(columns)}", *line])
    return ["", "regularizer", "ratio, first layer → last", "overrides"], rows


def recipe(table: Table, row: Row, column: str, settings: dict) -> tuple[str, str, str]:
    """Of one row in one column, all but its label; `settings` are the flat keys of its config."""
    overrides = row_overrides(table, row, column)
    text = f"best of {len(row.candidates)} candidates, not known yet" if overrides is None else " ".join(overrides)
    if row.of is not None:
        text = " ".join(row.evaluate or row.overrides) + f"; starts from the runs of '{row.of}'"
    name, ratio = settings.get("regularizer.name", NONE), settings.get("regularizer.ratio")
    if name == "none" or ratio is None:
        return name, NONE, text
    end = settings.get("schedule.end", 0.0)
    shown = {"decreasing": f"{ratio:g} → {end:g}", "increasing": f"{end:g} → {ratio:g}"}
    return name, shown.get(settings["schedule.name"], f"{ratio:g}"), text


def papers(comparison: Comparison, row: str) -> list[str]:
    values = [results.get(row) for results in comparison.table.paper.values()]
    return [UNKNOWN if value is None else number(value, comparison.metric.digits) for value in values]


def claims(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    head, rows, digits = ["claim", "difference", "95 % interval", "seeds", "p", "verdict"], [], comparison.metric.digits
    for found in comparison.findings:
        one = found.decision.estimate or found.difference
        numbers = [NONE] * 4
        if one:
            p = NONE if found.withheld else p_value(found.decision.p)
            numbers = [number(one.mean, digits, "+"), interval(one, digits), str(one.n), p]
        rows.append([str(found.claim), *numbers, verdict(comparison, found)])
    return head, rows


def verdict(comparison: Comparison, found: Finding) -> str:
    """On the claim that its first rows are the better ones."""
    decision, margin = found.decision, comparison.table.design.margin
    if found.withheld:
        return f"not yet: {found.withheld}"
    if decision.sign:
        text = "better" if (decision.sign > 0) == comparison.metric.higher_is_better else "worse"
        return f"{text}, but by less than {margin}" if decision.within else text
    if decision.within:
        return f"equivalent, within {margin}"
    if found.detectable is None:
        return "not decided"
    return f"not decided (a true {number(found.detectable, comparison.metric.digits)} would be found in 4 of 5 studies)"


def checks(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """What stands beside the verdicts and does not decide."""
    digits, found = comparison.metric.digits, comparison.findings
    shown = {
        "detectable": lambda one: number(one.detectable, digits),
        "equivalence p": lambda one: p_value(one.decision.equivalence_p),
        "pooled error": lambda one: one.pooled and f"{ends(*one.pooled[:2], digits)}, p {p_value(one.pooled[2])}",
        "sign-flip p": lambda one: (
            one.difference and f"{p_value(one.difference.flip_p)} (least {p_value(one.difference.least_flip_p)})"
        ),
        "new samples too": lambda one: one.sampling and f"± {number(one.sampling.both, digits)}",
        "lost runs at the worst": lambda one: (
            one.worst and f"{number(one.worst.mean, digits, '+')} {interval(one.worst, digits)}"
        ),
    }
    waiting = any(one.withheld for one in found)  # no p before the plan is finished
    hidden = {"equivalence p": waiting or comparison.table.design.margin is None}
    hidden |= {"pooled error": waiting, "sign-flip p": waiting}
    hidden |= {"new samples too": all(one.sampling is None for one in found)}
    hidden |= {"lost runs at the worst": all(one.worst is None for one in found)}
    shown = {label: show for label, show in shown.items() if not hidden.get(label)}
    rows = [[str(one.claim), *(show(one) or NONE for show in shown.values())] for one in found]
    return ["claim", *shown], rows


def other_metrics(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The claims' differences in the metrics that are not compared."""
    others, rows = comparison.other_metrics, []
    for claim in comparison.table.claims:
        values = [row_values(comparison, comparison.table.columns, metric.key) for metric in others]
        found = [statistics.contrast(contrasts(one, claim)) for one in values]
        shown = [
            f"{number(one.mean, metric.digits, '+')} {interval(one, metric.digits)}" if one else NONE
            for one, metric in zip(found, others, strict=True)
        ]
        rows.append([str(claim), *shown])
    return ["claim", *map(in_units, others)], rows


def over_columns(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A claim in every column, and the mean over such columns with its heterogeneity."""
    digits, rows = comparison.metric.digits, []
    for claim, (found, summary) in comparison.summaries.items():
        columns = [
            f"{number(found[column].mean, digits, '+')} {interval(found[column], digits)}" if column in found else NONE
            for column in comparison.table.columns
        ]
        last = [NONE] * 3
        if summary:
            mean = f"{number(summary.mean, digits, '+')} {ends(summary.low, summary.high, digits)}"
            last = [mean, number(summary.tau, digits), p_value(summary.equal_p)]
        rows.append([claim, *columns, *last])
    return ["claim", *comparison.table.columns, "mean over such columns", "tau", "p, equal columns"], rows


def candidates(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Every candidate of every tuned row, the best first."""
    several = len({entry["column"] for entry in comparison.head["tuning"]}) > 1
    digits, rows = comparison.metric.digits, []
    for row, column in tuned(comparison):
        entries = tuning.ranked(comparison.head["tuning"], row, column)
        own = [entry for entry in comparison.head["tuning"] if (entry["row"], entry["column"]) == (row, column)]
        for entry in [*entries, *(entry for entry in own if entry not in entries)]:
            means = [statistics.estimate(tuning.values(entry, phase)) for phase in PHASES]
            shown = [NONE if one is None else spread(one, digits) for one in means]
            shown[0] += "" if entry in entries else " (a run diverged)"
            rows.append([row, *[column] * several, entry["candidate"], *shown])
    return ["row", *["column"] * several, "candidate", *PHASES], rows


def tuned(comparison: Comparison) -> list[tuple[str, str]]:
    """(row, column) of everything that was tuned."""
    return list(dict.fromkeys((entry["row"], entry["column"]) for entry in comparison.head["tuning"]))


def differences(comparison: Comparison, column: str) -> tuple[list[str], list[list[str]]]:
    digits, cells = comparison.metric.digits, comparison.column(column)
    others = {metric.key: (named(metric), metric.digits) for metric in comparison.other_metrics}
    others["train_loss"] = ("training loss", 3)
    if any(cell.others["entropy"] for cell in cells):
        others["entropy"] = ("entropy", 3)
    head = ["", "difference", "95 % interval", *(label for label, _ in others.values())]
    rows = []
    for cell in cells:
        one, numbers = cell.to_baseline, [NONE] * 2
        if cell.row == comparison.table.baseline:
            numbers = ["baseline", ""]
        elif one:
            numbers = [number(one.mean, digits, "+"), interval(one, digits)]
        found = [(cell.others[key], digits) for key, (_, digits) in others.items()]
        rows.append([cell.row, *numbers, *(number(one and one.mean, digits) for one, digits in found)])
    return head, rows
