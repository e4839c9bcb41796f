"""Processes for the tests that need processes of their own, forked from a server that has imported torch already: a
start takes milliseconds instead of seconds."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "timm", "sklearn.datasets", "wandb", "dropkey.session"])


@dataclass
class Finished:
    """As subprocess.CompletedProcess: `returncode` is minus the signal's number where a signal ended it."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def run(function: Callable, *args, env: dict[str, str] | None = None, timeout: float = 120) -> Finished:
    """Calls `function(*args)` in a process of its own; `sys.exit` inside gives the return code."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        began = time.monotonic()
        process = start(streams, function, *args, env=env)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(streams[1].read_text())
        texts = [stream.read_text() if stream.exists() else "" for stream in streams]
        return Finished(process.exitcode, *texts, time.monotonic() - began)


def start(streams: list[Path], function: Callable, *args, env: dict[str, str] | None = None):
    """The same without waiting for its end; `streams` are the files that receive its standard output and error."""
    process = SERVER.Process(target=_inside, args=(streams, {**os.environ, **(env or {})}, function, args))
    process.start()
    return process


def _inside(streams: list[Path], env: dict[str, str], function: Callable, args: tuple) -> None:
    import torch

    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def torchrun(function: Callable, *args, processes: int = 2, restarts: int = 0, timeout: float = 120) -> Finished:
    """The same under torchrun's agent, in `processes` workers with RANK and so on in their environment."""
    return run(agent, function, args, processes, restarts, timeout=timeout)


def agent(function: Callable, args: tuple, processes: int, restarts: int = 0) -> None:
    """torchrun's own code, for `start` and `run`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
    )
    try:
        elastic_launch(config, function)(*args)
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
