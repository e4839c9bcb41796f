"""Shows a table's progress: marks for the plan, and a line for every event of a launcher."""

import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dropkey.metrics import Metric
from dropkey.records import RunDirectory, clock
from dropkey.reproduction import content, planning, tuning
from dropkey.reproduction.comparison import Comparison
from dropkey.reproduction.cost import Cost
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
SHOWN = 8  # seeds with a mark each
GAP = 2  # blanks between columns
NARROWEST = 20  # columns of a row's name in a plan, which may be cut to these
SHORTEST = 12  # the same in an event's line
LEGEND = "  ".join(f"{mark} {name}" for name, (mark, _) in MARKS.items())


def overview(table: Table, jobs: dict[tuple[str, str, int], Job], recorded: dict[Job, dict], width: int) -> list[Grid]:
    """A mark for every row, column and seed, or their counts where seeds are many; a question mark where tuning has not
    chosen yet. In a narrow terminal headers take several lines, long rows lose their middle, and what columns still do
    not fit follow below.

    Args:
        recorded: jobs that are finished although their runs are gone.
        width: of the terminal.
    """

    def marks(row: str, column: str) -> Text:
        found = [jobs.get((row, column, seed)) for seed in table.seeds]
        states = [job and (DONE if job in recorded else state(job)[0]) for job in found]
        shown = [MARKS[one] if one else ("?", "dim") for one in states]
        if len(shown) > SHOWN:
            shown = [(f"{count}{mark}", style) for (mark, style), count in Counter(shown).items()]
        return Text(" ").join(Text(*one) for one in shown)

    cells = {column: [marks(row, column) for row in table.rows] for column in table.columns}
    names = max(map(len, table.rows))
    least = {column: max(map(len, [*column.split(), *found])) for column, found in cells.items()}
    whole = {column: max(len(column), size) for column, size in least.items()}
    sizes = whole if names + sum(GAP + size for size in whole.values()) <= width else least
    blocks, room = [], 0
    for column, size in sizes.items():
        if room < GAP + size:
            blocks, room = [*blocks, []], width - min(names, NARROWEST)
        blocks[-1].append(column)
        room -= GAP + size
    return [grid(table, {column: (sizes[column], cells[column]) for column in block}, width) for block in blocks]


def grid(table: Table, columns: dict[str, tuple[int, list[Text]]], width: int) -> Grid:
    """Rows and some of the columns, each with its width and its cells."""
    names = max(width - sum(GAP + size for size, _ in columns.values()), NARROWEST)
    headers = ["\n".join(textwrap.wrap(column, size)) for column, (size, _) in columns.items()]
    found = Grid(cut(f"{table.name}, {table.scale}", names), *headers, box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for number, row in enumerate(table.rows):
        found.add_row(cut(row, names), *(cells[number] for _, cells in columns.values()))
    return found


def cut(text: str, width: int) -> str:
    """Long text without its middle: DropKey, con…ramp's mean"""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


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


def cost(found: list[Cost], unknown: int, tflops: float, utilisation: float, price: float) -> Grid:
    """What `cost.costs` has found, with sums."""
    title = f"on paper, at {100 * utilisation:g} % of {tflops:g} TFLOPS, without evaluation and reading"
    head = ("column", "GFLOP/sample", "samples", "GPU h/run", "runs", "GPU h", "GiB", *(["price"] if price else []))
    grid = Grid(*head, title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2))

    def sums(some: list[Cost]) -> list[str]:
        runs, hours = sum(one.runs for one in some), sum(one.hours * one.runs for one in some)
        gib = sum(one.gib * one.runs for one in some)
        return [str(runs), f"{hours:,.0f}", f"{gib:,.1f}", *([f"{hours * price:,.0f}"] if price else [])]

    for one in found:
        grid.add_row(one.column, f"{one.gflop:.3g}", f"{one.samples / 1e6:,.3g} M", f"{one.hours:,.3g}", *sums([one]))
    grid.add_row("all", "", "", "", *sums(found))
    if unknown:
        grid.caption = f"and {unknown} runs on as many samples as only their task or data tell"
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
    """A job that is not done, why, and where its output is."""
    lines = [f"{state:<6} {job.label}", *([reason] if reason else [])]
    return "\n       ".join([*lines, *([f"log {job.log}"] if state in (FAILED, DIVERGED) else [])])


def watch(console: Console, others: Sequence[Job] = ()) -> Callable[[Launcher, str, JobState], None]:
    """What `Launcher.run` calls with its events: a line for each, which fits the terminal. `others`: see
    `planning.time_left`."""

    def show(launcher: Launcher, event: str, one: JobState) -> None:
        parts, word, left = [], {"start": "start", "stop": "stopping"}.get(event, one.state), None
        if event == "start" and one.slot.gpus:
            parts.append(str(one.slot))
        if event == "end" and one.state == DONE:
            result = RunDirectory(one.job.run).read_json(one.job.result)
            metric = Metric(**result["metrics"][0])
            parts.append(f"{result[metric.key]:.{metric.digits}f} {metric.unit}".rstrip())
        if event == "end" and one.started:
            parts.append(clock(time.monotonic() - one.started))
        if event != "stop":
            left = planning.time_left(launcher, others)
        over = f"{sum(other.over for other in launcher.states)}/{len(launcher.states)}"
        parts.append(f"[{over}, about {clock(left)} left]" if left else f"[{over}]")
        end = "".join(f"  {part}" for part in parts)
        row, *seed = one.job.cell or (one.job.name,)
        label = " · ".join([row, *seed])
        if console.is_terminal or "COLUMNS" in os.environ:  # in a file, lines may be long
            room = console.width - len(f"{word:<6} ") - len(end) - (len(label) - len(row))
            label = " · ".join([cut(row, max(room, SHORTEST)), *seed])
        console.print(f"{word:<6} {label}{end}")
        if one.state in (FAILED, DIVERGED):
            console.print("\n".join(describe(one.job, one.state, one.reason).split("\n")[1:]))

    return show
