"""The records of a table: one per cell and seed, read from its runs or from a file of records.

The head of the file carries what a report needs besides: the metrics, the settings the runs were made with, the design,
and what tuning found. A finished run that is in the file is not repeated, even where its run directory is gone.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional

import numpy as np

from dropkey import shapes
from dropkey.config import identity
from dropkey.config.check import require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError, StorageError
from dropkey.records import RunDirectory
from dropkey.reproduction import tuning
from dropkey.reproduction.jobs import DONE, MISSING, Job, jobs_of, records_of, state
from dropkey.reproduction.jobs import settings as job_settings
from dropkey.reproduction.record_file import parse
from dropkey.reproduction.tables import Table, until_decided

Place = tuple[str, str, int]  # row, column, seed


def gather(
    table: Table, jobs: dict[Place, Job], tuned: Sequence[dict] = (), earlier: Optional["Earlier"] = None
) -> tuple[dict, list[dict]]:
    """(head, a record for each row, column and seed, finished or not), from the run directories, or from `earlier`
    records where these are gone. `tuned`: what tuning found, for the head.

    Raises:
        ConfigError: the runs do not have the same metrics.
    """
    earlier = earlier or Earlier()
    results = {job: RunDirectory(job.run).read_json(job.result) for job in jobs.values() if state(job)[0] == DONE}
    gone = earlier.of(table, jobs)
    metrics = {json.dumps(result["metrics"]): job.name for job, result in results.items()}
    if gone:
        metrics[json.dumps(earlier.head["metrics"])] = "earlier records"
    require(len(metrics) < 2, f"the runs of this table have different metrics: {' and '.join(metrics.values())}")
    records = [
        {**gone[job], "row": place[0]} if job in gone else record(table, place, job, results.get(job))
        for place, job in jobs.items()
    ]
    planned = with_plan(earlier.head, table) if earlier.records else {}
    head = {
        "table": table.name,
        "scale": table.scale,
        "seeds": list(table.seeds),
        "overrides": shown_overrides(table),
        "metrics": json.loads(next(iter(metrics), "[]")),
        "design": plan_of(table),
        "earlier_designs": planned.get("earlier_designs", earlier.head.get("earlier_designs", [])),
        "seen_before": earlier.head.get("seen_before", sum(job in results for job in set(jobs.values()))),
        "protocol": earlier.head.get("protocol") or protocol_hash(table),
        "looks": earlier.head.get("looks", {}),
        "tuning": list(tuned),
        "settings": compact(settings(table, jobs)),
    }
    return head, records


def plan_of(table: Table) -> dict:
    """What was planned before the first run: seeds, looks, margin and claims."""
    claims = [[claim.label, claim.better, claim.worse] for claim in table.claims]
    return json.loads(json.dumps({**asdict(table.design), "claims": claims}))


def with_plan(head: dict, table: Table) -> dict:
    """The head with the table's plan; the one that it had, if it was another, is kept beside it."""
    design, plans, before = plan_of(table), list(head["earlier_designs"]), head["design"]
    if before != design and before not in plans:
        plans.append(before)
    return {**head, "design": design, "earlier_designs": plans}


def shown_overrides(table: Table) -> list[str]:
    return [one for one in table.overrides if not identity.has_no_effect(one.lstrip("+~").split("=")[0])]


def protocol_hash(table: Table) -> Optional[str]:
    """Ten hexadecimal digits over the file with the plan of the study."""
    return table.protocol and hashlib.sha256((CONFIGS.parent / table.protocol).read_bytes()).hexdigest()[:10]


def settings_digest(table: Table, place: Place, job: Job) -> str:
    return identity.digest(cell_settings(table, place[0], job))


