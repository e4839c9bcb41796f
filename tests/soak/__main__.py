"""Runs the soak and prints one table; exit code 1 when something was not as it must be."""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dropkey.config.script_args import arg, parse, run_script
from soak import launching, training

PARTS = ("all", "training", "launcher")


@dataclass
class Args:
    minutes: float = arg(60.0, "of the trainings; the launchers take some minutes more; below 5 all is small")
    part: str = arg("all", "which", choices=PARTS)
    seed: int = arg(-1, "of the random moments; -1: drawn, and printed")


def main(words: list[str]) -> int:
    args = parse(Args, words, __doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup` and `&` may have left ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = args.seed if args.seed >= 0 else random.SystemRandom().randrange(10**6)
    began, faults, rows = time.monotonic(), [], [("seed", str(seed))]

    def say(text: str) -> None:
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {text}", flush=True)

    say(f"seed={seed}")
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    if args.part in ("all", "training"):
        result = training.soak(place / "training", args.minutes * 60, seed, say)
        more, found = training_rows(result)
        rows, faults = [*rows, *more], [*faults, *found]
    if args.part in ("all", "launcher"):
        result = launching.soak(place / "launcher", args.minutes * 60 < training.QUICK, seed, say)
        rows, faults = [*rows, *launcher_rows(result)], [*faults, *result.faults]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    for fault in faults:
        print(f"not as it must be: {fault}")
    if faults:
        print(f"kept: {place}")
    else:
        shutil.rmtree(place)
        print("all as it must be")
    return int(bool(faults))


def training_rows(result: training.Result) -> tuple[list[tuple[str, str]], list[str]]:
    faults = list(result.faults)
    for name, growth, mib, handles in (
        ("uninterrupted", result.flat, training.GROWTH_MIB, training.GROWTH_HANDLES),
        ("longest life", result.longest, training.LIFE_MIB, training.LIFE_HANDLES),
    ):
        if growth.mib > mib or growth.handles > handles:
            faults.append(f"{name}: grew by {growth.mib:.1f} MiB, {growth.handles:g} handles")
    kills = (
        f"{sum(result.kills.values())}, {result.early} before the first step, {result.commands} under a real torchrun"
    )
    resumes = sorted(result.resumes) or [0.0]
    by_kind = [(f"  {name} to {target}", str(number)) for (name, target), number in sorted(result.kills.items())]
    bound = f"bound {training.GROWTH_MIB} MiB, {training.GROWTH_HANDLES} handles"

    def grown(growth) -> str:
        return f"{growth.mib:+.1f} MiB of {growth.most_mib:.0f}, {growth.handles:+g} handles in {growth.seconds:.0f} s"

    return [
        ("trainings: laps, each killed and resumed until done", str(result.laps)),
        ("  equal to the uninterrupted one to the last bit", f"{result.exact} of {result.laps}"),
        ("kills", kills),
        *by_kind,
        ("  stopped on request in training: all saved", f"{result.saved} of {result.asked}"),
        ("  second start beside a killed torchrun's processes: refused", str(result.refused)),
        (
            "seconds from start to the first new step",
            f"median {resumes[len(resumes) // 2]:.1f}, most {resumes[-1]:.1f}",
        ),
        (f"growth of a process, uninterrupted, {result.flat_epochs} epochs ({bound})", grown(result.flat)),
        ("growth of a process, longest life among the kills", grown(result.longest)),
    ], faults


def launcher_rows(result: launching.Result) -> list[tuple[str, str]]:
    bad = len(result.faults_of)
    return [
        ("launchers: runs of the table, worked on by two at once", str(result.runs)),
        ("  of which one " + ", one ".join(result.faults_of.values()), str(bad)),
        ("  one launcher killed when so many runs had begun", str(result.begun_before_kill)),
        ("healthy runs finished, each step trained once, as alone", f"{result.healthy} of {result.runs - bad}"),
        ("failed runs that the report names with the reason", f"{result.named} of {bad}"),
        ("  processes that tried them", str(result.tries)),
        ("the same command without the faults: steps trained unasked", str(result.steps_again)),
        ("  with retry=true: failed runs repaired, as alone", f"{result.repaired} of {bad}"),
        ("  of these resumed from a checkpoint", str(result.resumed)),
        ("  healthy runs left alone", f"{result.untouched} of {result.runs - bad}"),
        ("  once more: steps trained", str(result.last_steps)),
    ]


if __name__ == "__main__":
    run_script(main)
