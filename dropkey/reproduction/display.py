"""Shows a table's progress: marks for the plan, and a line for every event of a launcher."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Optional

from rich.table import Table as Grid
from rich.text import Text

from dropkey.metrics import Metric
from dropkey.records import RunDirectory, clock
from dropkey.reproduction import content, tuning
from dropkey.reproduction.comparison import Comparison
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


def overview(table: Table, jobs: dict[tuple[str, str, int], Job], recorded: dict[Job, dict]) -> Grid:
    """A mark for every row, column and seed; a question mark where tuning has not chosen yet. `recorded`: jobs that
    are finished although their runs are gone."""

    def mark(job: Optional[Job]) -> tuple[str, str]:
        return MARKS[DONE if job in recorded else state(job)[0]] if job else ("?", "dim")

    grid = Grid(f"{table.name}, {table.scale}", *table.columns, box=None, pad_edge=False, padding=(0, 2))
    for row in table.rows:
        cells = []
        for column in table.columns:
            marks = [mark(jobs.get((row, column, seed))) for seed in table.seeds]
            space = " " if len(marks) <= 8 else ""
            cells.append(Text.assemble(*[(f"{mark}{space}", style) for mark, style in marks]))
        grid.add_row(row, *cells)
    return grid


def counts(jobs: list[Job], recorded: int) -> str:
    """6 trainings, 2 evaluations: 4 done, 4 missing; 3 more are finished in the records"""
    trainings = sum(not job.evaluation for job in jobs)
    listed = ", ".join(f"{count} {name}" for name, count in Counter(state(job)[0] for job in jobs).items())
    text = f"{trainings} trainings, {len(jobs) - trainings} evaluations: {listed}"
    return f"{text}; {recorded} more are finished in the records" if recorded else text


def tuned(table: Table, records: list[dict]) -> list[str]:
    """What tuning has chosen, or how much of it is left."""
    missing = tuning.missing(table, records)
    if missing:
        return [f"tuning: {missing} runs are missing; rows marked ? follow"]
    return [f"{row}, {column}: {' '.join(overrides)}" for (row, column), overrides in table.chosen.items()]


def power(lines: list[list[str]], delta: float, chance: float) -> Grid:
    """What `planning.power` has found."""
    head = ("claim", "deviation", "seeds", f"first of {len(lines)}", "equivalence", "hours")
    title = f"to find a difference of {delta} with a chance of {100 * chance:.0f} %, or equivalence within the margin"
    grid = Grid(*head, title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2))
    for line in lines:
        grid.add_row(*line)
    return grid


def decisions(comparison: Comparison) -> str:
    """After a look: what is decided."""
    lines = [f"after {len(comparison.table.seeds)} seeds:"]
    for found in comparison.findings:
        one = found.decision.estimate
        shown = f"{content.number(one.mean, comparison.metric.digits, '+')}, " if one else ""
        lines.append(f"  {found.claim}: {shown}{content.verdict(comparison, found)}")
    return "\n".join(lines)


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
