"""What a person sees of a training: a bar on a terminal, a line per epoch everywhere, the same lines in log.txt."""

from typing import Callable, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dropkey.records import clock


class Progress:
    """NoOpTracker in all processes but the first.

    Args:
        epochs: in all.
        log: receives each line too.
        show: False silences it.
    """

    def __init__(self, epochs: int, log: Callable[[str], None] = lambda text: None, show: bool = True):
        self.epochs, self.log, self.show = epochs, log, show
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Optional[Bar] = None

    def info(self, text: str, *, quiet: bool = False) -> None:
        if self.show and not quiet:
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
        if "eval_top1" in record:
            text += f"  top-1 {record['eval_top1']:6.2f} %  loss {record['eval_loss']:.4f}"
        self.info(f"{text}  {record['images_per_second']:,.0f} images/s  {clock(record['seconds'])}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.bar = None
