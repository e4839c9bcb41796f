"""Runs side by side: what each is, how it stands, what it has reached. Imports no torch."""

import datetime
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dropkey.config import compose, identity
from dropkey.config.schema import TrainConfig, flatten
from dropkey.errors import RunError
from dropkey.metrics import Metric
from dropkey.records import RunDirectory

STYLES = {"done": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "diverged": "red"}
WIDE = 200  # columns, where the output is no terminal
SHORT = 8  # digits of a hash that are shown, enough for run=
BAD = ("failed", "diverged", "damaged")
COLUMNS = ("model", "regularizer", "ratio", "schedule", "data", "seed", "from")
FOLDED, FOLD = ("model", "data", "from", "not done"), 8  # columns that may take several lines of so many characters


@dataclass
class Entry:
    """A run directory, read."""

    path: Path
    cfg: TrainConfig
    state: str  # done, running, interrupted, failed, diverged, missing, or damaged: a file cannot be read
    reason: str = ""
    epoch: int = 0  # finished
    val: Optional[float] = None  # the watched metric at the last evaluation
    test: Optional[float] = None
    metric: Optional[Metric] = None
    since: Optional[datetime.datetime] = None  # in this state
    keys: dict[str, object] = field(default_factory=dict)  # for people and filters

    @property
    def hash(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def bad(self) -> bool:
        return self.state in BAD

    @property
    def group(self) -> str:
        """Runs that differ in nothing but the seed share it."""
        return identity.group_hash(self.cfg)

    def shown_state(self) -> Text:
        progress = f" {self.epoch}/{self.cfg.trainer.epochs}" if self.state not in ("done", "missing") else ""
        return Text(self.state + progress, style=STYLES.get(self.state, "red" if self.bad else ""))

    def age(self, now: datetime.datetime) -> str:
        if self.since is None:
            return ""
        seconds = max((now - self.since).total_seconds(), 0)
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if seconds >= size:
                return f"{seconds / size:.0f} {unit}"
        return f"{seconds:.0f} s"


def read(path: Path) -> Entry:
    """Never fails: what cannot be read makes the run "damaged", with the reason."""
    run, entry = RunDirectory(path), Entry(path, TrainConfig(), "damaged")
    try:
        cfg = compose.read(run.config)
        identity.group_hash(cfg)  # fails for values of another type, as tables of runs would
        entry.keys, entry.cfg = keys_of(cfg), cfg
        entry.state, entry.reason = run.state()
        since = run.status().get("time")
        entry.since = datetime.datetime.fromisoformat(since) if since else None
        summary = run.summary() if entry.state == "done" else {}
        if summary:
            entry.metric = Metric(**summary["metrics"][0])
            entry.epoch, entry.test = summary["epochs"], summary[entry.metric.key]
            entry.val = summary["objective"] if summary["best_split"] == "val" else None
        elif epochs := run.records("epoch"):
            entry.epoch = epochs[-1]["epoch"]
            watched = next((key for one in epochs for key in one if key.startswith("eval_")), None)
            entry.val = next((one[watched] for one in reversed(epochs) if watched in one), None)
    except (RunError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        entry.state, entry.reason = "damaged", str(error) or type(error).__name__
    return entry


def keys_of(cfg: TrainConfig) -> dict[str, object]:
    """COLUMNS, then every key of the config."""
    window, none = cfg.regularizer.window, cfg.regularizer.name == "none"
    start = Path(cfg.init_from or "").name
    named = {
        "model": identity.model_label(cfg),
        "regularizer": cfg.regularizer.name + ("" if window is None else f" {window}"),
        "ratio": None if none else cfg.regularizer.ratio,
        "schedule": None if none else identity.schedule_label(cfg.schedule),
        "data": identity.data_label(cfg),
        "seed": cfg.seed,
        "from": start.rpartition("-")[2][:SHORT] if Path(cfg.init_from or "").suffix == "" else start,
    }
    return named | flatten(asdict(cfg))


# ------------------------------------------------------------------------------------------------------------ tables


def console() -> Console:
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal or "COLUMNS" in out._environ else Console(highlight=False, markup=False, width=WIDE)


def show(entries: list[Entry]) -> None:
    """The list, failures at the end."""
    good, bad = [one for one in entries if not one.bad], [one for one in entries if one.bad]
    out = console()
    out.print(listing([*good, *bad], out.width))
    for line in failures(bad):
        out.print(line, style="red", soft_wrap=True)


def differing(entries: Sequence[Entry]) -> list[str]:
    """Keys that change the result and are not the same in all runs, beyond what the named columns say."""
    named = ("model.", "regularizer.", "schedule.", "data.name", "data.root", "seed", "init_from")
    found = [identity.canonical(entry.cfg) for entry in entries]
    keys = dict.fromkeys(key for one in found for key in one)
    differ = [key for key in keys if len({repr(one.get(key)) for one in found}) > 1]
    return [key for key in differ if not key.startswith(named)]


def shown(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def split_columns(entries: Sequence[Entry], named: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(what all runs share, the columns that tell them apart)"""
    columns = [*named, *differing(entries)]
    values = {key: {shown(entry.keys.get(key)) for entry in entries} for key in columns}
    same = {key: next(iter(found)) for key, found in values.items() if len(found) == 1 and len(entries) > 1}
    return {key: value for key, value in same.items() if value}, [key for key in columns if key not in same]


def score(entry: Entry, value: Optional[float]) -> str:
    return "" if value is None else f"{value:.{entry.metric.digits if entry.metric else 2}f}"


def listing(entries: Sequence[Entry], width: int, now: Optional[datetime.datetime] = None) -> Grid:
    """A row for each run; what all of them share is said once, above."""
    now = now or datetime.datetime.now(datetime.timezone.utc)
    same, keys = split_columns(entries, COLUMNS)
    states = {entry.state for entry in entries}
    alike = len(states) == 1 and len(entries) > 1
    table = {"run": [entry.hash[:SHORT] for entry in entries]}
    if not alike:
        table["state"] = [entry.shown_state() for entry in entries]
    table |= {key: [shown(entry.keys.get(key)) for entry in entries] for key in keys}
    table["val"] = [score(entry, entry.val) for entry in entries]
    table["test"] = [score(entry, entry.test) for entry in entries]
    table["age"] = [entry.age(now) for entry in entries]
    return fitted(table, title_of(same, [f"all {len(entries)} {next(iter(states))}"] if alike else []), width)


def grouped(entries: Sequence[Entry], width: int) -> Grid:
    """A row for each set of runs that differ in nothing but the seed: mean and standard deviation of what is done."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    firsts = [group[0] for group in groups.values()]
    done = [[entry for entry in group if entry.state == "done"] for group in groups.values()]
    left = [Counter(entry.state for entry in group if entry.state != "done") for group in groups.values()]
    same, keys = split_columns(firsts, [key for key in COLUMNS if key != "seed"])
    table = {key: [shown(first.keys.get(key)) for first in firsts] for key in keys}
    table["runs"] = [str(len(group)) for group in done]
    table["val"] = [mean_and_deviation(group, [entry.val for entry in group]) for group in done]
    table["test"] = [mean_and_deviation(group, [entry.test for entry in group]) for group in done]
    table["not done"] = [", ".join(f"{count} {state}" for state, count in counts.items()) for counts in left]
    return fitted(table, title_of(same), width)


def mean_and_deviation(entries: Sequence[Entry], values: Sequence[Optional[float]]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = score(entries[0], statistics.mean(found))
    return mean if len(found) < 2 else f"{mean} ± {score(entries[0], statistics.stdev(found))}"


def title_of(same: dict[str, str], more: Sequence[str] = ()) -> str:
    named = ("model", "regularizer", "schedule", "data")
    return " · ".join([*(value if key in named else f"{heading(key)} {value}" for key, value in same.items()), *more])


def heading(key: str) -> str:
    """The last part of a key, in words, so that it may take two lines."""
    return key.rpartition(".")[2].replace("_", " ")


def fitted(table: dict[str, list], title: str, width: int) -> Grid:
    """A grid of the columns that have any content. Where it is too wide: less space between them, then long names on
    several lines, then no age and no val."""
    table = {key: cells for key, cells in table.items() if key == "run" or any(map(len, cells))}

    def most(key: str) -> int:
        return max(map(len, [heading(key), *table[key]]))

    def least(key: str) -> int:
        words = [word for cell in table[key] for word in str(cell).split()] if key == "state" else table[key]
        longest = max(map(len, [*heading(key).split(), *words]))
        return min(longest, FOLD) if key in FOLDED else longest

    for dropped in ("age", "val"):
        if sum(map(least, table)) + len(table) > width:
            table.pop(dropped, None)
    gap = 2 if sum(map(most, table)) + 2 * len(table) <= width else 1
    widths = {key: least(key) for key in table}
    for key in sorted(table, key=lambda key: key not in FOLDED):  # what is left goes to long names first
        widths[key] += min(max(width - sum(widths.values()) - gap * len(table), 0), most(key) - widths[key])
    grid = Grid(title=title or None, title_justify="left", title_style="", box=None, padding=(0, gap, 0, 0))
    for key in table:
        right = key in ("val", "test", "age", "runs")
        grid.add_column(heading(key), width=widths[key], overflow="fold", justify="right" if right else "left")
    for row in zip(*table.values(), strict=True):
        grid.add_row(*row)
    return grid


def failures(entries: Sequence[Entry]) -> list[str]:
    """What ends a list of runs: each failure with its reason and log."""
    return [f"{entry.state}: {entry.path}: {entry.reason or 'no reason recorded'}" for entry in entries if entry.bad]
