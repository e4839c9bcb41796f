"""What test_distributed.py starts under torchrun: a small run in which one rank may be signalled at one step.

Usage: distributed_run.py <output> <signal>:<step>:<rank> <override>...
0:0:0 for no signal; "signal" -1 stands for an unreadable image.
"""

# ruff: noqa: E402
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import runs
import train
from dropkey import plotting
from dropkey.config import compose
from dropkey.engine import trainer
from dropkey.errors import DataError


def main() -> None:
    output, event, *words = sys.argv[1:]
    number, step, rank = (int(part) for part in event.split(":"))
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    original = trainer.Trainer.count

    def count(self, loss, seconds):
        original(self, loss, seconds)
        if number and first_life and self.dist.rank == rank and self.state.position.global_step == step:
            if number == -1:
                raise DataError("images/broken.png cannot be read")
            os.kill(os.getpid(), number)

    trainer.Trainer.count = count
    plotting.curves = lambda *args: None
    sys.argv = ["train.py", *runs.SMALL, f"output={output}", *words]
    compose.launch("train", train.main)


if __name__ == "__main__":
    main()
