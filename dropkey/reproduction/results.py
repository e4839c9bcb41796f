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

from dropkey.config import identity
from dropkey.config.check import require
from dropkey.config.compose import CONFIGS
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory, replace_file
from dropkey.reproduction import tuning
from dropkey.reproduction.jobs import DONE, Job, jobs_of, state
from dropkey.reproduction.jobs import settings as job_settings
from dropkey.reproduction.tables import Table, until_decided

FILE = "records.jsonl"
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
    design, plans = plan_of(table), list(earlier.head.get("earlier_designs", []))
    if earlier.records and earlier.head["design"] != design and earlier.head["design"] not in plans:
        plans.append(earlier.head["design"])
    head = {
        "table": table.name,
        "scale": table.scale,
        "seeds": list(table.seeds),
        "overrides": shown_overrides(table),
        "metrics": json.loads(next(iter(metrics), "[]")),
        "design": design,
        "earlier_designs": plans,
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
    summary, epochs, entropy = run.summary(), run.records("epoch"), run.read_json("entropy.json")
    entry |= {metric["key"]: result[metric["key"]] for metric in result["metrics"]}
    entry |= {
        "samples": result["samples"],
        "monte_carlo": job.evaluation.eval.monte_carlo if job.evaluation else 0,
        "train_loss": epochs[-1]["train_loss"],
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
        "watched": summary["best_split"],
        "code": result["code"],
        "data": summary.get("data"),
        "commit": summary["commit"],
        "torch": result["versions"]["torch"],
        "hardware": result["hardware"],
        "entropy": entropy.get("mean"),
    }
    if not job.evaluation:
        if entropy:
            entry["heads"] = [[round(head, 4) for head in layer["normalised"]] for layer in entropy["layers"]]
        watched = f"eval_{result['metrics'][0]['key']}"
        entry["curve"] = [[line["epoch"], line["train_loss"], line.get(watched)] for line in epochs]
    correct = run.correct(job.result)
    if correct is not None:
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
    then = settings_of(head)
    for row, column in [*then, *now]:
        where = "no longer in the table" if (row, column) not in now else "missing in these records"
        both = (row, column) in then and (row, column) in now
        require(both, f"{path}: row '{row}', column '{column}' is {where}; run the table again")
    for (row, column), old in then.items():
        changed = changes(old, now[row, column])
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

    @staticmethod
    def read(path: Path, table: Table) -> "Earlier":
        """Empty where there is no such file, or where it is of another table or has another form.

        Raises:
            ConfigError: it has runs with other overrides; they would be lost.
        """
        try:
            head, *records = parse(path)
            same, overrides = (head["table"], head["scale"]) == (table.name, table.scale), head["overrides"]
            done = [entry for entry in records if entry["state"] == DONE]
            readable = bool(head["design"]) and all(entry["settings"] for entry in done)
        except (OSError, ValueError, KeyError, TypeError):
            return Earlier()
        if not same or not readable:
            return Earlier()
        now = shown_overrides(table)
        require(
            overrides == now or not done,
            f"{path} has runs with the overrides '{' '.join(overrides)}', not '{' '.join(now)}'; "
            "give another results=, or move it away",
        )
        return Earlier(head, done)

    def of(self, table: Table, jobs: dict[Place, Job]) -> dict[Job, dict]:
        """The records of jobs whose runs are gone: of the same row, column, seed and settings."""
        known = {(entry["row"], entry["column"], entry["seed"], entry["settings"]): entry for entry in self.records}
        left = {place: job for place, job in jobs.items() if state(job)[0] != DONE}
        found = {job: known.get((*place, settings_digest(table, place, job))) for place, job in left.items()}
        return {job: entry for job, entry in found.items() if entry}

    def unused(self, table: Table, jobs: dict[Place, Job]) -> list[dict]:
        """The records of other seeds than `jobs` have, with settings that the table still has; and those of rows
        whose best candidate is not known yet."""
        digests = {place[:2]: settings_digest(table, place, job) for place, job in jobs.items()}
        return [
            entry
            for entry in self.records
            if entry["row"] in table.rows
            and entry["column"] in table.columns
            and digests.get((entry["row"], entry["column"]), entry["settings"]) == entry["settings"]
            and (entry["row"], entry["column"], entry["seed"]) not in jobs
        ]

    def forget(self, run: str) -> None:
        self.records = [entry for entry in self.records if entry["run"] != run]


def write(path: Path, head: dict, records: list[dict]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in (head, *records))
    replace_file(path, lambda file: file.write(text.encode()))


def parse(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path, table: Table) -> tuple[Table, dict, list[dict]]:
    """(the table as it was run, head, records) that `write` has written for this table.

    Raises:
        ConfigError: no such file, another table, or other settings or another plan than the table has now.
    """
    try:
        head, *records = parse(path)
        known = f"table={head['table']} scale={head['scale']}"
        overrides, seeds, plan = table.overrides or tuple(head["overrides"]), tuple(head["seeds"]), head["design"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no records of a table: {error}") from None
    wanted = f"table={table.name} scale={table.scale}"
    require(known == wanted, f"{path} has records of {known}, not of {wanted}")
    table = replace(as_planned(table, head), overrides=overrides, seeds=seeds)
    table = tuning.with_choices(table, head["tuning"])
    require_same_settings(path, head, settings(table, jobs_of(table, "runs")))
    for key, now in plan_of(table).items():
        require(
            plan.get(key) == now, f"{path} was planned with other {key} than the table has now; run the table again"
        )
    return table, head, [entry for entry in records if entry["seed"] in seeds]


def as_planned(table: Table, head: dict) -> Table:
    """The table with the looks of until=decided, where the head says so."""
    design = head.get("design", {})
    return until_decided(table, len(design["seeds"])) if design.get("until_decided") else table
