"""What came of a table's runs: one record per cell and seed, read from the runs or from a file of records."""

import json
from collections import Counter
from pathlib import Path

from dropkey.config.check import require
from dropkey.config.identity import has_no_effect
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory, replace_file
from dropkey.reproduction.jobs import DONE, Job, state
from dropkey.reproduction.tables import Table

FILE = "records.jsonl"
FIGURES = ("top1", "top5", "loss", "ece")


def gather(table: Table, jobs: dict[tuple[str, str, int], Job]) -> list[dict]:
    """A record for each (row, column, seed) of the table, done or not, from the run directories."""
    return [record(place, job) for place, job in jobs.items()]


def record(place: tuple[str, str, int], job: Job) -> dict:
    row, column, seed = place
    found, reason = state(job)
    run = RunDirectory(job.run)
    entry = {"row": row, "column": column, "seed": seed, "state": found, "reason": reason, "run": job.run.name}
    entry["facts"] = job.composed.facts
    if found != DONE:
        return entry
    summary = run.summary()
    result = summary if job.script == "train.py" else run.read_json(job.result)
    epochs = run.records("epoch")
    entropy = run.read_json("entropy.json")
    entry |= {key: result[key] for key in FIGURES}
    entry |= {
        "images": result.get("images", result.get("count")),
        "monte_carlo": result.get("monte_carlo", 0),
        "train_loss": epochs[-1]["train_loss"],
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
        "watched": summary["best_split"],
        "code": result.get("code"),
        "data": summary.get("data"),
        "commit": summary["commit"],
        "torch": result["versions"]["torch"],
        "hardware": result["hardware"],
        "entropy": entropy.get("mean"),
    }
    if job.script == "train.py":
        if entropy:
            layers = [one["normalised"] for one in entropy["layers"]]
            entry["heads"] = [[round(head, 4) for head in layer] for layer in layers]
        keys = ("epoch", "train_loss", "eval_top1", "eval_loss")
        entry["curve"] = [[line.get(key) for key in keys] for line in epochs]
    return entry


def header(table: Table) -> dict:
    extra = [word for word in table.extra if not has_no_effect(word.lstrip("+~").split("=", 1)[0])]
    return {"table": table.name, "scale": table.scale, "seeds": list(table.seeds), "extra": extra}


def write(path: Path, table: Table, records: list[dict]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in (header(table), *records)]
    replace_file(path, lambda file: file.write("".join(lines).encode()))


def read(path: Path, name: str, scale: str) -> tuple[dict, list[dict]]:
    """(header, records) of a file that `write` has written for this table.

    Raises:
        ConfigError: no such file, not such a file, or of another table.
    """
    try:
        first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no records of a table: {error}") from None
    known = (first.get("table"), first.get("scale"))
    require(known == (name, scale), f"{path} holds records of table={known[0]} scale={known[1]}, not {name} {scale}")
    return first, rest


def require_one_version(records: list[dict], mixed: bool) -> list[str]:
    """What differs between runs that are to be compared, as sentences.

    Raises:
        ConfigError: something does, and `mixed` does not allow it.
    """
    done = [entry for entry in records if entry["state"] == DONE]
    found = []
    for key, what in (("code", "versions of the code"), ("torch", "versions of torch")):
        found += several(Counter(entry[key] for entry in done), what)
    for column in dict.fromkeys(entry["column"] for entry in done):
        here = Counter(entry["data"] for entry in done if entry["column"] == column)
        found += several(here, f"versions of the data in column '{column}'")
    require(
        mixed or not found,
        f"these runs are not comparable: {'; '.join(found)}. Train the older ones anew (delete their directories), or "
        "allow it with mixed=true, which the report will say",
    )
    return found


def several(counts: Counter, what: str) -> list[str]:
    if len(counts) < 2:
        return []
    return [f"{len(counts)} {what} ({', '.join(f'{key}: {n} runs' for key, n in counts.most_common())})"]
