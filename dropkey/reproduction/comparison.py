"""From records to results: the estimate of every cell, its difference to the baseline, a verdict on every claim."""

from dataclasses import dataclass, replace
from typing import Optional

from dropkey.metrics import Metric
from dropkey.reproduction import statistics
from dropkey.reproduction.jobs import DONE
from dropkey.reproduction.statistics import Difference, Estimate
from dropkey.reproduction.tables import Claim, Table


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
    """What the runs of one column say about a claim; the difference is the better row minus the worse one."""

    claim: Claim
    column: str
    difference: Optional[Difference]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A table's results. The first of `metrics` is compared."""

    table: Table
    metrics: list[Metric]
    records: list[dict]
    cells: dict[tuple[str, str], Cell]  # (row, column)
    findings: list[Finding]
    mixed: list[str]  # what should be the same in all runs and is not
    overrides: tuple[str, ...]  # of every run

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    @property
    def done(self) -> list[dict]:
        return [entry for entry in self.records if entry["state"] == DONE]

    def column(self, name: str) -> list[Cell]:
        return [self.cells[row, name] for row in self.table.rows]

    def done_in(self, row: str, column: str) -> list[dict]:
        return [entry for entry in self.done if (entry["row"], entry["column"]) == (row, column)]


def compare(table: Table, head: dict, records: list[dict], mixed: list[str]) -> Comparison:
    """Compares last epochs, never best ones. Pairs share a seed: initialisation and order of the data.

    Holm's correction is over all differences of the table to the baseline, and over all claims for the verdicts.
    """
    metrics = [Metric(**metric) for metric in head["metrics"]]
    cells = {}
    for row in table.rows:
        for column in table.columns:
            here = [entry for entry in records if (entry["row"], entry["column"]) == (row, column)]
            cells[row, column] = cell(row, column, here, metrics)
    to_baseline = [
        statistics.difference(one.values, cells[table.baseline, column].values) if row != table.baseline else None
        for (row, column), one in cells.items()
    ]
    adjusted = with_holm(to_baseline, "p")
    cells = {place: replace(one, to_baseline=d) for (place, one), d in zip(cells.items(), adjusted, strict=True)}

    claims = [(claim, column) for column in table.columns for claim in table.claims]
    differences = [
        statistics.difference(cells[claim.better, column].values, cells[claim.worse, column].values)
        for claim, column in claims
    ]
    findings = [
        Finding(claim, column, found, statistics.verdict(found, metrics[0].higher_is_better))
        for (claim, column), found in zip(claims, with_holm(differences, "t_p"), strict=True)
    ]
    return Comparison(table, metrics, records, cells, findings, mixed, tuple(head["overrides"]))


def with_holm(differences: list[Optional[Difference]], p: str) -> list[Optional[Difference]]:
    """The differences with `adjusted`, from their p of this name where they have one."""
    tested = [i for i, found in enumerate(differences) if found is not None and getattr(found, p) is not None]
    adjusted = dict(zip(tested, statistics.holm([getattr(differences[i], p) for i in tested]), strict=True))
    return [replace(found, adjusted=adjusted[i]) if i in adjusted else found for i, found in enumerate(differences)]


def cell(row: str, column: str, records: list[dict], metrics: list[Metric]) -> Cell:
    done = [entry for entry in records if entry["state"] == DONE]
    values = {entry["seed"]: entry[metrics[0].key] for entry in done}
    others = {}
    for key in [*(metric.key for metric in metrics[1:]), "train_loss", "entropy"]:
        known = [entry[key] for entry in done if entry.get(key) is not None]
        others[key] = statistics.estimate(known) if len(known) == len(done) else None
    unfinished = {entry["seed"]: (entry["state"], entry["reason"]) for entry in records if entry["state"] != DONE}
    return Cell(row, column, values, unfinished, statistics.estimate(list(values.values())), others)
