"""Shows a table's progress: marks for the plan, and a line for every event of a launcher."""

import time
from collections import Counter
from collections.abc import Callable

from rich.table import Table as Grid
from rich.text import Text

from dropkey.metrics import Metric
from dropkey.records import RunDirectory, clock
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, MISSING, RUNNING, Job, state
from dropkey.reproduction.runner import JobState, Launcher
from dropkey.reproduction.tables import Table

MARKS = {
    DONE: ("✓", "green"),
    RUNNING: ("▶", "cyan"),
    INTERRUPTED: ("‖", "yellow"),
    FAILED: ("✗", "red"),
    DIVERGED: ("∞", "red"),
    MISSING: ("·", "dim"),
}
LEGEND = "  ".join(f"{mark} {name}" for name, (mark, _) in MARKS.items())


def overview(table: Table, jobs: dict[tuple[str, str, int], Job]) -> Grid:
    """A mark for every row, column and seed."""
    grid = Grid(f"{table.name}, {table.scale}", *table.columns, box=None, pad_edge=False, padding=(0, 2))
    for row in table.rows:
        cells = []
        for column in table.columns:
            marks = [MARKS[state(jobs[row, column, seed])[0]] for seed in table.seeds]
            cells.append(Text.assemble(*[(f"{mark} ", style) for mark, style in marks]))
        grid.add_row(row, *cells)
    return grid


def counts(jobs: list[Job]) -> str:
    """6 trainings, 2 evaluations: 4 done, 4 missing"""
    trainings = sum(not job.evaluation for job in jobs)
    listed = ", ".join(f"{count} {name}" for name, count in Counter(state(job)[0] for job in jobs).items())
    return f"{trainings} trainings, {len(jobs) - trainings} evaluations: {listed}"


def describe(job: Job, state: str, reason: str) -> str:
    log = f"  log {job.log}" if state in (FAILED, DIVERGED) else ""
    return f"{state:<12}{job.name}{'  ' + reason if reason else ''}{log}"


def watch(print: Callable[[str], None]) -> Callable[[Launcher, str, JobState], None]:
    """What `Launcher.run` calls with its events."""

    def show(launcher: Launcher, event: str, one: JobState) -> None:
        if event == "start":
            print(f"start       {one.job.name}  ({one.slot})")
        elif event == "stop":
            print(f"stopping    {one.job.name}")
        else:
            text, over = describe(one.job, one.state, one.reason), sum(other.over for other in launcher.states)
            if one.state == DONE:
                result = RunDirectory(one.job.run).read_json(one.job.result)
                metric = Metric(**result["metrics"][0])
                text += f"  {metric.format(result[metric.key])}"
            took = f"  {clock(time.monotonic() - one.started)}" if one.started else ""
            print(f"{text}{took}  [{over}/{len(launcher.states)}]")

    return show
