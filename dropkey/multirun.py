"""The table that ends `dropkey train -m`: what each job has reached, failures last."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Iterator

from dropkey.config.run_lookup import default_root
from dropkey.run_table import read, show

JOBS = "DROPKEY_MULTIRUN"  # in the environment: the file in which jobs note their runs


@contextlib.contextmanager
def table_of_jobs() -> Iterator[None]:
    """Within, jobs of a multirun, in whatever process, note their runs in a file; at the end these are listed."""
    if not {"-m", "--multirun"} & set(sys.argv):
        yield
        return
    output = next((word.partition("=")[2] for word in sys.argv if word.startswith("output=")), None)
    file = Path(output or default_root()).resolve() / ".multirun" / f"{os.getpid()}-{time.time_ns()}.txt"
    os.environ[JOBS] = str(file)
    try:
        yield
    finally:
        del os.environ[JOBS]
        if file.exists():
            paths = dict.fromkeys(map(Path, file.read_text().splitlines()))
            file.unlink()
            print()
            show([read(path) for path in paths if (path / "config.yaml").exists()])


def note_job(run: Path) -> None:
    if JOBS in os.environ:
        file = Path(os.environ[JOBS])
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as lines:
            lines.write(f"{run.resolve()}\n")


def is_job() -> bool:
    return JOBS in os.environ
