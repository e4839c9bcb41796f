"""Rows that are the best of several candidates: tuned on validation data, with seeds of their own.

Best against best: each row gets the same budget of candidates and seeds, then is trained on fresh seeds. What tuning
found is kept in the head of the table's records.
"""

import math
from dataclasses import replace
from typing import Optional

from dropkey.config import identity
from dropkey.config.check import require
from dropkey.errors import ConfigError
from dropkey.metrics import Metric
from dropkey.records import RunDirectory
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, Job, composed, named_errors, settings, state, training_job
from dropkey.reproduction.tables import Table


def jobs_of(table: Table, output: str) -> dict[tuple[str, str, int, int], Job]:
    """(row, column, candidate, seed) -> job, for the columns that the table tunes in.

    Raises:
        ConfigError: overrides that cannot work; the message names row, column and candidate.
    """
    found = {}
    for column in [table.tuning_column] if table.tuning_column else table.columns:
        for row in table.rows.values():
            for number, candidate in enumerate(row.candidates):
                overrides = (*table.columns[column], *candidate, *table.overrides)
                place = f"table {table.name}, row '{row.label}', column '{column}', candidate {' '.join(candidate)}"
                with named_errors(place):
                    config = composed(overrides)
                for seed in table.tuning_seeds:
                    found[row.label, column, number, seed] = training_job(overrides, config, seed, output, None)
    return dict(sorted(found.items(), key=lambda item: item[0][3]))


def gather(table: Table, output: str, earlier: list[dict]) -> list[dict]:
    """A record for each candidate that has a finished run: `validation` and `test` of each seed, None where it failed.
    Runs that are gone are taken from `earlier` records of the same settings.

    Raises:
        ConfigError: a run has no validation data, so that tuning would look at test data.
    """
    found, known = {}, {key(entry): entry for entry in earlier}
    for place, job in jobs_of(table, output).items():
        entry = found.setdefault(place[:3], candidate_of(table, place, job))
        validation, test = entry.setdefault("validation", {}), entry.setdefault("test", {})
        over, seed, before = state(job)[0], str(place[3]), known.get(key(entry), {"validation": {}})
        if over == DONE:
            summary = RunDirectory(job.run).summary()
            metric = Metric(**summary["metrics"][0])
            require(
                summary["best_split"] == "val",
                f"table {table.name}: best_of needs validation data, and {job.name} has none; set data.val_fraction",
            )
            validation[seed] = round(summary["objective"], metric.digits + 2)
            test[seed] = summary[metric.key]
            entry["higher_is_better"] = metric.higher_is_better
        elif before["validation"].get(seed) is not None:
            validation[seed], test[seed] = before["validation"][seed], before["test"][seed]
            entry["higher_is_better"] = before["higher_is_better"]
        elif over in (FAILED, DIVERGED):
            validation[seed] = None
    return [entry for entry in found.values() if entry["validation"]]


def candidate_of(table: Table, place: tuple, job: Job) -> dict:
    row, column, number, _ = place
    text = " ".join(table.rows[row].candidates[number])
    return {"row": row, "column": column, "candidate": text, "settings": identity.digest(settings(job))}


def key(entry: dict) -> tuple[str, ...]:
    return entry["row"], entry["column"], entry["candidate"], entry["settings"]


def missing(table: Table, records: list[dict]) -> int:
    """How many runs of tuning are not over."""
    wanted = sum(len(row.candidates) for row in table.rows.values()) * len(table.tuning_seeds)
    wanted *= 1 if table.tuning_column else len(table.columns)
    return wanted - sum(len(entry["validation"]) for entry in records)


def score(entry: dict) -> Optional[float]:
    """The mean over seeds on validation data; None if a run failed."""
    values = list(entry["validation"].values())
    return None if None in values else math.fsum(values) / len(values)


def with_choices(table: Table, records: list[dict]) -> Table:
    """The table with the best candidate of each row; rows without one are left open.

    Raises:
        ConfigError: every candidate of a row has a failed run.
    """
    if not any(row.candidates for row in table.rows.values()) or missing(table, records):
        return table
    chosen = {}
    for place in dict.fromkeys((entry["row"], entry["column"]) for entry in records):
        entries = ranked(records, *place)
        if not entries:
            raise ConfigError(f"table {table.name}: every candidate of row '{place[0]}' has a run that failed")
        best = tuple(entries[0]["candidate"].split(" "))
        for column in table.columns if table.tuning_column else [place[1]]:
            chosen[place[0], column] = best
    return replace(table, chosen=chosen)


def ranked(records: list[dict], row: str, column: str) -> list[dict]:
    """The candidates without a failed run, the best on validation data first; of equals the first one written."""
    entries = [entry for entry in records if (entry["row"], entry["column"]) == (row, column)]
    entries = [entry for entry in entries if score(entry) is not None]
    return sorted(entries, key=lambda entry: -score(entry) if entry["higher_is_better"] else score(entry))


def budget_curve(records: list[dict], row: str, column: str) -> list[float]:
    """For k = 1 ... all candidates: the expected test result of the one that is best on validation among k drawn at
    random without replacement (Dodge et al., 2019, arXiv 1909.03004), as means over the seeds of tuning."""
    entries = ranked(records, row, column)
    tests = [math.fsum(entry["test"].values()) / len(entry["test"]) for entry in entries]
    n = len(tests)
    curve = []
    for k in range(1, n + 1):
        # candidate i (0 is best) wins if it is drawn and the k - 1 others come from the n - i - 1 worse ones
        chances = [math.comb(n - i - 1, k - 1) / math.comb(n, k) for i in range(n)]
        curve.append(math.fsum(chance * test for chance, test in zip(chances, tests, strict=True)))
    return curve
