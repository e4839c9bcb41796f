"""Errors that end a run with one clear line. Each class carries the process's exit code."""

import contextlib
import errno
import io
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


# ---------------------------------------------------------------------------------------- the edge of every command

REMEDIES = {
    errno.EACCES: "take a place that you may use, or change its permissions",
    errno.EPERM: "take a place that you may use, or change its permissions",
    errno.EROFS: "take a place that can be written",
    errno.ENOSPC: "make room, and the same command goes on",
    errno.EDQUOT: "make room, and the same command goes on",
    errno.ENOTDIR: "a file is where a directory should be; move it, or take another path",
    errno.EEXIST: "a file is where a directory should be; move it, or take another path",
    errno.EISDIR: "a directory is where a file should be; move it, or take another path",
    errno.ELOOP: "links lead in a circle, or may not be followed here; remove the link",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ENOENT: "it is missing, or was removed meanwhile",
    errno.EMFILE: "raise the limit (ulimit -n 4096), or lower data.num_workers",
    errno.ENFILE: "close other programs, or lower data.num_workers",
}


def explained(error: OSError) -> str:
    """What the operating system refused, in one line: the path, the reason and the remedy."""
    path = error.filename if error.filename2 is None else error.filename2
    path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    where = f"{path if len(path) <= 500 else path[:100] + '...' + path[-100:]}: " if path else ""
    reason = error.strerror or next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
    remedy = REMEDIES.get(error.errno)
    return f"{where}{reason}" + (f"; {remedy}" if remedy else "")


def known(error: BaseException) -> RunError | None:
    """The RunError for an exception from outside this program; None for one that is a mistake of the program."""
    if isinstance(error, RunError):
        return error
    found = None
    if isinstance(error, OSError) and error.errno is not None:  # Hydra's MissingConfigException is one without
        found = StorageError(explained(error))
    elif isinstance(error, ValueError) and "null byte" in str(error):
        found = StorageError("a path has a NUL character in it; take it out")
    elif isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # torch raises it at any moment
        reason = " ".join(str(error).splitlines()[0].split()).rstrip(".")
        found = DataError(f"{reason}, perhaps for lack of memory; the same command goes on, lower data.num_workers")
    if found is not None:
        found.one_process = True  # perhaps: nobody else says it then
    return found


@contextlib.contextmanager
def edge() -> Iterator[None]:
    """Wraps a whole command: prints take any text, and a failure of the operating system is a RunError.

    In `dropkey train --help | head -3`, `head` leaves first. The program then ends silently, with the exit code of
    SIGPIPE, as others do.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it is flushed first
                stream.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal has not
    try:
        yield
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except BaseException as error:
        failure = known(error)
        if failure is None and not getattr(error, "code", 1):  # sys.exit(0), as after --help
            flush()
            raise
        with contextlib.suppress(RunError, SystemExit):  # the failure itself matters more
            flush()
        if failure is None or failure is error:
            raise
        raise failure from error
    flush()


def flush() -> None:
    """Writes what was printed. Ends the process where nobody reads it; StorageError where it has no room."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        discard(sys.stdout)
        raise StorageError(f"the output could not be written: {explained(error)}") from error


def discard(stream) -> None:
    """What is written to the stream from now on is lost; Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Unread:
    """A stream for the lines of a training, which are in its log too: it goes on when nobody reads them any more, as in
    `dropkey train | head`, or when they have no room."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.lost():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.lost():
            self.stream.flush()

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            discard(self.stream)
            if not isinstance(error, BrokenPipeError):
                say(f"the output is lost ({error.strerror}); the training goes on, its lines are in log.txt")


def say(line: str) -> None:
    """A line on stderr, if that can be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
