"""From records to figures: every cell's estimate, its difference to the baseline, and a verdict on every claim."""

import dataclasses
from dataclasses import dataclass
from typing import Optional

from dropkey.reproduction import statistics
from dropkey.reproduction.jobs import DONE
from dropkey.reproduction.statistics import Difference, Estimate
from dropkey.reproduction.tables import Claim, Table


@dataclass(frozen=True)
class Cell:
    """One row in one column: all its seeds."""

    row: str
    column: str
    values: dict[int, float]  # seed -> top-1 in percent
    unfinished: dict[int, tuple[str, str]]  # seed -> state, reason
    top1: Optional[Estimate]
    others: dict[str, Optional[Estimate]]  # test loss, calibration error, training loss, entropy
    to_baseline: Optional[Difference] = None  # None for the baseline itself and without common seeds


@dataclass(frozen=True)
class Finding:
    """What the runs of one column say of a claim."""

    claim: Claim
    column: str
    difference: Optional[Difference]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    table: Table
    records: list[dict]
    cells: dict[tuple[str, str], Cell]  # (row, column)
    findings: list[Finding]
    mixed: list[str]  # what should be the same in all runs and is not
    extra: tuple[str, ...]  # overrides laid over every run

    def column(self, name: str) -> list[Cell]:
        return [self.cells[row, name] for row in self.table.rows]

    @property
    def done(self) -> list[dict]:
        return [entry for entry in self.records if entry["state"] == DONE]


OTHERS = ("loss", "ece", "train_loss", "entropy")


def compare(table: Table, head: dict, records: list[dict], mixed: list[str]) -> Comparison:
    """Of last epochs on the test split, never of best ones. Pairs share a seed: initialisation and order of the data.

    Holm's correction is over all rows and columns of the table for the differences to the baseline, and over all
    claims and columns for the verdicts.
    """
    cells = {}
    for row in table.rows:
        for column in table.columns:
            here = [entry for entry in records if (entry["row"], entry["column"]) == (row, column)]
            cells[row, column] = cell(row, column, here)
    for column in table.columns:
        base = cells[table.baseline, column].values
        for row in table.rows:
            if row != table.baseline:
                found = statistics.difference(cells[row, column].values, base)
                cells[row, column] = dataclasses.replace(cells[row, column], to_baseline=found)
    compared = [place for place, one in cells.items() if one.to_baseline is not None]
    adjusted = statistics.holm([cells[place].to_baseline.p for place in compared])
    for place, p in zip(compared, adjusted, strict=True):
        difference = dataclasses.replace(cells[place].to_baseline, adjusted=p)
        cells[place] = dataclasses.replace(cells[place], to_baseline=difference)
    return Comparison(table, records, cells, judge(table, cells), mixed, tuple(head["extra"]))


def cell(row: str, column: str, records: list[dict]) -> Cell:
    done = [entry for entry in records if entry["state"] == DONE]
    values = {entry["seed"]: entry["top1"] for entry in done}
    others = {}
    for key in OTHERS:
        known = [entry[key] for entry in done if entry.get(key) is not None]
        others[key] = statistics.estimate(known) if len(known) == len(done) else None
    unfinished = {entry["seed"]: (entry["state"], entry["reason"]) for entry in records if entry["state"] != DONE}
    return Cell(row, column, values, unfinished, statistics.estimate(list(values.values())), others)


def judge(table: Table, cells: dict) -> list[Finding]:
    found = [
        (claim, column, statistics.difference(cells[claim.better, column].values, cells[claim.worse, column].values))
        for column in table.columns
        for claim in table.claims
    ]
    tested = [index for index, (_, _, one) in enumerate(found) if one is not None and one.t_p is not None]
    adjusted = statistics.holm([found[index][2].t_p for index in tested])
    for index, p in zip(tested, adjusted, strict=True):
        claim, column, one = found[index]
        found[index] = (claim, column, dataclasses.replace(one, adjusted=p))
    return [Finding(claim, column, one, statistics.verdict(one)) for claim, column, one in found]
