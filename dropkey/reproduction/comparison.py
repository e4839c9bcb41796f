"""From records to results: the estimate of every cell, and what the runs say about every claim."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from dropkey.metrics import Metric
from dropkey.reproduction import power, sequential, statistics
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED
from dropkey.reproduction.results import correct_samples
from dropkey.reproduction.sequential import Decision
from dropkey.reproduction.statistics import Difference, Estimate, PooledError, SamplingError, Summary
from dropkey.reproduction.tables import FEWEST, Claim, Table

NEAR = 0.3  # how far our baseline may be from the published one, in the metric's unit
Values = dict[str, dict[int, float]]  # row -> seed -> a metric, averaged over columns


@dataclass(frozen=True)
class Cell:
    """One row in one column: all its seeds."""

    row: str
    column: str
    values: dict[int, float]  # seed -> the compared metric
    unfinished: dict[int, tuple[str, str]]  # seed -> state, reason
    estimate: Optional[Estimate]
    others: dict[str, Optional[Estimate]]  # the other metrics, train_loss, entropy
    to_baseline: Optional[Difference] = None  # None for the baseline, and without common seeds


@dataclass(frozen=True)
class Finding:
    """What the runs say about a claim. Differences are the better rows minus the worse ones."""

    claim: Claim
    difference: Optional[Difference]  # over all seeds that have it, tested or not
    decision: Decision  # at the last look that is over
    withheld: str = ""  # why there is no verdict yet
    pooled: Optional[tuple[float, float, float]] = None  # low, high and p with the error of all rows
    sampling: Optional[SamplingError] = None  # in the metric's unit
    detectable: Optional[float] = None  # the smallest difference that would have been found with 80 % power
    worst: Optional[Difference] = None  # with runs that failed or diverged at the worst finished value; None without

    @property
    def is_decided(self) -> bool:
        return not self.withheld and (self.decision.sign != 0 or self.decision.within)


@dataclass(frozen=True)
class Comparison:
    """A table's results. The first of `metrics` is compared."""

    table: Table
    head: dict
    records: list[dict]
    mixed: list[str]  # what should be the same in all runs and is not
    cells: dict[tuple[str, str], Cell]  # (row, column)
    findings: list[Finding] = field(default_factory=list)
    summaries: dict[str, tuple[dict[str, Difference], Optional[Summary]]] = field(default_factory=dict)  # by claim
    error: Optional[PooledError] = None  # of a run's mean over columns

    @property
    def metrics(self) -> list[Metric]:
        return [Metric(**metric) for metric in self.head["metrics"]]

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    @property
    def other_metrics(self) -> list[Metric]:
        """Without those that have no meaning for the samples of any run."""
        known = {key for entry in self.done for key, value in entry.items() if value is not None}
        return [metric for metric in self.metrics[1:] if metric.key in known]

    @property
    def done(self) -> list[dict]:
        return [entry for entry in self.records if entry["state"] == DONE]

    @property
    def look(self) -> Optional[int]:
        """The last look that is over; None before the first."""
        return next((found.decision.look for found in self.findings), None)

    @property
    def decided(self) -> bool:
        return bool(self.findings) and all(found.is_decided for found in self.findings)

    def column(self, name: str) -> list[Cell]:
        return [self.cells[row, name] for row in self.table.rows]

    def done_in(self, row: str, column: str) -> list[dict]:
        return [entry for entry in self.done if (entry["row"], entry["column"]) == (row, column)]


def compare(table: Table, head: dict, records: list[dict], mixed: list[str]) -> Comparison:
    """Compares last epochs, never best ones. Pairs share a seed: initialisation, order of the data, and with
    data.split_seed=run the training samples."""
    metrics = [Metric(**metric) for metric in head["metrics"]]
    cells = {}
    for column in table.columns:
        base = None
        for row in dict.fromkeys((table.baseline, *table.rows)):
            here = [entry for entry in records if (entry["row"], entry["column"]) == (row, column)]
            cells[row, column] = cell(row, column, here, metrics, base)
            base = base or cells[row, column]
    cells = {(row, column): cells[row, column] for row in table.rows for column in table.columns}
    found = Comparison(table, head, records, mixed, cells)
    if not metrics:
        return found
    found.findings.extend(findings(found))
    for claim in table.claims if len(table.columns) > 1 else ():
        found.summaries[claim.label] = over_columns(found, claim)
    return replace(found, error=statistics.pooled_error(trained_values(found, table.columns)))


