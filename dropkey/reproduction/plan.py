"""What a table still needs: runs, time and disk, from finished runs or from a short probe."""

import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dropkey.errors import ConfigError
from dropkey.records import RunDirectory, hardware, write_json
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, RUNNING, Job, state
from dropkey.reproduction.runner import explain
from dropkey.reproduction.slots import Slot

PROBE_STEPS = 12
FORWARD = 0.4  # of a training step's time per image, for evaluations


@dataclass(frozen=True)
class Cost:
    """Of one training."""

    seconds: float  # from the start of the process to its end
    startup: float  # of that, before the first step
    bytes: int  # of its directory
    images: int  # test images
    samples_per_second: float  # while training

    def evaluation(self, passes: int) -> float:
        return self.startup + max(1, passes) * self.images * FORWARD / self.samples_per_second


def distinct(jobs) -> list[Job]:
    """Each job once, in the order of the table: cells may share one, such as a baseline."""
    return list(dict.fromkeys(jobs))


def states(jobs: list[Job]) -> Counter:
    return Counter(state(job)[0] for job in jobs)


def estimate(jobs: list[Job], slot: Slot, output: Path, probe: bool, say=print) -> Optional[tuple[float, int]]:
    """Seconds and bytes that the jobs not yet done will take, one after the other, in `slot`.

    Of a training whose like (the same column: model, data, length) is finished the cost is known; else the first of
    its kind is tried for a few steps. None where neither is there.
    """
    known: dict[str, list[Cost]] = {}
    for job in jobs:
        if job.script == "train.py" and state(job)[0] == DONE:
            known.setdefault(kind(job), []).append(of_finished(job))
    seconds, size = 0.0, 0
    for job in jobs:
        found = state(job)[0]
        if found in (DONE, FAILED, DIVERGED):
            continue
        base = job if job.script == "train.py" else job.needs
        if kind(base) not in known:
            cost = probed(base, slot, output, say) if probe else None
            if cost is None:
                return None
            known[kind(base)] = [cost]
        costs = sorted(known[kind(base)], key=lambda cost: cost.seconds)
        cost = costs[len(costs) // 2]
        if job.script == "eval.py":
            seconds += cost.evaluation(passes(job))
        else:
            left = 1 - progress(job)[0] / max(1, job.composed.epochs) if found in (INTERRUPTED, RUNNING) else 1
            seconds += cost.startup + left * (cost.seconds - cost.startup)
            size += 0 if found in (INTERRUPTED, RUNNING) else cost.bytes
    return seconds, size


def kind(job: Job) -> str:
    """What runs must share for one to tell the cost of another."""
    one = job.composed
    return f"{one.model} {one.facts} batch {one.batch_size} evaluated every {one.eval_every}"


def passes(job: Job) -> int:
    return next((int(word.split("=")[1]) for word in job.words if word.startswith("eval.monte_carlo=")), 1)


def progress(job: Job) -> tuple[int, Optional[dict]]:
    """Finished epochs and the last epoch's record."""
    records = RunDirectory(job.run).records("epoch")
    return (records[-1]["epoch"], records[-1]) if records else (0, None)


def of_finished(job: Job) -> Cost:
    summary = RunDirectory(job.run).summary()
    startup = 10.0  # importing torch and timm, reading data: not recorded, and small beside what it is added to
    test = summary["images"] * FORWARD / summary["samples_per_second"]
    whole = startup + summary["seconds"] + test
    return Cost(whole, startup, weight(job.run), summary["images"], summary["samples_per_second"])


def weight(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def probed(job: Job, slot: Slot, output: Path, say) -> Cost:
    """The cost of a training, from a few of its steps; kept, so that the next plan has it at once.

    Raises:
        ConfigError: it cannot train.
    """
    file = output / ".probes.json"
    content = RunDirectory(output).read_json(file.name)
    key = f"{kind(job)} on {hardware()}, {slot}"
    if key in content:
        return Cost(**content[key])
    say(f"trying {job.composed.model} on {job.composed.data} for {PROBE_STEPS} steps (probe=false leaves that out)")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".probe-") as place:
        words = [word for word in job.words if not word.startswith(("output=", "init_from="))]
        words += [f"output={place}", f"trainer.max_steps={PROBE_STEPS}", "logger=none"]
        short = dataclasses.replace(job, words=tuple(words))
        log = Path(place) / "log"
        began = time.perf_counter()
        with open(log, "w") as stream:
            done = subprocess.run(slot.command(short), env=slot.environment(), stdout=stream, stderr=stream)
        wall = time.perf_counter() - began
        if done.returncode != 0:
            raise ConfigError(f"the probe of {job.name} failed: {explain(done.returncode, log)}")
        run = next(path for path in Path(place).iterdir() if (path / "summary.json").exists())
        cost = extrapolate(job, RunDirectory(run).summary(), wall, weight(run))
    write_json(file, {**RunDirectory(output).read_json(file.name), key: vars(cost)})
    return cost


def extrapolate(job: Job, summary: dict, wall: float, size: int) -> Cost:
    """From a probe of one evaluation and a few steps to all epochs and evaluations."""
    one = job.composed
    rate = summary["samples_per_second"]
    steps = one.epochs * summary["steps_per_epoch"]
    steps = min(steps, one.max_steps or steps)
    training = summary["steps"] * one.batch_size / rate
    watching = max(0.0, summary["seconds"] - training)  # one evaluation
    evaluations = -(-one.epochs // one.eval_every)
    startup = max(0.0, wall - summary["seconds"])  # with the final evaluation
    seconds = startup + steps * one.batch_size / rate + evaluations * watching
    return Cost(seconds, startup, size, summary["images"], rate)


def free_bytes(output: Path) -> int:
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
