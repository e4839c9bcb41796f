"""The records of a table: one per cell and seed, read from its runs or from a file of records.

The head of the file carries what a report needs besides: the metrics, and the settings the runs were made with.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from dropkey.config import identity
from dropkey.config.check import require
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory, replace_file
from dropkey.reproduction.jobs import DONE, Job, jobs_of, state
from dropkey.reproduction.tables import Table

FILE = "records.jsonl"
PLACE = ("init_from", "data.root", "seed")  # settings that differ between seeds or machines


def gather(table: Table, jobs: dict[tuple[str, str, int], Job]) -> tuple[dict, list[dict]]:
    """(head, a record for each row, column and seed, finished or not), from the run directories.

    Raises:
        ConfigError: the runs do not have the same metrics.
    """
    results = {job: RunDirectory(job.run).read_json(job.result) for job in jobs.values() if state(job)[0] == DONE}
    metrics = {json.dumps(result["metrics"]): job.name for job, result in results.items()}
    require(len(metrics) < 2, f"the runs of this table have different metrics: {' and '.join(metrics.values())}")
    shown = [
        override for override in table.overrides if not identity.has_no_effect(override.lstrip("+~").split("=")[0])
    ]
    head = {
        "table": table.name,
        "scale": table.scale,
        "seeds": list(table.seeds),
        "overrides": shown,
        "metrics": json.loads(next(iter(metrics), "[]")),
        "settings": compact(settings(table, jobs)),
    }
    return head, [record(place, job, results.get(job, {})) for place, job in jobs.items()]


def record(place: tuple[str, str, int], job: Job, result: dict) -> dict:
    row, column, seed = place
    found, reason = state(job)
    entry = {"row": row, "column": column, "seed": seed, "state": found, "reason": reason, "run": job.run.name}
    entry["facts"] = identity.training_facts(job.config)
    if found != DONE:
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
    return entry


# ------------------------------------------------------------------------------------------------ settings in records


def settings(table: Table, jobs: dict[tuple[str, str, int], Job]) -> dict[tuple[str, str], dict]:
    """(row, column) -> every key of its config that changes the result, flat."""
    found = {}
    for (row, column, _), job in jobs.items():
        keys = {key: value for key, value in identity.canonical(job.config).items() if key not in PLACE}
        if job.evaluation:
            keys |= identity.evaluation_settings(job.evaluation)
        found[row, column] = {**keys, "of": table.rows[row].of}
    return found


def compact(found: dict[tuple[str, str], dict]) -> dict:
    """The keys that all cells share once, and for each cell the others."""
    first, *rest = found.values()
    shared = {key: value for key, value in first.items() if all(key in one and one[key] == value for one in rest)}
    own = [[*place, {k: v for k, v in keys.items() if k not in shared}] for place, keys in found.items()]
    return {"shared": shared, "cells": own}


def require_same_settings(path: Path, head: dict, now: dict[tuple[str, str], dict]) -> None:
    """Refuses records of runs that the table would make in another way today. A key that was added since is ignored.

    Raises:
        ConfigError: with row, column, key, old and new value.
    """
    then = {(row, column): head["settings"]["shared"] | own for row, column, own in head["settings"]["cells"]}
    for row, column in [*then, *now]:
        where = "no longer in the table" if (row, column) not in now else "missing in these records"
        both = (row, column) in then and (row, column) in now
        require(both, f"{path}: row '{row}', column '{column}' is {where}; run the table again")
    for (row, column), old in then.items():
        new = now[row, column]
        for key in old:
            value = new.get(key, "not a key")
            same = key in new and value == old[key]
            require(
                same,
                f"{path}: row '{row}', column '{column}' was run with {key}={old[key]}, now it is {value}; "
                "run the table again",
            )


# ----------------------------------------------------------------------------------------------------- files


def write(path: Path, head: dict, records: list[dict]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in (head, *records))
    replace_file(path, lambda file: file.write(text.encode()))


def read(path: Path, table: Table) -> tuple[dict, list[dict]]:
    """(head, records) that `write` has written for this table.

    Raises:
        ConfigError: no such file, another table, or other settings than the table has now.
    """
    try:
        head, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        known = f"table={head['table']} scale={head['scale']}"
        overrides, seeds = table.overrides or tuple(head["overrides"]), tuple(head["seeds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no records of a table: {error}") from None
    wanted = f"table={table.name} scale={table.scale}"
    require(known == wanted, f"{path} has records of {known}, not of {wanted}")
    table = replace(table, overrides=overrides, seeds=seeds)
    require_same_settings(path, head, settings(table, jobs_of(table, "runs")))
    return head, records


# -------------------------------------------------------------------------------------------------- versions


def require_one_version(records: list[dict], mixed: bool) -> list[str]:
    """Sentences on what differs between runs that are compared. Runs conflict in the parts of the code they share.

    Raises:
        ConfigError: there are any, and `mixed` does not allow it.
    """
    done = [entry for entry in records if entry["state"] == DONE]
    parts = dict.fromkeys(part for entry in done for part in entry["code"])
    found = [
        *(several([entry["code"].get(part) for entry in done], f"versions of the code of {part}") for part in parts),
        several([entry["torch"] for entry in done], "versions of torch"),
    ]
    for column in dict.fromkeys(entry["column"] for entry in done):
        here = [entry["data"] for entry in done if entry["column"] == column]
        found.append(several(here, f"versions of the data in column '{column}'"))
    found = [sentence for sentence in found if sentence]
    ways_out = "Train the older ones again with outdated=retrain, or allow it with mixed=true, which the report shows"
    require(mixed or not found, f"these runs are not comparable: {'; '.join(found)}. {ways_out}")
    return found


def several(values: list, what: str) -> str:
    counts = Counter(value for value in values if value is not None)
    listed = ", ".join(f"{value}: {n} runs" for value, n in counts.most_common())
    return f"{len(counts)} {what} ({listed})" if len(counts) > 1 else ""