def cell(row: str, column: str, records: list[dict], metrics: list[Metric], base: Optional[Cell]) -> Cell:
    done = [entry for entry in records if entry["state"] == DONE]
    values = {entry["seed"]: entry[metrics[0].key] for entry in done}
    others = {}
    for key in [*(metric.key for metric in metrics[1:]), "train_loss", "entropy"]:
        known = [entry[key] for entry in done if entry.get(key) is not None]
        others[key] = statistics.estimate(known) if len(known) == len(done) else None
    unfinished = {entry["seed"]: (entry["state"], entry["reason"]) for entry in records if entry["state"] != DONE}
    to_base = statistics.difference(values, base.values) if base else None
    return Cell(row, column, values, unfinished, statistics.estimate(list(values.values())), others, to_base)


# ------------------------------------------------------------------------------------------------------------ claims


def findings(comparison: Comparison) -> list[Finding]:
    """Every planned claim, with the decision at the last look whose seeds are all over."""
    claims, design = comparison.table.claims, comparison.table.design
    numbers = [contrasts(row_values(comparison, comparison.table.columns), claim) for claim in claims]
    decisions = [Decision()] * len(claims)
    if design.looks[-1] >= FEWEST:
        decisions = sequential.decide(numbers, design.seeds, seeds_over(comparison), design.looks, design.margin)
    trained = trained_values(comparison, comparison.table.columns)
    return [finding(comparison, trained, *one) for one in zip(claims, numbers, decisions, strict=True)]


def finding(
    comparison: Comparison, trained: Values, claim: Claim, values: dict[int, float], decision: Decision
) -> Finding:
    one, table = statistics.contrast(values), comparison.table
    error, pooled, detectable = statistics.pooled_error(trained), None, None
    if one and error and all(table.rows[row].of is None for row in claim.rows):
        weights = 1 / len(claim.better) + 1 / len(claim.worse)
        pooled = statistics.pooled_interval(one.mean, weights, one.n, error)
    if one and one.deviation:
        detectable = power.detectable(one.n, one.deviation, (1 - statistics.LEVEL) / len(table.claims))
    return Finding(
        claim,
        one,
        decision,
        withheld=reason_to_wait(comparison, decision),
        pooled=pooled,
        sampling=sampling(comparison, claim),
        detectable=detectable,
        worst=worst_case(comparison, claim),
    )


def row_values(comparison: Comparison, columns: Iterable[str], key: Optional[str] = None) -> Values:
    """Means over the columns, for the seeds that are finished in all of them; of the metric `key`, or the compared
    one."""
    key, found = key or comparison.metric.key, {}
    for row in comparison.table.rows:
        parts = [
            {entry["seed"]: entry[key] for entry in comparison.done_in(row, column) if entry[key] is not None}
            for column in columns
        ]
        common = set.intersection(*(set(part) for part in parts))
        found[row] = {seed: sum(part[seed] for part in parts) / len(parts) for seed in sorted(common)}
    return found


def contrasts(values: Values, claim: Claim) -> dict[int, float]:
    """Seed -> mean of the better rows minus mean of the worse ones."""
    common = set.intersection(*(set(values[row]) for row in claim.rows))
    return {
        seed: sum(values[row][seed] for row in claim.better) / len(claim.better)
        - sum(values[row][seed] for row in claim.worse) / len(claim.worse)
        for seed in sorted(common)
    }


def seeds_over(comparison: Comparison) -> int:
    """How many leading planned seeds have no run that is still to be finished."""
    left = {entry["seed"] for entry in comparison.records if entry["state"] not in (DONE, FAILED, DIVERGED)}
    known, count = {entry["seed"] for entry in comparison.records}, 0
    for seed in comparison.table.design.seeds:
        if seed in left or seed not in known:
            break
        count += 1
    return count


