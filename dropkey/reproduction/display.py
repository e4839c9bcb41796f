"""How a table stands, for people: the plan, and a live view while it runs (a line per event without a terminal)."""

import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Box
from rich.text import Text

from dropkey.records import RunDirectory, clock
from dropkey.reproduction.jobs import DIVERGED, DONE, FAILED, INTERRUPTED, MISSING, RUNNING, Job, state
from dropkey.reproduction.plan import progress
from dropkey.reproduction.runner import ELSEWHERE, WAITING, JobState, Launcher
from dropkey.reproduction.tables import Table

MARKS = {
    DONE: ("✓", "green"),
    RUNNING: ("▶", "cyan"),
    ELSEWHERE: ("▷", "cyan"),
    INTERRUPTED: ("‖", "yellow"),
    FAILED: ("✗", "red"),
    DIVERGED: ("∞", "red"),
    MISSING: ("·", "dim"),
    WAITING: ("·", "dim"),
}
REFRESH = 1.0  # seconds


def overview(table: Table, jobs: dict[tuple[str, str, int], Job]) -> Box:
    """A mark for every row, column and seed."""
    box = Box(box=None, pad_edge=False, padding=(0, 2))
    box.add_column(f"{table.name}, {table.scale}", no_wrap=True)
    for column in table.columns:
        box.add_column(column)
    for row in table.rows:
        cells = []
        for column in table.columns:
            marks = [MARKS[state(jobs[row, column, seed])[0]] for seed in table.seeds]
            cells.append(Text.assemble(*[(f"{mark} ", style) for mark, style in marks]))
        box.add_row(row, *cells)
    return box


def legend() -> str:
    names = (DONE, RUNNING, INTERRUPTED, FAILED, DIVERGED, MISSING)
    return "  ".join(f"{MARKS[name][0]} {name}" for name in names)


def describe(item: JobState) -> str:
    where = f"  {item.reason}" if item.reason else ""
    log = f"  log {item.job.log}" if item.state in (FAILED, DIVERGED) else ""
    return f"{item.state:<12}{item.job.name}{where}{log}"


class Watch:
    """What `Launcher.run` reports to."""

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.began, self.shown = time.monotonic(), 0.0
        self.took: list[float] = []

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def __call__(self, launcher: Launcher, event: str, item: JobState | None) -> None:
        if event == "start" and not self.live:
            self.say(f"start       {item.job.name}  ({item.slot})")
        if event == "stop":
            self.say(f"stopping    {item.job.name}")
        if event == "end":
            done = sum(one.over for one in launcher.items)
            if item.state == DONE and item.began:
                self.took.append(time.monotonic() - item.began)
            self.say(f"{describe(item)}{self.result(item)}  [{done}/{len(launcher.items)}]")
        if event == "tick" and self.live and time.monotonic() - self.shown > REFRESH:
            self.shown = time.monotonic()
            self.live.update(self.view(launcher), refresh=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def result(self, item: JobState) -> str:
        if item.state != DONE:
            return ""
        top1 = RunDirectory(item.job.run).read_json(item.job.result)["top1"]
        return f"  top-1 {top1:.2f} %" + (f"  {clock(time.monotonic() - item.began)}" if item.began else "")

    def view(self, launcher: Launcher) -> Group:
        counts = Counter(item.state for item in launcher.items)
        done = counts[DONE] + counts[FAILED] + counts[DIVERGED]
        parts = [f"{self.title}  {done}/{len(launcher.items)} over, {clock(time.monotonic() - self.began)} so far"]
        if self.took:
            left = len(launcher.items) - done
            average = sum(self.took) / len(self.took)
            parts.append(f"about {clock(left * average / len(launcher.slots))} left")
        box = Box(box=None, pad_edge=False, padding=(0, 2))
        for name in ("run", "where", "epoch", "training loss", "images/s", "time"):
            box.add_column(name, style="cyan" if name == "run" else "", no_wrap=True)
        for item in launcher.items:
            if item.process is not None:
                epoch, last = progress(item.job) if item.job.script == "train.py" else (0, None)
                figures = [f"{last['train_loss']:.4f}", f"{last['samples_per_second']:,.0f}"] if last else ["", ""]
                epochs = f"{epoch}/{item.job.composed.epochs}" if item.job.script == "train.py" else ""
                box.add_row(item.job.name, str(item.slot), epochs, *figures, clock(time.monotonic() - item.began))
        return Group(Text(", ".join(parts), style="bold"), box)
