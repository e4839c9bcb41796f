"""Console output of a training: a progress bar on a terminal, one line per epoch, and the same lines in log.txt."""

from typing import Callable, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dropkey.metrics import Metric
from dropkey.records import clock


class Progress:
    """The console and log of a training; silent in all processes but the first.

    Args:
        epochs: in all.
        metric: shown after each evaluation.
        log: also receives each line.
        show: False silences it.
    Attributes:
        split: evaluated after each epoch.
    """

    def __init__(
        self,
        epochs: int,
        metric: Optional[Metric] = None,
        log: Callable[[str], None] = lambda text: None,
        show: bool = True,
    ):
        self.epochs, self.metric, self.log, self.show = epochs, metric, log, show
        self.split = "val"
        self.first: Optional[tuple[int, float]] = None  # epoch and seconds of this process's first line
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Optional[Bar] = None

    def info(self, text: str) -> None:
        if self.show:
            self.console.print(text, markup=False)
            self.log(text)

    def start_epoch(self, epoch: int, steps: int, done: int) -> None:
        if not (self.show and self.console.is_terminal):
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), console=self.console)
        self.bar.start()
        self.task = self.bar.add_task(f"epoch {epoch}/{self.epochs}", total=steps, completed=done, loss="")

    def advance(self, loss: float, lr: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=1, loss=f"loss {loss:.4f}, lr {lr:.2e}")

    def finish_epoch(self, record: dict) -> None:
        """One line of at most 80 columns; all other figures of the epoch are in metrics.jsonl and curves.png."""
        self.close()
        epoch, rate = record["epoch"], record["samples_per_second"]
        text = f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs}  loss {record['train_loss']:.4f}"
        if self.metric and (value := record.get(f"eval_{self.metric.key}")) is not None:
            text += f"  {self.split} {self.metric.format(value)}"
        text += f"  {rate:,.0f} samples/s" if rate else ""
        left = self.left(epoch, record["seconds"])
        self.info(text + (f"  {clock(left)} left" if left else f"  took {clock(record['seconds'])}"))

    def left(self, epoch: int, seconds: float) -> float:
        """Seconds until the last epoch ends, at the pace of this process, without its first epoch, which compiles and
        fills caches; at the pace of the whole run while there is no other."""
        before, at = self.first = self.first or (epoch, seconds)
        pace = (seconds - at) / (epoch - before) if epoch > before else seconds / epoch
        return pace * (self.epochs - epoch)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.bar = None
