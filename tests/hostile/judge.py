"""Runs one command in this process and says what is wrong with how it ended."""

import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from dropkey.invocation import CHECKOUT, COMMANDS

CODES = (0, 2, 3, 4, 5, 6)  # that commands document; 1 where a job of a table failed
LINES, CHARACTERS = 3, 2000  # of an error, at most
SECONDS = 2.0  # of the processor, until a refusal
HANGS = 60  # seconds


@dataclass(frozen=True)
class Case:
    """A command that somebody types by mistake, or in malice."""

    family: str
    command: str
    words: tuple[str, ...]
    key: str = ""  # what a refusal must name
    refused: bool = False  # whether the value makes no sense, so that it must not be taken
    real: bool = False  # whether the command trains for a step, which shows mistakes that only the model or data know

    def __str__(self) -> str:
        return " ".join(
            [self.command, *(word if len(word) < 80 else f"{word[:60]}...({len(word)})" for word in self.words)]
        )


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float  # of the processor
    escaped: str = ""  # the exception that nothing caught


class Hangs(BaseException):
    """No answer; no `except Exception` of a command takes it for its own."""


def hangs(*_) -> None:
    raise Hangs(f"no end after {HANGS} s")


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Standard output and error as Python opens them in a UTF-8 locale; what a command leaves behind is undone."""
    before, root = dict(os.environ), logging.getLogger()
    handlers, level, argv = root.handlers[:], root.level, sys.argv
    streams = [
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True) for errors in ("strict", "backslashreplace")
    ]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield tuple(streams)
    finally:
        root.handlers, root.level, sys.argv = handlers, level, argv
        os.environ.clear()
        os.environ.update(before)


def run(command: str, words: tuple[str, ...]) -> Ended:
    start = importlib.import_module(f"dropkey.commands.{command}").start
    code, escaped, began = 0, "", time.process_time()
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANGS)
    with captured() as (out, err):
        sys.argv = [str(CHECKOUT / (COMMANDS[command].script or command)), *words]
        try:
            start()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        except BaseException:  # a test's Ctrl-C too: it would be lost in a command that catches it
            escaped, code = traceback.format_exc(), 1
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return Ended(code, *texts, time.process_time() - began, escaped)


def names(case: Case, ended: Ended) -> bool:
    """Whether an error names the key or, where a file is at fault, the file."""
    value = case.words[-1].partition("=")[2].strip("'") if case.words else ""
    return case.key in ended.err or (ended.code == 5 and len(value) > 1 and value[:60] in ended.err)


def faults(case: Case, ended: Ended) -> list[str]:
    """What is wrong with how a command ended; nothing where it survived."""
    found = []
    err = ended.err
    if ended.escaped or "Traceback (most recent call last)" in err:
        text = (ended.escaped or err).strip().splitlines()
        place = [line.strip() for line in text if line.strip().startswith("File")][-1:]
        found.append(f"traceback: {text[-1][:200]} {' '.join(place)[-90:]}")
    elif ended.code not in CODES:
        found.append(f"exit code {ended.code}: {err[:200]}")
    elif ended.code == 0 and case.refused:
        found.append("taken")
    elif ended.code and not err.strip():
        found.append(f"exit code {ended.code} without a word")
    elif ended.code and not names(case, ended):
        found.append(f"{case.key} is not named: {err[:200]}")
    if not found and (err.count("\n") > LINES or len(err) > CHARACTERS):
        found.append(f"{err.count(chr(10))} lines, {len(err)} characters: {err[:200]}")
    if ended.code and not found and ended.seconds > SECONDS:
        found.append(f"{ended.seconds:.1f} s until the refusal")
    return found
