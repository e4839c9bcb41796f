"""Runs all cases, each family in a process of its own with everything imported, and prints the tables."""

import argparse
import collections
import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dropkey.invocation import COMMANDS
from hostile import commands, damages, stub


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("only", nargs="*", help="families, or beginnings of their names; empty: all")
    options.add_argument("--seed", type=int, default=0, help="of truncations and flipped bits")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--shown", type=int, default=5, help="failures of a family that are printed")
    options = options.parse_args()
    for name in COMMANDS:
        importlib.import_module(f"dropkey.commands.{name}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DROPKEY_CACHE"] = str(Path(folder) / "cache")
        world = stub.world(Path(folder) / "world")
        families = collections.defaultdict(list)
        for case in commands.all_cases(world.run, "image.png", "tiny.yaml"):
            families[case.family].append(case)
        for case in damages.all_cases(world):
            families[f"damage: {case.case.family}"].append(case)
        chosen = {k: v for k, v in families.items() if not options.only or k.startswith(tuple(options.only))}
        work = [(name, cases, world, Path(folder), options.seed) for name, cases in chosen.items()]
        work.sort(key=lambda one: -len(one[1]))
        with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
            results = dict(pool.imap_unordered(family, work, chunksize=1))
    return show({name: results[name] for name in chosen}, options.shown)


def family(work: tuple) -> tuple[str, dict]:
    name, cases, world, folder, seed = work
    place = Path(folder) / name.replace(" ", "-").replace(":", "")
    began, found = time.monotonic(), {}
    for number, case in enumerate(cases, 1):
        found[f"{number} {case}"] = stub.tried(case, world, place, seed)
    with contextlib.suppress(OSError):
        os.chdir("/")
    survived = f"{sum(not faults for faults in found.values())} of {len(found)}"
    print(f"{name}: {survived} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return name, {"tried": len(cases), "failures": {case: faults for case, faults in found.items() if faults}}


def show(results: dict[str, dict], shown: int) -> int:
    for name, result in results.items():
        for case, faults in list(result["failures"].items())[:shown]:
            print(f"{name} | {case}\n    {'; '.join(faults)}")
    print(f"\n{'case family':<32} {'tried':>6} {'survived':>9}")
    totals = collections.Counter()
    for name, result in results.items():
        survived = result["tried"] - len(result["failures"])
        kind = "damages" if name.startswith("damage") else "commands"
        totals[kind, "tried"] += result["tried"]
        totals[kind, "survived"] += survived
        print(f"{name:<32} {result['tried']:>6} {survived:>9}")
    for kind in ("commands", "damages"):
        print(f"{'all ' + kind:<32} {totals[kind, 'tried']:>6} {totals[kind, 'survived']:>9}")
    if os.geteuid() == 0:
        print("no permission to read: not tried, as root may read everything")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