def reason_to_wait(comparison: Comparison, decision: Decision) -> str:
    """Why there is no verdict: too few seeds, or a baseline that is not the published one."""
    table, design = comparison.table, comparison.table.design
    if design.looks[-1] < FEWEST:
        return f"{design.looks[-1]} seeds decide nothing"
    if decision.look is None:
        over = f"{seeds_over(comparison)} of the {design.looks[0]} planned seeds finished"
        return over if set(table.seeds) & set(design.seeds) else f"{over}, others are not planned"
    if table.scale != "paper":
        return ""
    for column in table.columns:
        published = table.published.get(column)
        if published is None:
            return f"no published baseline is known for '{column}'"
        ours = comparison.cells[table.baseline, column].estimate
        if ours is None or abs(ours.mean - published) > NEAR:
            return f"'{table.baseline}' in '{column}' is not within {NEAR} of the published {published}"
    return ""


def trained_values(comparison: Comparison, columns: Iterable[str]) -> Values:
    """The rows that are trainings of their own, each training once: rows made from others have less error."""
    table, seen, found = comparison.table, set(), {}
    for row, values in row_values(comparison, columns).items():
        runs = tuple(sorted(entry["run"] for column in columns for entry in comparison.done_in(row, column)))
        if table.rows[row].of is None and values and runs not in seen:
            seen.add(runs)
            found[row] = values
    return found


def sampling(comparison: Comparison, claim: Claim) -> Optional[SamplingError]:
    """Standard errors for other seeds and other test samples, if it is known which samples each run has right."""
    right, columns = {}, comparison.table.columns
    for entry in comparison.done:
        if entry["row"] in claim.rows and comparison.metric.proportion:
            one = correct_samples(entry)
            if one is None:
                return None
            right[entry["row"], entry["column"], entry["seed"]] = one
    if len({len(one) for one in right.values()}) != 1:
        return None
    seeds = contrasts(row_values(comparison, columns), claim)
    parts = [
        sum(
            np.mean([right[row, column, seed] for row in claim.better], axis=0)
            - np.mean([right[row, column, seed] for row in claim.worse], axis=0)
            for column in columns
        )
        / len(columns)
        for seed in seeds
    ]
    found = statistics.sampling_error(np.array(parts)) if parts else None
    return found and SamplingError(100 * found.seeds, 100 * found.samples, 100 * found.both)


def worst_case(comparison: Comparison, claim: Claim) -> Optional[Difference]:
    """The difference where runs that failed or diverged have that finished value of their column that speaks most
    against the claim: for a better row the worst, for a worse row the best."""
    higher, filled, missing = comparison.metric.higher_is_better, {}, False
    for row in claim.rows:
        parts = []
        for column in comparison.table.columns:
            one = comparison.cells[row, column]
            known = [value for cell in comparison.column(column) for value in cell.values.values()]
            lost = [seed for seed, (state, _) in one.unfinished.items() if state in (FAILED, DIVERGED)]
            missing |= bool(lost)
            if lost and known:
                bad = min(known) if (row in claim.better) == higher else max(known)
                parts.append({**one.values, **dict.fromkeys(lost, bad)})
            else:
                parts.append(one.values)
        common = set.intersection(*(set(part) for part in parts))
        filled[row] = {seed: sum(part[seed] for part in parts) / len(parts) for seed in common}
    return statistics.contrast(contrasts(filled, claim)) if missing else None


def over_columns(comparison: Comparison, claim: Claim) -> tuple[dict[str, Difference], Optional[Summary]]:
    """The difference in each column, and a summary over such columns from the seeds that all of them have."""
    numbers = {column: contrasts(row_values(comparison, (column,)), claim) for column in comparison.table.columns}
    found = {column: statistics.contrast(values) for column, values in numbers.items() if values}
    common = sorted(set.intersection(*(set(values) for values in numbers.values())))
    matrix = np.array([[values[seed] for values in numbers.values()] for seed in common])
    return found, statistics.over_columns(matrix) if len(common) > 1 else None
