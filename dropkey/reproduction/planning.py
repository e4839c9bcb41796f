"""What a table still needs: seeds, time and disk, estimated from finished runs, and which of these are outdated."""

import importlib.metadata
from collections.abc import Sequence
from typing import Optional

from dropkey.code_version import changed_parts, code_of
from dropkey.config import identity
from dropkey.config.check import require
from dropkey.records import RunDirectory
from dropkey.reproduction.content import NONE
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, RUNNING, Job, state
from dropkey.reproduction.power import equivalence_seeds, seeds_needed
from dropkey.reproduction.statistics import Difference
from dropkey.reproduction.tables import FEWEST, Claim, Table

STARTUP = 10.0  # seconds until the first step: imports, reading data
COST = ("task.", "model.", "data.", "augment.", "trainer.")  # the keys that decide the time of an epoch
FORWARD = 0.4  # time per sample of an evaluation / of a training step


def estimate(jobs: Sequence[Job]) -> tuple[float, int, int]:
    """(seconds, bytes, jobs of unknown cost) of the jobs that are not done, one after the other.

    The cost of a job is that of the last finished training which shares the keys in `COST`.
    """
    finished = {cost_key(job): job for job in jobs if not job.evaluation and state(job)[0] == DONE}
    seconds, size, unknown = 0.0, 0, 0
    for job in jobs:
        found = state(job)[0]
        if found in (DONE, FAILED, DIVERGED):
            continue
        like = finished.get(cost_key(job))
        if like is None:
            unknown += 1
            continue
        summary = RunDirectory(like.run).summary()
        seconds += STARTUP
        if job.evaluation:
            passes = max(1, job.evaluation.eval.monte_carlo)
            seconds += passes * summary["samples"] * FORWARD / summary["samples_per_second"]
        else:
            epochs = RunDirectory(job.run).records("epoch")
            left = job.config.trainer.epochs - (epochs[-1]["epoch"] if epochs else 0)
            seconds += summary["seconds"] * left / like.config.trainer.epochs
            if found not in (INTERRUPTED, RUNNING):
                size += sum(file.stat().st_size for file in like.run.rglob("*") if file.is_file())
    return seconds, size, unknown


def cost_key(job: Job) -> str:
    """Trainings with the same key take the same time per epoch."""
    keys = identity.canonical(job.config)
    return str({k: v for k, v in keys.items() if k.startswith(COST) and k != "trainer.epochs"})


def outdated(jobs: Sequence[Job], recorded: dict[Job, dict], retry: bool = False) -> dict[Job, str]:
    """Finished jobs that cannot be compared with those still to run, and why: a part of the code that both use, or
    torch, has changed. Empty if nothing is to run; failed jobs run again only if `retry`. `recorded`: the records of
    jobs whose runs are gone."""
    over = (DONE,) if retry else (DONE, FAILED, DIVERGED)
    left = [job for job in jobs if job not in recorded and state(job)[0] not in over]
    used = {part for job in left for part in code_of(job.config, cuda=True)}
    torch, found = importlib.metadata.version("torch"), {}
    for job in jobs if left else ():
        if job in recorded:
            code, version = recorded[job]["code"], recorded[job]["torch"]
        elif state(job)[0] == DONE:
            result = RunDirectory(job.run).read_json(job.result)
            code, version = result["code"], result["versions"]["torch"]
        else:
            continue
        changed = [part for part in changed_parts(code) if part in used]
        reasons = [f"the code of {', '.join(changed)} has changed"] if changed else []
        if version != torch:
            reasons.append(f"it used torch {version}, now it is {torch}")
        if reasons:
            found[job] = " and ".join(reasons)
    return found


def power(
    table: Table,
    known: dict[Claim, Optional[Difference]],
    delta: float,
    chance: float,
    guess: Optional[float],
    hours: Optional[float],
) -> list[list[str]]:
    """For each claim: its deviation between seeds, and the seeds and hours that find a true difference of `delta` with
    this chance. Alone, and where it is the first of all claims in Holm's correction; for a single look at the end.

    Args:
        known: the claims' differences in the runs.
        guess: of the deviation, in place of that of the runs.
        hours: of one seed, all rows and columns; None if not known.
    Raises:
        ConfigError: a claim without 3 finished seeds, and no guess.
    """
    claims, margin, lines = table.claims, table.design.margin, []
    for claim in claims:
        one = known.get(claim)
        deviation = guess or (one.deviation if one and one.n >= FEWEST else None)
        require(bool(deviation), f"claim '{claim}': no 3 seeds are finished; say deviation=, such as 1.2")
        source = "guess" if guess else f"{one.n} seeds"
        counts = [seeds_needed(delta, deviation, alpha, chance) for alpha in (0.05, 0.05 / len(claims))]
        shown = [str(count) if count else "> 10,000" for count in counts]
        time = [f"{count * hours:,.1f}" if count and hours else "not known" for count in counts]
        equal = NONE if margin is None else equivalence_seeds(margin, deviation, 0.05 / len(claims), chance)
        lines.append([str(claim), f"{deviation:.2f} ({source})", *shown, str(equal or "> 10,000"), time[1]])
    return lines


def hours_per_seed(jobs: Sequence[Job], seeds: int, slots: int) -> Optional[float]:
    """From finished trainings of the same cost; None if one is not known."""
    finished = {cost_key(job): RunDirectory(job.run).summary()["seconds"] for job in jobs if state(job)[0] == DONE}
    trainings = [job for job in jobs if not job.evaluation]
    if not all(cost_key(job) in finished for job in trainings):
        return None
    return sum(STARTUP + finished[cost_key(job)] for job in trainings) / seeds / slots / 3600
