"""The file of a table's records: a line with its head, then a line for each cell and seed."""

import base64
import binascii
import itertools
import json
import shutil
from pathlib import Path

from dropkey import shapes
from dropkey.errors import StorageError
from dropkey.records import replace_file

FILE = "records.jsonl"
TUNED = {
    "validation": shapes.NUMBER,
    "test": shapes.NUMBER,
    "higher_is_better": bool,
    "seconds": shapes.NUMBER,
    "torch": str,
    "code": {str: str},
}
CANDIDATE = {
    "row": str,
    "column": str,
    "candidate": str,
    "settings": str,
    "runs": {str: lambda value, where: "" if value == {} else shapes.problem(value, TUNED, where)},
}
DESIGN = {"seeds": [int], "looks": [int], "margin": (*shapes.NUMBER, None), "claims": [list]}
CELL = {"row": str, "column": str, "seed": int, "state": str, "reason": str, "run": str, "settings": str, "facts": str}
DONE = {
    "samples": int,
    "monte_carlo": int,
    "train_loss": (*shapes.NUMBER, None),
    "epochs": int,
    "seconds": shapes.NUMBER,
    "watched": str,
    "code": {str: str},
    "data": shapes.TEXT,
    "commit": shapes.TEXT,
    "torch": str,
    "hardware": str,
    "entropy": (*shapes.NUMBER, None),
    "heads?": [[shapes.NUMBER]],
    "layers?": [{"stack": str, "kind": str}],
    "curve?": [[(*shapes.NUMBER, None)]],
    "correct?": str,
}


def place(value, where: str) -> str:
    """A row, a column and the keys that are its own."""
    good = isinstance(value, list) and [type(one) for one in value] == [str, str, dict]
    return "" if good else f"{where} is no row, column and keys"


HEAD = {
    "table": str,
    "scale": str,
    "seeds": [int],
    "overrides": [str],
    "metrics": lambda value, where: "" if value == [] else shapes.metrics(value, where),
    "design": DESIGN,
    "earlier_designs": [DESIGN],
    "seen_before": int,
    "protocol": shapes.TEXT,
    "looks": {str: [str]},
    "tuning": [CANDIDATE],
    "settings": {"shared": dict, "cells": [place]},
}


def record(value, head: dict) -> str:
    """What is wrong with a record of a table whose head is `head`; a done one has all figures, which are numbers."""
    wrong = shapes.problem(value, CELL)
    if wrong or value["state"] != "done":
        return wrong
    found = {**value, "metrics": head["metrics"]}
    wrong = shapes.problem(value, DONE) or shapes.figures(found) or shapes.not_a_number(found)
    if wrong or "correct" not in value:
        return wrong
    try:
        right = base64.b64decode(value["correct"], validate=True)
    except (binascii.Error, ValueError):
        return "correct is no base64"
    return "" if shapes.fits_samples(right, value["samples"]) else f"correct is not of {value['samples']} samples"


def write(path: Path, head: dict, records: list[dict]) -> None:
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in (head, *records))
    replace_file(path, lambda file: file.write(text.encode()))


def keep(path: Path) -> Path:
    """Copies the file beside itself, under a name of its own, before it is replaced."""
    kept = next(one for n in itertools.count(1) if not (one := path.with_suffix(f".kept-{n}.jsonl")).exists())
    if path.is_file():
        shutil.copy2(path, kept)
    else:
        path.rename(kept)
    return kept


def parse(path: Path) -> tuple[dict, list[dict], list[str]]:
    """(head, records, what is wrong with each line that is no record).

    Raises:
        FileNotFoundError: no such file.
        StorageError: it cannot be read, or its first line is no head.
    """
    try:
        first, *lines = path.read_bytes().splitlines() or [b""]
        head = json.loads(first)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} has no records of a table: {str(error).splitlines()[0]}") from None
    wrong = shapes.problem(head, HEAD)
    if wrong:
        raise StorageError(f"{path} has no records of a table: {wrong}")
    found, damaged = {}, []
    for number, text in enumerate(lines, 2):
        try:
            entry = json.loads(text)
            wrong = record(entry, head) or ("it is there twice" if place_of(entry) in found else "")
        except (ValueError, RecursionError) as error:
            wrong = f"no JSON ({str(error).splitlines()[0]})"
        if wrong:
            damaged.append(f"{path}, line {number}: the record is damaged ({wrong})")
        else:
            found[place_of(entry)] = entry
    return head, list(found.values()), damaged


def place_of(entry: dict) -> tuple:
    return entry["row"], entry["column"], entry["seed"], entry["settings"]
