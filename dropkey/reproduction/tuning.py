"""Rows that are the best of several candidates: tuned on validation data, with seeds of their own.

Best against best: each row gets the same budget of candidates and seeds, then is trained on fresh seeds. What tuning
found is kept in the head of the table's records.
"""

import math
from dataclasses import replace

from dropkey.config import identity
from dropkey.config.check import require
from dropkey.config.schema import OWN_VALIDATION
from dropkey.metrics import Metric
from dropkey.records import RunDirectory
from dropkey.reproduction.jobs import DIVERGED, DONE, Job, cell, composed, named_errors, settings, state, training_job
from dropkey.reproduction.tables import Table

Place = tuple[str, str, int, int]  # row, column, candidate, seed


def jobs_of(table: Table, output: str) -> dict[Place, Job]:
    """(row, column, candidate, seed) -> job, for the columns that the table tunes in.

    Raises:
        ConfigError: overrides that cannot work, or no validation data; the message names row, column and candidate.
    """
    found = {}
    for column in [table.tuning_column] if table.tuning_column else table.columns:
        for row in table.rows.values():
            for number, candidate in enumerate(row.candidates):
                overrides = (*table.columns[column], *candidate, *table.overrides)
                place = f"table {table.name}, row '{row.label}', column '{column}', candidate {' '.join(candidate)}"
                with named_errors(place):
                    config = composed(overrides)
                    held_out = config.data.val_fraction > 0 or config.data.name in OWN_VALIDATION
                    require(held_out, "best_of needs validation data: set data.val_fraction=0.1, say")
                own = [word for word in candidate if not all(word in other for other in row.candidates)]
                label = f"{row.label}, {' '.join(own)}" if own else row.label
                for seed in table.tuning_seeds:
                    job = training_job(overrides, config, seed, output, None)
                    found[row.label, column, number, seed] = replace(job, cell=cell(table, label, column, seed))
    return dict(sorted(found.items(), key=lambda item: item[0][3]))


def gather(table: Table, output: str, earlier: list[dict]) -> list[dict]:
    """A record for each candidate: `runs` from seed to what a finished run has found, or {} where it diverged. Runs
    that are gone are taken from `earlier` records of the same settings.

    Raises:
        ConfigError: a run had no validation data.
    """
    found, known = {}, {key(entry): entry["runs"] for entry in earlier}
    for place, job in jobs_of(table, output).items():
        entry = found.setdefault(place[:3], {**candidate_of(table, place, job), "runs": {}})
        over, seed = state(job)[0], str(place[3])
        before = known.get(key(entry), {})
        if over == DONE:
            entry["runs"][seed] = outcome(RunDirectory(job.run).summary(), f"table {table.name}: {job.name}")
        elif seed in before:
            entry["runs"][seed] = before[seed]
        elif over == DIVERGED:
            entry["runs"][seed] = {}
    return [entry for entry in found.values() if entry["runs"]]


def outcome(summary: dict, name: str) -> dict:
    require(summary["best_split"] == "val", f"{name} had no validation data, which best_of needs")
    metric = Metric(**summary["metrics"][0])
    return {
        "validation": round(summary["objective"], metric.digits + 2),
        "test": summary[metric.key],
        "higher_is_better": metric.higher_is_better,
        "seconds": summary["seconds"],
        "torch": summary["versions"]["torch"],
        "code": summary["code"],
    }


def candidate_of(table: Table, place: Place, job: Job) -> dict:
    row, column, number, _ = place
    text = " ".join(table.rows[row].candidates[number])
    return {"row": row, "column": column, "candidate": text, "settings": identity.digest(settings(job))}


def key(entry: dict) -> tuple[str, ...]:
    return entry["row"], entry["column"], entry["candidate"], entry["settings"]


def missing(table: Table, records: list[dict]) -> int:
    """How many runs of tuning are not over. A run that failed is not: it can be tried again."""
    over = {(entry["row"], entry["column"], entry["candidate"], seed) for entry in records for seed in entry["runs"]}
    columns = [table.tuning_column] if table.tuning_column else table.columns
    return sum(
        (row.label, column, " ".join(candidate), str(seed)) not in over
        for row in table.rows.values()
        for candidate in row.candidates
        for column in columns
        for seed in table.tuning_seeds
    )


def values(entry: dict, phase: str) -> list[float]:
    """On validation or test, of the seeds whose run did not diverge."""
    return [run[phase] for run in entry["runs"].values() if run]


def with_choices(table: Table, records: list[dict]) -> Table:
    """The table with the best candidate of each row. A row is left open until all of tuning is over, and if each of
    its candidates has a diverged run."""
    if not any(row.candidates for row in table.rows.values()) or missing(table, records):
        return table
    chosen = {}
    for row in (row for row in table.rows.values() if row.candidates):
        for column in table.columns:
            texts = {" ".join(candidate): candidate for candidate in row.candidates}
            entries = ranked(records, row.label, table.tuning_column or column)
            found = next((entry["candidate"] for entry in entries if entry["candidate"] in texts), None)
            if found is not None:
                chosen[row.label, column] = texts[found]
    return replace(table, chosen=chosen)


def ranked(records: list[dict], row: str, column: str) -> list[dict]:
    """The candidates without a diverged run, the best mean on validation data first; of equals the first one
    written."""
    entries = [entry for entry in records if (entry["row"], entry["column"]) == (row, column)]
    entries = [entry for entry in entries if all(entry["runs"].values())]
    sign = {True: -1, False: 1}

    def rank(entry: dict) -> float:
        one = next(iter(entry["runs"].values()))
        return sign[one["higher_is_better"]] * math.fsum(values(entry, "validation")) / len(entry["runs"])

    return sorted(entries, key=rank)


def budget_curve(records: list[dict], row: str, column: str) -> list[float]:
    """For k = 1 ... all candidates: the expected test result of the one that is best on validation among k drawn at
    random without replacement (Dodge et al., 2019, arXiv 1909.03004), as means over the seeds of tuning."""
    entries = ranked(records, row, column)
    tests = [math.fsum(values(entry, "test")) / len(entry["runs"]) for entry in entries]
    n = len(tests)
    curve = []
    for k in range(1, n + 1):
        # candidate i (0 is best) wins if it is drawn and the k - 1 others come from the n - i - 1 worse ones
        chances = [math.comb(n - i - 1, k - 1) / math.comb(n, k) for i in range(n)]
        curve.append(math.fsum(chance * test for chance, test in zip(chances, tests, strict=True)))
    return curve
