"""Which run is which: dropkey runs [list|group|diff|delete] [key=value ...]

list    state, config and figures of each run; what all share is said once
group   runs that differ in the seed alone, as mean ± standard deviation
diff    what differs between two runs: run=<one>,<another>
delete  removes failed and diverged runs: shows them first, and deletes with yes=true

Any key of a config is a filter: regularizer=dropkey ratio=0.1,0.3 data=cifar* state=failed seed=0. The last part of a
key is enough where it is unique. Numbers are compared by value; * and ? stand for anything.
"""

import csv
import fnmatch
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import List

from dropkey.config import identity, run_lookup
from dropkey.config.check import nearest, require
from dropkey.config.schema import TrainConfig, flatten
from dropkey.config.script_args import arg, parse, run_script, split
from dropkey.errors import ConfigError
from dropkey.records import RunDirectory
from dropkey.run_table import Entry, console, grouped, keys_of, read, show

NAMED = {"task": "task.name", "optim": "optim.name"}  # what a group's option sets


@dataclass
class Args:
    action: str = arg("list", "what to do", choices=("list", "group", "diff", "delete"))
    run: List[str] = arg([], "names, hashes, beginnings of either or patterns, with commas; empty: all runs")
    output: str = arg("", "the directory of the runs; empty: what the config says, runs/")
    sort: str = arg("", "test, val, age or a key of the config; -test: the best first; empty: the latest last")
    csv: str = arg("", "also write a table with every key of the config to this file")
    yes: bool = arg(False, "delete: do it")


def selected(args: Args, filters: list[str]) -> list[Entry]:
    """The runs that the arguments mean, in order."""
    root = args.output or run_lookup.default_root()
    paths = run_lookup.find_runs(",".join(args.run), root) if args.run else run_lookup.all_runs(root)
    entries = [read(path) for path in paths]
    for word in filters:
        key, _, wanted = word.partition("=")
        if key != "state":
            full_key(key)  # refused even where there is no run
        entries = [entry for entry in entries if matches(entry, key, wanted)]
    return ordered(entries, args.sort)


def matches(entry: Entry, key: str, wanted: str) -> bool:
    """Whether the run has one of the values in `wanted` (with commas; numbers by value, words with * and ?).

    Raises:
        ConfigError: no such key; the last part of one is enough where it is unique.
    """
    values = [entry.keys.get(key)]
    if key == "state":
        values = [entry.state]
    elif key in ("model", "regularizer", "schedule", "data"):
        values += [getattr(entry.cfg, key).name]
    else:
        values = [entry.keys.get(full_key(key))]
    return any(equal(value, one) for value in values for one in wanted.split(","))


def full_key(key: str) -> str:
    known = list(keys_of(TrainConfig()))
    if key in known:
        return key
    if key in NAMED:
        return NAMED[key]
    tails = [one for one in known if one.rpartition(".")[2] == key]
    if len(tails) == 1:
        return tails[0]
    hint = f"; several keys end so: {', '.join(tails)}" if tails else nearest(key, [*known, "state"])
    raise ConfigError(f"{key} is no key of a run{hint}")


def equal(value: object, wanted: str) -> bool:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    try:
        return float(text) == float(wanted)
    except ValueError:
        return fnmatch.fnmatchcase(text, wanted)


def ordered(entries: Sequence[Entry], key: str = "") -> list[Entry]:
    """By `key` (test, val, age, or a key of the config; -key: backwards), or the latest last; runs without a value
    last."""
    name = key.removeprefix("-")
    if not name:
        return list(entries)
    if name in ("test", "val", "age", "state"):
        value = {"test": lambda e: e.test, "val": lambda e: e.val, "state": lambda e: e.state}.get(
            name, lambda e: None if e.since is None else -e.since.timestamp()
        )
    else:
        try:
            name = full_key(name)
        except ConfigError:
            raise ConfigError(f"cannot sort by {name}; sort= takes test, val, age, state or a key of train") from None
        value = lambda e: e.keys.get(name)  # noqa: E731
    having = [entry for entry in entries if value(entry) is not None]
    numbers = all(isinstance(value(entry), (int, float)) for entry in having)
    having.sort(key=value if numbers else lambda entry: str(value(entry)), reverse=key.startswith("-"))
    return having + [entry for entry in entries if value(entry) is None]


def diff(entries: list[Entry]) -> None:
    require(len(entries) == 2, f"diff takes run=<one>,<another>; {len(entries)} runs are meant")
    one, other = entries
    differences = identity.differences(one.cfg, other.cfg)
    print(f"{one.path.name} -> {other.path.name}")
    print("\n".join(f"  {line}" for line in differences) or "  the same config")
    if one.test is not None and other.test is not None:
        print(f"  test: {one.metric.format(one.test)} -> {other.metric.format(other.test)}")


def delete(entries: list[Entry], yes: bool) -> None:
    """Removes failed and diverged runs, and no others."""
    bad = [entry for entry in entries if entry.state in ("failed", "diverged")]
    require(bool(bad), "none of these runs has failed or diverged, and no others are deleted")
    for entry in bad:
        if yes:
            with RunDirectory(entry.path).lock():
                shutil.rmtree(entry.path)
        print(f"{'deleted' if yes else 'would delete'} {entry.path} ({entry.state}: {entry.reason})")
    if not yes:
        print(f"nothing is deleted yet; the same command with yes=true deletes {len(bad)} runs")


def as_rows(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """For CSV: a row for each run with its state, figures and every key of its config."""
    return [
        {
            "run": entry.path.name,
            "state": entry.state,
            "reason": entry.reason,
            "epoch": entry.epoch,
            "val": entry.val,
            "test": entry.test,
            **flatten(asdict(entry.cfg)),
        }
        for entry in entries
    ]


def write_csv(entries: list[Entry], path: Path) -> None:
    rows = as_rows(entries)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"csv    {path}")


def main(words: list[str]) -> None:
    own, filters = split(Args, words)
    args = parse(Args, own, __doc__)
    entries = selected(args, filters)
    if not entries:
        print(f"no runs{' of that kind' if filters else ''} in {args.output or run_lookup.default_root()}")
        return
    if args.action == "list":
        show(entries)
    elif args.action == "group":
        out = console()
        out.print(grouped(entries, out.width))
    elif args.action == "diff":
        diff(entries)
    else:
        delete(entries, args.yes)
    if args.csv:
        write_csv(entries, Path(args.csv))


def start() -> None:
    run_script(main)
