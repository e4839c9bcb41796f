"""Jobs as processes forked from one that has imported torch: a start then takes a tenth of a second, not seconds."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Callable, Optional

from dropkey.reproduction.runner import LocalProcess

WORTH_IT = 3  # jobs; the parent itself takes as long to start as one of them
PARENT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def starter(jobs: int, environment: dict[str, str]) -> Callable:
    """How so many jobs are started on this machine: (command, environment, log file) -> process."""
    if sys.platform != "linux" or jobs < WORTH_IT:
        return LocalProcess
    PARENT.set_forkserver_preload(["dropkey.commands.preload"])
    own = os.environ.copy()
    os.environ.update(environment)  # OMP_NUM_THREADS is read when the parent loads torch
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(own)
    return start


def start(command: list[str], environment: dict[str, str], log: Path) -> "LocalProcess | ForkedProcess":
    several = "torch.distributed.run" in command  # torchrun starts processes of its own
    return (LocalProcess if several else ForkedProcess)(command, environment, log)


class ForkedProcess:
    """`command` (of this Python) in a session of its own, as `LocalProcess`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.process = PARENT.Process(target=become, args=(command[1:], environment, str(log)))
        self.process.start()

    def poll(self) -> Optional[int]:
        return self.process.exitcode

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()


def become(words: list[str], environment: dict[str, str], log: str) -> None:
    """Runs in the forked process: what `python *words` would do there."""
    import torch

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while words[0].startswith("-") and words[0] != "-m":
        words = words[1:]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
