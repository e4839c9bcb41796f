"""Console output of a training: a progress bar on a terminal, one line per epoch, and the same lines in log.txt."""

from typing import Callable, Optional, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dropkey.metrics import Metric
from dropkey.records import clock


class Progress:
    """The console and log of a training; silent in all processes but the first.

    Args:
        epochs: in all.
        metrics: those shown after each evaluation.
        log: also receives each line.
        show: False silences it.
    """

    def __init__(
        self,
        epochs: int,
        metrics: Sequence[Metric] = (),
        log: Callable[[str], None] = lambda text: None,
        show: bool = True,
    ):
        self.epochs, self.metrics, self.log, self.show = epochs, metrics, log, show
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
        self.close()
        text = f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}  train loss {record['train_loss']:.4f}"
        for metric in self.metrics:
            if (value := record.get(f"eval_{metric.key}")) is not None:
                text += f"  {metric.format(value)}"
        self.info(f"{text}  {record['samples_per_second']:,.0f} samples/s  {clock(record['seconds'])}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.bar = None
