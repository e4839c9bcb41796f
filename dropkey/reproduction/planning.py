"""What a table still needs: seeds, time and disk, estimated from finished runs, and which of these are outdated."""

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Optional

from dropkey.code_version import changed_parts, code_of
from dropkey.config.check import require
from dropkey.records import RunDirectory
from dropkey.reproduction.content import NONE
from dropkey.reproduction.forecast import Forecast, keys, makespan
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, RUNNING, Job, share_left, state
from dropkey.reproduction.power import equivalence_seeds, seeds_needed
from dropkey.reproduction.runner import ELSEWHERE
from dropkey.reproduction.statistics import Difference
from dropkey.reproduction.tables import FEWEST, Claim, Table


def estimate(jobs: Sequence[Job], slots: int = 1) -> tuple[float, int, int]:
    """(seconds, bytes, jobs of unknown cost) until the jobs are done that are not, on so many slots."""
    states = {job: state(job)[0] for job in jobs}
    trainings = [job for job in jobs if not job.evaluation]
    finished = [job for job in trainings if states[job] == DONE]
    forecast = Forecast(finished, [job for job in trainings if states[job] in (INTERRUPTED, RUNNING)])
    todo, size, unknown = [], 0, 0
    sizes = {key: job.run for job in finished for key in keys(job)}
    for job in (job for job in jobs if states[job] not in (DONE, FAILED, DIVERGED)):
        seconds = forecast.seconds(job, share_left(job))
        if seconds is None:
            unknown += 1
            continue
        todo.append((job, seconds))
        like = next((sizes[key] for key in keys(job) if key in sizes), None)
        if like and not job.evaluation and states[job] not in (INTERRUPTED, RUNNING):
            size += sum(file.stat().st_size for file in like.rglob("*") if file.is_file())
    return makespan(todo, slots), size, unknown


def time_left(launcher, others: Sequence[Job] = ()) -> Optional[float]:
    """Seconds until the launcher's jobs are over; None while the length of one is not known. It learns most from jobs
    that it ran itself. `others`: finished trainings that it has no part in."""
    states = [one for one in launcher.states if not one.over]
    trainings = [one for one in launcher.states if not one.job.evaluation]
    own = [one.job for one in trainings if one.state == DONE and one.started]
    earlier = [one.job for one in trainings if one.state == DONE and not one.started]
    forecast = Forecast(own, earlier, others, [one.job for one in trainings if one.state == RUNNING])
    running, waiting, elsewhere, now = [], [], 0, time.monotonic()
    for one in states:
        started = one.process is not None
        seconds = forecast.seconds(one.job, one.share_left if started else share_left(one.job))
        if seconds is None:
            return None
        if started:
            seconds = max(seconds - (now - one.started), 0.0)
        elsewhere += one.state == ELSEWHERE
        (running if started or one.state == ELSEWHERE else waiting).append((one.job, seconds))
    return makespan([*running, *waiting], len(launcher.slots) + elsewhere)


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
    trainings = [job for job in jobs if not job.evaluation]
    forecast = Forecast([job for job in trainings if state(job)[0] == DONE])
    times = [forecast.seconds(job) for job in trainings]
    return None if None in times else sum(times) / seeds / slots / 3600
