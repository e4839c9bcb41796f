"""What test_distributed.py runs in each process: a small training in which one rank may be signalled at one step."""

import os
import sys
from typing import Optional

import runs
from dropkey import cli, plotting
from dropkey.engine import trainer
from dropkey.engine.trainer import Trainer
from dropkey.errors import DataError


def main(output: str, overrides: tuple[str, ...], event: Optional[tuple[int, int, int]] = None) -> None:
    """`event`: (signal, step, rank), for the first life of that rank; signal -1 stands for an unreadable image."""
    from dropkey.commands import train

    original = Trainer.step

    def step(self, microbatches):
        begun = original(self, microbatches)
        if event and first_life and (self.dist.rank, self.state.position.global_step) == (event[2], event[1]):
            if event[0] == -1:
                raise DataError("images/broken.png cannot be read")
            os.kill(os.getpid(), event[0])
        return begun

    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    Trainer.step = step
    trainer.MEETING_SECONDS = 0.0  # each step
    plotting.curves = lambda *args: None
    sys.argv = ["train.py", *runs.SMALL, f"output={output}", *overrides]
    with cli.command():
        train.main()
