"""Shows a table's progress: marks for the plan, and a live view of a launcher (or a line per event in a log)."""

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from dropkey.metrics import Metric
from dropkey.records import RunDirectory, clock
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, MISSING, RUNNING, Job, state
from dropkey.reproduction.plan import progress
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
REFRESH = 1.0  # seconds


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


def describe(job: Job, state: str, reason: str) -> str:
    log = f"  log {job.log}" if state in (FAILED, DIVERGED) else ""
    return f"{state:<12}{job.name}{'  ' + reason if reason else ''}{log}"


class Watch:
    """What `Launcher.run` reports to."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.started, self.shown = time.monotonic(), 0.0
        self.durations: list[float] = []

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def __call__(self, launcher: Launcher, event: str, one: JobState | None) -> None:
        if event == "start" and not self.live:
            self.print(f"start       {one.job.name}  ({one.slot})")
        if event == "stop":
            self.print(f"stopping    {one.job.name}")
        if event == "end":
            over = sum(other.over for other in launcher.states)
            text = describe(one.job, one.state, one.reason)
            self.print(f"{text}{self.result(one)}  [{over}/{len(launcher.states)}]")
        if event == "tick" and self.live and time.monotonic() - self.shown > REFRESH:
            self.shown = time.monotonic()
            self.live.update(self.view(launcher), refresh=True)

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def result(self, one: JobState) -> str:
        if one.state != DONE:
            return ""
        content = RunDirectory(one.job.run).read_json(one.job.result)
        metric = Metric(**content["metrics"][0])
        if not one.started:
            return f"  {metric.format(content[metric.key])}"
        self.durations.append(time.monotonic() - one.started)
        return f"  {metric.format(content[metric.key])}  {clock(self.durations[-1])}"

    def view(self, launcher: Launcher) -> Group:
        states, running = launcher.states, [one for one in launcher.states if one.process is not None]
        over = sum(one.over for one in states)
        title = f"{self.title}  {over}/{len(states)} over, {clock(time.monotonic() - self.started)} so far"
        if self.durations:
            average = sum(self.durations) / len(self.durations)
            title += f", about {clock((len(states) - over) * average / len(launcher.slots))} left"
        grid = Grid(
            "run", "slot", "epoch", "training loss", "samples/s", "time", box=None, pad_edge=False, padding=(0, 2)
        )
        for one in running:
            epoch, last = (0, None) if one.job.evaluation else progress(one.job)
            loss = [f"{last['train_loss']:.4f}", f"{last['samples_per_second']:,.0f}"] if last else ["", ""]
            epochs = "" if one.job.evaluation else f"{epoch}/{one.job.config.trainer.epochs}"
            grid.add_row(one.job.name, str(one.slot), epochs, *loss, clock(time.monotonic() - one.started))
        return Group(Text(title, style="bold"), grid)


def counts(jobs: list[Job]) -> str:
    """6 trainings, 2 evaluations: 4 done, 4 missing"""
    trainings = sum(not job.evaluation for job in jobs)
    listed = ", ".join(f"{count} {name}" for name, count in Counter(state(job)[0] for job in jobs).items())
    return f"{trainings} trainings, {len(jobs) - trainings} evaluations: {listed}"
