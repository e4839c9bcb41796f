"""The training that the soak kills: its settings, and how its two processes are started."""

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import processes
from soak.watching import Family

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"))
BASE = (
    *("model.depth=2", "model.embed_dim=32", "model.num_heads=2", "model.drop_path=0.2", "regularizer.ratio=0.3"),
    *("data.max_train_samples=480", "data.in_memory=false", "data.num_workers=1", "logger=none"),
    *("augment.mixup=0.8", "augment.cutmix=1.0", "augment.crop_padding=1", "augment.random_erasing=0.25"),
    *("trainer.batch_size=64", "trainer.grad_accum_steps=2", "trainer.ema_decay=0.95", "trainer.log_every=1"),
    "optim.clip_grad_norm=1.0",
)
PR_SET_PDEATHSIG = 1  # of Linux
WITHIN = "trainer.checkpoint_minutes=0.02"  # so that there are checkpoints within epochs too


@dataclass
class Life:
    """One start of the command, until all its processes are gone."""

    family: Family
    streams: list[Path]
    wait: Callable[[], int]  # for its own end: the exit code

    @property
    def errors(self) -> str:
        return self.streams[1].read_text(errors="replace")


def words_of(output: Path, epochs: int) -> list[str]:
    return [*BASE, WITHIN, f"trainer.epochs={epochs}", f"output={output}"]


def rank(words: list[str]) -> None:
    """train.py in a process that torchrun's agent has forked. As those that torchrun starts from a command, it is not
    told when the agent is killed (torch would send SIGINT, even twice), and does not wait for it at its end."""
    from dropkey import cli
    from dropkey.commands import train

    agent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    sys.argv = ["train.py", *words]
    with cli.command():
        train.main()
    if os.getppid() != agent:
        sys.stdout.flush()
        os._exit(0)


def start(words: list[str], place: Path, name: str, forked: bool) -> Life:
    """`forked`: torchrun's agent and its processes are forks of one that has imported torch; they start in seconds.
    Otherwise the command itself, as a user types it."""
    streams = [place / f"{name}.out", place / f"{name}.err"]
    if forked:
        process = processes.start(streams, processes.agent, rank, (words,), 2)

        def wait() -> int:
            process.join()
            return process.exitcode

    else:
        with open(streams[0], "w") as out, open(streams[1], "w") as err:
            process = subprocess.Popen([*TORCHRUN, *words], stdout=out, stderr=err, cwd=place, start_new_session=True)
        wait = process.wait
    return Life(Family(process.pid), streams, wait)
