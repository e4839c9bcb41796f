"""Errors that end a run with one clear line. Each class carries the process's exit code."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator


class RunError(Exception):
    """Base class.

    Attributes:
        exit_code: what the process returns.
        one_process: whether only this process of a job knows the error, so that it must print it itself.
    """

    exit_code = 1
    one_process = False

    def __str__(self) -> str:
        """Without what nobody reads: the middle of a word of several hundred letters."""
        return re.sub(r"(\S{60})\S{300,}(\S{20})", r"\1...\2", str(self.args[0]))


class ConfigError(RunError):
    """A key, value or combination of the config that cannot work."""

    exit_code = 2


class DataError(RunError):
    """Images that are missing, unreadable, or unlike what the config says of them."""

    exit_code = 3


class Diverged(RunError):
    """Loss or gradient is NaN or infinite."""

    exit_code = 4


class StorageError(RunError):
    """A checkpoint or record that cannot be written or read."""

    exit_code = 5


class Busy(RunError):
    """Another process is training the same run."""

    exit_code = 6


class Interrupted(RunError):
    """A signal asked the run to stop; its state is saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)  # what pickle calls the class with
        self.exit_code = 128 + signal_number


class PeerLost(RunError):
    """Another process of a torchrun job ended, for a reason that it gives itself."""


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """In `dropkey train --help | head -3`, `head` leaves first. The program then ends silently, with the exit code of
    SIGPIPE, as others do."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(128 + signal.SIGPIPE)
