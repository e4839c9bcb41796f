"""What the files of runs and tables must look like, so that whoever reads one gets it whole or one line that says what
is wrong with it. Imports no torch.

A shape is a type; a tuple of shapes, one of which must fit; a set of values; None; [shape] for a list of any length;
{str: shape} for an object with any keys; {"key": shape, "key?": shape} for an object with these keys, of which those
with ? may be missing, and any others; or a function (value, where) -> what is wrong with it.
"""

import json
import math
from pathlib import Path

from dropkey.errors import StorageError

NUMBER = (int, float)
TEXT = (str, None)
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def problem(value, shape, where: str = "") -> str:
    """What does not fit, such as "metrics[0].key is missing"; empty if all does."""
    if callable(shape) and not isinstance(shape, type):
        return shape(value, where)
    if isinstance(shape, tuple):
        found = [problem(value, one, where) for one in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, list):
        return wrong_type(value, list, where) or first(
            problem(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value)
        )
    if isinstance(shape, dict) and str in shape:
        return wrong_type(value, dict, where) or first(problem(v, shape[str], at(where, k)) for k, v in value.items())
    if isinstance(shape, dict):
        return wrong_type(value, dict, where) or first(field(value, key, one, where) for key, one in shape.items())
    if isinstance(shape, set):
        known = isinstance(value, str) and value in shape
        return "" if known else f"{where} is {short(value)}, not one of {', '.join(sorted(shape))}"
    return wrong_type(value, shape, where)


def field(value: dict, key: str, shape, where: str) -> str:
    name = key.removesuffix("?")
    if name in value:
        return problem(value[name], shape, at(where, name))
    return "" if key.endswith("?") else f"{at(where, name)} is missing"


def wrong_type(value, kind, where: str) -> str:
    good = value is None if kind is None else isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return "" if good else f"{where or 'it'} is {short(value)}, not {NAMES.get(kind, 'null')}"


def first(problems) -> str:
    return next(filter(None, problems), "")


def at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def short(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


# ------------------------------------------------------------------------------------------------- results of a run


def metrics(value, where: str) -> str:
    """Of a result: its first metric is the one that counts."""
    keys = {"key": str, "label": str, "unit?": str, "digits?": int, "higher_is_better?": bool, "proportion?": bool}
    wrong = problem(value, [keys], where) or ("" if value else f"{where} is empty")
    more = "" if wrong else next((key for one in value for key in one if key not in keys and f"{key}?" not in keys), "")
    return wrong or (f"{where} has the key {more}, which no metric has" if more else "")


def figures(value: dict, where: str = "") -> str:
    """A result has a number for each of its metrics; null, but for the first, where it has no meaning."""
    kinds = [NUMBER] + [(*NUMBER, None)] * len(value["metrics"])
    return first(field(value, one["key"], kind, where) for one, kind in zip(value["metrics"], kinds, strict=False))


def result(value, where: str) -> str:
    return problem(value, {"metrics": metrics, "samples": int}, where) or figures(value, where)


def summary(value, where: str) -> str:
    raw = (
        {one["key"]: (*NUMBER, None) for one in value["metrics"]}
        if "raw" in value and not result(value, where)
        else dict
    )
    keys = {
        "raw?": raw,
        "epochs": int,
        "seconds": NUMBER,
        "best_split": str,
        "objective?": (*NUMBER, None),
        "data?": TEXT,
    }
    return result(value, where) or problem(value, {**keys, "samples_per_second?": NUMBER}, where)


ORIGIN = {  # see dropkey.origin
    "config?": str,
    "data?": {"fingerprint": str, "train?": int, "val?": int, "test?": int, "classes?": ([(str, int)], None)},
    "start?": (None, {"file": str, "sha256": str, "progress": str}),
}
REPORTED = {"code": {str: str}, "versions": {"torch": str}, "hardware": str}  # what a table needs of a result besides
STATES = {"running", "done", "failed", "diverged", "interrupted"}
ENTROPY = {"mean?": NUMBER, "layers?": [{"normalised": [NUMBER]}]}
FILES = {
    "status.json": {"state": STATES, "reason?": str, "time?": str},
    "summary.json": summary,
    "entropy.json": ENTROPY,
    "model.json": {"origin?": ORIGIN, "label_names?": [str]},  # and Task.info_fault
}


def shape_of(name: str):
    """Of a JSON file in a run directory."""
    return FILES.get(name, result if name.startswith("eval-") else dict)


def not_a_number(found: dict) -> str:
    """Which figure of a result is NaN or infinite: it has diverged. Empty where all are numbers."""
    odd = [one for one in found["metrics"] if not math.isfinite(found[one["key"]] or 0)]
    return f"{odd[0]['label']} is {found[odd[0]['key']]} in the last evaluation" if odd else ""


def line(value: dict) -> bool:
    """Whether it is a line of metrics.jsonl: numbers, and what they are of."""
    keys = {"kind": {"step", "epoch"}, "step": int}
    if problem(value, keys) or (value["kind"] == "epoch" and problem(value, {"epoch": int})):
        return False
    return all(one is None or isinstance(one, NUMBER) for key, one in value.items() if key != "kind")


def read_object(path: Path, shape=dict) -> dict:
    """The JSON object in a file that fits `shape`.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, or has another shape.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise StorageError(f"{path} is damaged: no JSON ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    wrong = problem(value, dict) or problem(value, shape)
    if wrong:
        raise StorageError(f"{path} is damaged: {wrong}")
    return value


def fits_samples(bits: bytes, samples: int) -> bool:
    """Whether there is a bit for each sample."""
    return len(bits) == -(-samples // 8)
