"""A table with its runs and records: plan, run and report."""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from rich.console import Console

from dropkey.config.check import require
from dropkey.config.device import check_device
from dropkey.errors import ConfigError
from dropkey.invocation import invocation
from dropkey.records import RunDirectory, clock
from dropkey.reproduction import (
    content,
    cost,
    display,
    forked,
    planning,
    record_file,
    results,
    runner,
    slots,
    slurm,
    tuning,
    versions,
)
from dropkey.reproduction.comparison import Comparison, compare
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, Job, distinct, jobs_of, state
from dropkey.reproduction.report import write
from dropkey.reproduction.results import Earlier
from dropkey.reproduction.tables import Row, Table

SHOWN = 5  # outdated runs that a plan names


@dataclass
class Study:
    """A table with the places of its runs and reports, and what is known of it.

    `args` are those of dropkey/commands/reproduce.py.
    """

    table: Table
    args: object
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True, markup=False))
    earlier: Earlier = field(init=False)
    tuned: list[dict] = field(init=False)

    def __post_init__(self):
        self.earlier = Earlier.read(self.file, self.table)
        for line in self.earlier.left_out:
            self.console.print(f"left out: {line}")
        if self.args.action != "run":
            self.table = results.as_planned(self.table, self.earlier.head)
        self.look_at_tuning()

    @property
    def directory(self) -> Path:
        return Path(self.args.results) / self.table.slug

    @property
    def file(self) -> Path:
        return self.directory / record_file.FILE

    def look_at_tuning(self) -> None:
        self.tuned = tuning.gather(self.table, self.args.output, self.earlier.head.get("tuning", []))
        self.table = tuning.with_choices(self.table, self.tuned)

    def tuning_jobs(self) -> list[Job]:
        """Without those whose result is in the records and whose run is gone."""
        known = {tuning.key(entry): entry["runs"] for entry in self.tuned}
        jobs = tuning.jobs_of(self.table, self.args.output)
        return [
            job
            for place, job in jobs.items()
            if state(job)[0] in (DONE, DIVERGED)
            or str(place[3]) not in known.get(tuning.key(tuning.candidate_of(self.table, place, job)), {})
        ]

    def jobs(self) -> dict[results.Place, Job]:
        return jobs_of(self.table, self.args.output)

    def save(self, comparison: Optional[Comparison] = None) -> None:
        """The table's file of records. At a look it also keeps what the claims looked like then."""
        jobs = self.jobs()
        head, found = results.gather(self.table, jobs, self.tuned, self.earlier)
        if comparison is not None and comparison.look is not None:
            looked = {str(comparison.look): [content.verdict(comparison, one) for one in comparison.findings]}
            head["looks"] = looked | head["looks"]  # what was seen first stays
        if self.earlier.left_out:
            self.console.print(f"the old file is kept: {record_file.keep(self.file)}")
        record_file.write(self.file, head, [*found, *self.earlier.unused(self.table, jobs)])
        self.earlier = Earlier.read(self.file, self.table)

    # ------------------------------------------------------------------------------------------------------- plan

    def plan(self) -> int:
        show, table = self.console.print, self.table
        jobs = self.jobs()
        recorded = self.earlier.of(table, jobs)
        todo = list(dict.fromkeys([*self.tuning_jobs(), *(job for job in jobs.values() if job not in recorded)]))
        show(f"{table.title}: {table.about}", soft_wrap=False)  # between words
        for grid in display.overview(table, jobs, recorded, self.console.width):
            show(grid)
        show(display.LEGEND, style="dim")
        show(display.counts(todo, len(set(recorded))))
        for line in display.tuned(table, self.tuned):
            show(line)
        for job in todo:
            if state(job)[0] in (FAILED, DIVERGED):
                show(display.describe(job, *state(job)))
        for some in (self.tuning_jobs(), distinct(jobs)):
            lines = explain_outdated(planning.outdated(some, recorded))
            for line in lines[:SHOWN]:
                show(line)
            if len(lines) > SHOWN:
                show(f"and {len(lines) - SHOWN} more")
        places = self.places()
        seconds, size, unknown = planning.estimate(todo, len(places))
        if seconds:
            at_once = f"{len(places)} at a time" if len(places) > 1 else str(places[0])
            show(f"about {clock(seconds)} ({at_once}), {size / 2**20:,.0f} MiB")
        if unknown:
            show(f"{unknown} jobs of unknown length: no run of their model and data is finished")
        if self.args.gpu:
            missing = {job: one[1] for one, job in jobs.items() if not job.evaluation and state(job)[0] != DONE}
            tflops = cost.peak(self.args.gpu)
            found = cost.costs(missing, tflops, self.args.utilisation)
            show(display.cost(*found, tflops, self.args.utilisation, self.args.price))
        if self.args.delta:
            known = {} if self.args.deviation else {one.claim: one.difference for one in self.compare().findings}
            hours = planning.hours_per_seed(distinct(jobs), len(table.seeds), len(places))
            lines = planning.power(table, known, self.args.delta, self.args.power, self.args.deviation, hours)
            show(display.power(lines, self.args.delta, self.args.power))
        return 0

    # -------------------------------------------------------------------------------------------------------- run

    def run(self) -> int:
        """Tunes where rows ask for it, then goes from look to look until every claim is decided or all seeds are
        run, then reports."""
        self.save()  # the plan, before its first run
        jobs = self.tuning_jobs()
        left, stopped = self.launch(jobs, {}) if jobs else ([], 0)
        self.look_at_tuning()
        self.save()
        open_rows = [row.label for row in self.table.rows.values() if row.candidates and not self.is_chosen(row)]
        if stopped or tuning.missing(self.table, self.tuned):
            return self.end(left, stopped)
        require(not open_rows, f"every candidate of {' and '.join(open_rows)} has a run that diverged")
        more, stopped = self.run_looks()
        if not stopped:
            if self.args.entropy:
                self.measure_entropy()
            self.report()
        return self.end([*left, *more], stopped)

    def is_chosen(self, row: Row) -> bool:
        return all((row.label, column) in self.table.chosen for column in self.table.columns)

    def run_looks(self) -> tuple[list[runner.JobState], int]:
        """(jobs that are not done, the signal that stopped the launcher or 0)."""
        left, stopped, looks = [], 0, self.looks()
        for table in looks:
            self.table = table
            jobs, before = self.jobs(), {one.job for one in left}
            missing = [job for job in distinct(jobs) if job not in before]
            more, stopped = self.launch(missing, self.earlier.of(table, jobs))
            left += more
            self.save()
            if stopped or any(one.state not in (FAILED, DIVERGED) for one in more):
                break
            comparison = self.compare()
            self.save(comparison)
            if len(looks) > 1:
                self.console.print(display.decisions(comparison))
                if comparison.decided:
                    break
        return left, stopped

    def looks(self) -> list[Table]:
        """The table with the seeds of each look; with other seeds than planned, the table as it is."""
        design = self.table.design
        if self.table.seeds != design.seeds:
            return [self.table]
        return [replace(self.table, seeds=design.seeds[:look]) for look in design.looks]

    def places(self) -> list[slots.Slot]:
        args = self.args
        if args.launcher == "slurm":
            return slurm.queue_slots(args.jobs, args.gpus_per_run, args.slurm.get("cpus_per_task", "1"))
        return slots.slots(args.jobs, args.gpus, args.per_gpu, args.gpus_per_run)

    def launch(self, jobs: list[Job], recorded: dict[Job, dict]) -> tuple[list[runner.JobState], int]:
        """(jobs that are not done, the signal that stopped the launcher or 0)."""
        args = self.args
        launcher = runner.Launcher(jobs, self.places(), args.retry)
        if args.launcher == "slurm":
            gpus = 0 if args.gpus == "none" else args.gpus_per_run
            launcher.start = slurm.submitter(args.slurm, Path(args.output), gpus)
        else:
            for job in jobs:
                if state(job)[0] != DONE and job not in recorded:
                    check_device("trainer.device", job.config.trainer.device)
        outdated = {} if args.mixed else planning.outdated(jobs, recorded, args.retry)
        if outdated and args.outdated == "refuse":
            raise ConfigError(
                f"{len(outdated)} finished runs {explain_outdated(outdated)[0]}; outdated=retrain trains them again "
                "and overwrites them, mixed=true compares them all the same, a new output= trains everything"
            )
        for job in outdated:
            if job in recorded:
                self.earlier.forget(recorded[job]["run"])
            else:
                runner.discard(job)
        needed = {job.needs for job in jobs if job not in recorded or job in outdated}
        launcher.jobs = [job for job in jobs if job not in recorded or job in outdated or job in needed]
        if args.launcher == "local":
            missing = sum(state(job)[0] != DONE for job in launcher.jobs)
            launcher.start = forked.starter(missing, launcher.slots[0].environment())
        tuned = [job for job in self.tuning_jobs() if state(job)[0] == DONE]
        states = launcher.run(display.watch(self.console, tuned))
        left = [one for one in states if one.state != DONE]
        for one in left:
            if one.state in (FAILED, DIVERGED):
                self.console.print(display.describe(one.job, one.state, one.reason))
        return left, launcher.stopped

    def end(self, left: list[runner.JobState], stopped: int) -> int:
        """The exit code."""
        if stopped:
            again = f"{invocation()} {shlex.join(sys.argv[1:])}"
            self.console.print(f"interrupted, all saved; go on with: {again}")
            return 128 + stopped
        failed = sum(one.state in (FAILED, DIVERGED) for one in left)
        if failed:
            self.console.print(f"{failed} failed; the same command with retry=true tries them again")
        return 1 if left else 0

    def measure_entropy(self) -> None:
        """Of all finished trainings, in a process of its own, because it imports torch."""
        runs = [job.run for job in distinct(self.jobs()) if state(job)[0] == DONE and not job.evaluation]
        runs = [run for run in runs if not RunDirectory(run).entropy()]
        if not runs:
            return
        self.console.print("measuring the entropy of attention (entropy=false skips it)")
        with tempfile.TemporaryDirectory() as place:  # the report draws its own picture, from entropy.json in each run
            visualize = slots.python("scripts/visualize.py")
            words = ["entropy", f"run={','.join(map(str, runs))}", f"output={place}/entropy.png"]
            done = subprocess.run([*visualize, *words], capture_output=True, text=True)
        if done.returncode != 0:  # a report without it is better than none
            self.console.print(f"no entropy: {done.stderr.strip()[-300:]}")

    # ----------------------------------------------------------------------------------------------------- report

    def compare(self) -> Comparison:
        """What is finished so far."""
        missing = tuning.missing(self.table, self.tuned)
        require(not missing, f"table={self.table.name} is not tuned yet: {missing} runs are missing; run it first")
        head, found = results.gather(self.table, self.jobs(), self.tuned, self.earlier)
        return compare(self.table, head, found, versions.require_one_version(head, found, self.args.mixed))

    def report(self) -> int:
        if self.args.records:
            directory = Path(self.args.records).parent
            table, head, found = results.read(Path(self.args.records), self.table)
            comparison = compare(table, head, found, versions.require_one_version(head, found, self.args.mixed))
        else:
            directory = self.directory
            for table in self.looks():  # up to the look that decides everything, or that is not over yet
                self.table = table
                comparison = self.compare()
                if comparison.decided or comparison.look != len(table.seeds):
                    break
        name, scale = self.table.name, self.table.scale
        require(bool(comparison.done), f"no run of table={name} scale={scale} is finished yet")
        if not self.args.records:
            self.save()
        text = write(comparison, directory)
        print(text.split("\n## Differences")[0])
        print(f"report {directory}/report.html (also .md, .tex, .csv, .json, {record_file.FILE} and the pictures)")
        return 0


def explain_outdated(found: dict) -> list[str]:
    return [f"cannot be compared with new runs: {job.name}, because {reason}" for job, reason in found.items()]
