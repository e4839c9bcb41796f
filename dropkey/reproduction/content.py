"""The content of a report: its numbers as text, the rows of its tables, and its sentences."""

import itertools
import math
from collections import Counter
from typing import Optional

from dropkey.metrics import Metric
from dropkey.reproduction import sequential, statistics, tuning
from dropkey.reproduction.comparison import Cell, Comparison, Finding, contrasts, row_values
from dropkey.reproduction.statistics import Estimate

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
    if found.withheld:
        return f"not yet: {found.withheld}"
    words, margin = found.decision.verdict, comparison.table.design.margin
    if not comparison.metric.higher_is_better:
        words = {"higher": "lower", "lower": "higher"}.get(words.split(",")[0], words) + words.partition(",")[1:][-1]
    if words == sequential.EQUIVALENT:
        return f"equivalent, within {margin}"
    if words == sequential.UNDECIDED:
        found_too = number(found.detectable, comparison.metric.digits)
        return "not decided" if found.detectable is None else f"not decided ({found_too} would have been found)"
    text = "better" if words.startswith("higher") else "worse"
    return f"{text}, but by less than {margin}" if found.decision.verdict in sequential.WITHIN else text


def checks(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """What stands beside the verdicts and does not decide."""
    digits, found = comparison.metric.digits, comparison.findings
    shown = {
        "detectable": lambda one: number(one.detectable, digits),
        "equivalence p": lambda one: p_value(None if one.withheld else one.decision.equivalence_p),
        "pooled error": lambda one: one.pooled and f"{ends(*one.pooled[:2], digits)}, p {p_value(one.pooled[2])}",
        "sign-flip p": lambda one: one.difference and f"{p_value(one.difference.flip_p)}",
        "new samples too": lambda one: one.sampling and f"± {number(one.sampling.both, digits)}",
        "lost runs at their worst": lambda one: (
            one.worst and f"{number(one.worst.mean, digits, '+')} {interval(one.worst, digits)}"
        ),
    }
    hidden = {"equivalence p": comparison.table.design.margin is None}
    hidden |= {"new samples too": all(one.sampling is None for one in found)}
    hidden |= {"lost runs at their worst": all(one.worst is None for one in found)}
    shown = {label: show for label, show in shown.items() if not hidden.get(label)}
    rows = [[str(one.claim), *(show(one) or NONE for show in shown.values())] for one in found]
    return ["claim", *shown], rows


def other_metrics(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The claims' differences in the metrics that are not compared."""
    others, rows = comparison.metrics[1:], []
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
        last = [NONE] * 4
        if summary:
            mean = f"{number(summary.mean, digits, '+')} {ends(summary.low, summary.high, digits)}"
            other = (
                NONE if summary.predicted_low is None else ends(summary.predicted_low, summary.predicted_high, digits)
            )
            last = [mean, number(summary.tau, digits), f"{100 * summary.i_squared:.0f} %", other]
        rows.append([claim, *columns, *last])
    return ["claim", *comparison.table.columns, "mean over such columns", "tau", "I²", "another column"], rows


def candidates(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Every candidate of every tuned row, the best first."""
    several = len({entry["column"] for entry in comparison.head["tuning"]}) > 1
    digits, rows = comparison.metric.digits, []
    for row, column in tuned(comparison):
        entries = tuning.ranked(comparison.head["tuning"], row, column)
        lost = [entry for entry in comparison.head["tuning"] if tuning.score(entry) is None]
        for entry in [*entries, *(one for one in lost if (one["row"], one["column"]) == (row, column))]:
            values = [statistics.estimate([v for v in entry[key].values() if v is not None]) for key in PHASES]
            shown = [NONE if one is None else spread(one, digits) for one in values]
            shown[0] += "" if entry in entries else " (a run failed)"
            rows.append([row, *[column] * several, entry["candidate"], *shown])
    return ["row", *["column"] * several, "candidate", *PHASES], rows


def tuned(comparison: Comparison) -> list[tuple[str, str]]:
    """(row, column) of everything that was tuned."""
    return list(dict.fromkeys((entry["row"], entry["column"]) for entry in comparison.head.get("tuning", [])))


def differences(comparison: Comparison, column: str) -> tuple[list[str], list[list[str]]]:
    digits, cells = comparison.metric.digits, comparison.column(column)
    others = {metric.key: (named(metric), metric.digits) for metric in comparison.metrics[1:]}
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


# --------------------------------------------------------------------------------------------------------- sentences


def about(comparison: Comparison) -> str:
    table = comparison.table
    runs = "; ".join(f"{column}: {trainings(comparison, column)}" for column in table.columns)
    overrides = (
        f" Overrides of every run: `{' '.join(comparison.head['overrides'])}`." if comparison.head["overrides"] else ""
    )
    return f"Scale `{table.scale}`: {table.about}. Ours is {runs}.{overrides}"


def plan(comparison: Comparison) -> list[str]:
    """How many seeds were planned, by which protocol, and whether the plan was changed on the way."""
    table, head = comparison.table, comparison.head
    looks, found = table.design.looks, []
    count = f"{looks[-1]} seeds" if len(looks) == 1 else f"at most {looks[-1]} seeds"
    text = f"Planned: {count}"
    if len(looks) > 1:
        text += f", with a look at the claims after {listed(looks)}; the runs end when all are decided"
    found.append(f"{text}. Run: {len(head['seeds'])}.")
    if table.protocol:
        found.append(f"The study follows `{table.protocol}` (hash `{head['protocol']}`).")
    for earlier in head.get("earlier_designs", []):
        found.append(
            f"**The plan was changed after results had been seen: before, it was {len(earlier['seeds'])} seeds with "
            f"looks after {listed(earlier['looks'])}. The p below do not know of that.**"
        )
    return found


def listed(numbers) -> str:
    numbers = list(map(str, numbers))
    steady = len(numbers) > 4 and all(int(b) - int(a) == 1 for a, b in itertools.pairwise(numbers))
    if steady:
        return f"each of {numbers[0]} to {numbers[-1]}"
    return f"{', '.join(numbers[:-1])} and {numbers[-1]}" if len(numbers) > 1 else numbers[0]


def errors(comparison: Comparison) -> list[str]:
    """One error estimate per column, pooled over rows, beside what pairing by seed removes."""
    digits, found = comparison.metric.digits, []
    for column, one in comparison.errors.items():
        if one is not None:
            place = f"{column}: a" if len(comparison.errors) > 1 else "A"
            found.append(
                f"{place} run varies by {number(one.deviation, digits)} within its row and seed (pooled over rows, "
                f"{one.df} degrees of freedom); pairing by seed removes {100 * one.seed_share:.0f} % of the variance."
            )
    return found


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