def record(table: Table, place: Place, job: Job, result: Optional[dict]) -> dict:
    row, column, seed = place
    found, reason = state(job)
    entry = {"row": row, "column": column, "seed": seed, "state": found, "reason": reason, "run": job.run.name}
    entry["settings"] = settings_digest(table, place, job)
    entry["facts"] = identity.training_facts(job.config)
    if result is None:
        return entry
    run = RunDirectory(job.run)
    summary, epochs, entropy = run.summary(), records_of(job), run.entropy()
    last = next((line for line in epochs if line["epoch"] == summary["epochs"]), {})
    entry |= {metric["key"]: result[metric["key"]] for metric in result["metrics"]}
    entry |= {
        "samples": result["samples"],
        "monte_carlo": job.evaluation.eval.monte_carlo if job.evaluation else 0,
        "train_loss": last.get("train_loss"),
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
        "watched": summary["best_split"],
        "code": result["code"],
        "data": result.get("data_fingerprint") or summary.get("data"),
        "commit": summary.get("commit"),
        "torch": result["versions"]["torch"],
        "hardware": result["hardware"],
        "entropy": entropy.get("mean"),
    }
    if not job.evaluation:
        if entropy.get("layers"):
            entry["heads"] = [[round(head, 4) for head in layer["normalised"]] for layer in entropy["layers"]]
            if any("stack" in layer for layer in entropy["layers"]):
                entry["layers"] = [{"stack": layer["stack"], "kind": layer["kind"]} for layer in entropy["layers"]]
        watched = f"eval_{result['metrics'][0]['key']}"
        entry["curve"] = [[line["epoch"], line.get("train_loss"), line.get(watched)] for line in epochs]
    correct = run.correct(job.result)
    if correct is not None and shapes.fits_samples(correct, result["samples"]):
        entry["correct"] = base64.b64encode(correct).decode()
    return entry


def correct_samples(entry: dict) -> Optional[np.ndarray]:
    """Boolean (samples,): which test samples a record has right; None where that was not kept."""
    if "correct" not in entry:
        return None
    bits = np.frombuffer(base64.b64decode(entry["correct"]), dtype=np.uint8)
    return np.unpackbits(bits, count=entry["samples"]).astype(bool)


# ------------------------------------------------------------------------------------------------ settings in records


def settings(table: Table, jobs: dict[tuple[str, str, int], Job]) -> dict[tuple[str, str], dict]:
    """(row, column) -> every key of its config that changes the result, flat."""
    return {(row, column): cell_settings(table, row, job) for (row, column, _), job in jobs.items()}


def cell_settings(table: Table, row: str, job: Job) -> dict[str, object]:
    return {**job_settings(job), "of": table.rows[row].of}


def compact(found: dict[tuple[str, str], dict]) -> dict:
    """The keys that all cells share once, and for each cell the others."""
    first, *rest = found.values() or [{}]
    shared = {key: value for key, value in first.items() if all(key in one and one[key] == value for one in rest)}
    own = [[*place, {k: v for k, v in keys.items() if k not in shared}] for place, keys in found.items()]
    return {"shared": shared, "cells": own}


def settings_of(head: dict) -> dict[tuple[str, str], dict]:
    return {(row, column): head["settings"]["shared"] | own for row, column, own in head["settings"]["cells"]}


def changes(old: dict, new: dict) -> list[str]:
    """Every key that a cell was run with and that is another one now. A key that was added since does not count."""
    return [
        f"{key}={value}, now it is {new.get(key, 'not a key')}"
        for key, value in old.items()
        if key not in new or new[key] != value
    ]


def require_same_settings(path: Path, head: dict, now: dict[tuple[str, str], dict]) -> None:
    """Refuses records of runs that the table would make in another way today.

    Raises:
        ConfigError: with row, column, key, old and new value.
    """
    for (row, column), old in settings_of(head).items():
        changed = changes(old, now.get((row, column), old))
        require(
            not changed,
            f"{path}: row '{row}', column '{column}' was run with {changed[0] if changed else ''}; run the table again",
        )


# ----------------------------------------------------------------------------------------------------- files


