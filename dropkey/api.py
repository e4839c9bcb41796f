"""Training from Python: `run = dropkey.train(["regularizer=dropkey", "seed=1"])`."""

from pathlib import Path
from typing import Sequence

from dropkey.commands import train as command
from dropkey.config import compose
from dropkey.config.check import check
from dropkey.config.identity import run_directory
from dropkey.config.schema import TrainConfig
from dropkey.records import RunDirectory, headline


class Run:
    """A run on disk.

    Attributes:
        path: its directory.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.directory = RunDirectory(self.path)

    @property
    def config(self) -> TrainConfig:
        return compose.load(self.directory.config)

    @property
    def summary(self) -> dict:
        """summary.json: the figures on the test split, percent and nats; {} before the end of training."""
        return self.directory.summary()

    @property
    def history(self):
        """A row for each epoch: loss in training, metrics on the watched split, seconds. A pandas.DataFrame where
        pandas is installed, otherwise a list of dictionaries."""
        records = self.directory.records("epoch")
        try:
            import pandas
        except ModuleNotFoundError:
            return records
        return pandas.DataFrame(records).set_index("epoch") if records else pandas.DataFrame()

    @property
    def model(self):
        """The trained model in evaluation mode, with the weights of the last epoch; see `dropkey.load` for more."""
        from dropkey.loading import load

        return load(self.path).model

    def __repr__(self) -> str:
        return f"Run({self.path.name}: {headline(self.summary) if self.summary else self.directory.status()})"


def train(config: Sequence[str] | TrainConfig = ()) -> Run:
    """Trains a run in this process, or finds it where it is finished, exactly as `dropkey train <overrides>` does.

    Args:
        config: overrides such as "model=vit_6x64" and "optim.lr=1e-3", or what `dropkey.compose` has made of them.
    Raises:
        dropkey.errors.RunError: in one line, what was wrong or what stopped it. Interrupted (Ctrl-C) has saved the run:
            the same call goes on with it.
    """
    cfg = check(config if isinstance(config, TrainConfig) else compose.compose(list(config)))
    command.train(cfg)
    return Run(run_directory(cfg))