@dataclass
class Earlier:
    """A file of records that was written before: its head, and its finished records, used in the table now or not."""

    head: dict = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what of the file is not in them, and why

    @staticmethod
    def read(path: Path, table: Table) -> "Earlier":
        """Empty where there is no such file, or where it is of another table or has another form; `left_out` then says
        so, and names the records that are damaged.

        Raises:
            ConfigError: it has runs with other overrides; they would be lost.
        """
        try:
            head, records, damaged = parse(path)
        except FileNotFoundError:
            return Earlier()
        except StorageError as error:
            return Earlier(left_out=[str(error)])
        known = (head["table"], head["scale"])
        if known != (table.name, table.scale):
            return Earlier(left_out=[f"{path} has records of table={known[0]} scale={known[1]}"])
        now, done = shown_overrides(table), [entry for entry in records if entry["state"] == DONE]
        require(
            head["overrides"] == now or not done,
            f"{path} has runs with the overrides '{' '.join(head['overrides'])}', not '{' '.join(now)}'; "
            "give another results=, or move it away",
        )
        return Earlier(head, done, damaged)

    def of(self, table: Table, jobs: dict[Place, Job]) -> dict[Job, dict]:
        """The records of jobs whose runs are gone: of the same row, column, seed and settings."""
        known = {(entry["row"], entry["column"], entry["seed"], entry["settings"]): entry for entry in self.records}
        left = {place: job for place, job in jobs.items() if state(job)[0] != DONE}
        found = {job: known.get((*place, settings_digest(table, place, job))) for place, job in left.items()}
        return {job: entry for job, entry in found.items() if entry}

    def unused(self, table: Table, jobs: dict[Place, Job]) -> list[dict]:
        """The records of other seeds than `jobs` have, with settings that the table still has; those of rows whose
        best candidate is not known yet; and those of rows that are no longer in the table."""
        digests = {place[:2]: settings_digest(table, place, job) for place, job in jobs.items()}
        return [
            entry
            for entry in self.records
            if digests.get((entry["row"], entry["column"]), entry["settings"]) == entry["settings"]
            and (entry["row"], entry["column"], entry["seed"]) not in jobs
        ]

    def forget(self, run: str) -> None:
        self.records = [entry for entry in self.records if entry["run"] != run]


def read(path: Path, table: Table) -> tuple[Table, dict, list[dict]]:
    """(the table as it was run, head, records) that `write` has written for this table. What is missing in the file,
    or no longer in the table, is left out, and named in the head's `left_out`.

    Raises:
        ConfigError: no such file, another table, or other settings or another plan than the table has now.
    """
    try:
        head, records, damaged = parse(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} has no records of a table: there is no such file") from None
    except StorageError as error:
        raise ConfigError(str(error)) from None
    known, wanted = (
        f"table={one} scale={scale}" for one, scale in ((head["table"], head["scale"]), (table.name, table.scale))
    )
    require(known == wanted, f"{path} has records of {known}, not of {wanted}")
    table = as_planned(table, head)
    table = replace(table, overrides=table.overrides or tuple(head["overrides"]), seeds=tuple(head["seeds"]))
    table = tuning.with_choices(table, head["tuning"])
    jobs = jobs_of(table, "runs")
    now = settings(table, jobs)
    require_same_settings(path, head, now)
    for key, value in plan_of(table).items():
        same = key == "claims" or head["design"].get(key, value) == value  # another claim is told in the report
        require(same, f"{path} was planned with other {key} than the table has now; run the table again")
    found = [entry for entry in records if entry["seed"] in table.seeds and is_in(table, entry)]
    gone = dict.fromkeys((entry["row"], entry["column"]) for entry in records if not is_in(table, entry))
    left_out = [f"row '{row}', column '{column}' of {path} is no longer in the table" for row, column in gone]
    head = with_plan(head, table)
    if damaged or left_out:
        head["left_out"] = [*damaged, *left_out]
    there = {(entry["row"], entry["column"], entry["seed"]) for entry in found}
    return table, head, [*found, *(absent(table, at, job, path) for at, job in jobs.items() if at not in there)]


def is_in(table: Table, entry: dict) -> bool:
    return entry["row"] in table.rows and entry["column"] in table.columns


def absent(table: Table, place: Place, job: Job, path: Path) -> dict:
    """The record of a cell and seed that the file does not have."""
    entry = dict(zip(("row", "column", "seed"), place, strict=True))
    entry |= {"state": MISSING, "reason": f"no intact record in {path}", "run": job.run.name}
    return entry | {"settings": settings_digest(table, place, job), "facts": identity.training_facts(job.config)}


def as_planned(table: Table, head: dict) -> Table:
    """The table with the looks of until=decided, where the head says so."""
    design = head.get("design", {})
    return until_decided(table, len(design["seeds"])) if design.get("until_decided") else table
