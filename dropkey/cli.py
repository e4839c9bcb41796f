"""The command line's edge: a failure becomes one line on stderr and the exit code of its class."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Iterator, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dropkey.config.compose import REFUSALS, explain
from dropkey.config.schema import TrainConfig
from dropkey.errors import ConfigError, Interrupted, PeerLost, RunError, edge, known, say

GRACE = 1  # seconds until the first process ends with an error that all come to: torchrun would list one it had to end
PATIENCE = 30  # seconds that a process waits for torchrun to end it, when another one has the error to tell


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Wraps the body of a @hydra.main function.

    A failure is printed when it happens and ends the process. In a multirun only an interruption does: Hydra runs
    the other jobs first and then raises the first failure, which must survive pickling, in `command`.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed; see `edge`
        raise
    except Exception as error:
        failure = known(error)
        if failure is not None:
            report(failure)
        else:  # a mistake of this program
            traceback.print_exc()
            tell_torchrun(failure := RunError(f"{type(error).__name__}: {error}"))
        multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        if multirun and not isinstance(failure, Interrupted):
            raise failure from None
        sys.exit(failure.exit_code)


@contextlib.contextmanager
def command(schema: type = TrainConfig) -> Iterator[None]:
    """Wraps the call of a @hydra.main function; what its jobs have not printed is printed here."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises errors instead of printing them
    try:
        with edge(), short_refusals():
            yield
        return
    except KeyboardInterrupt:  # outside a training, where nothing is to be saved
        sys.exit(128 + signal.SIGINT)
    except RunError as error:
        failure = error
    except REFUSALS as error:
        failure = ConfigError(explain(error, schema))
    except RuntimeError as error:  # a launcher's, whose worker was killed
        failure = RunError(f"a job was lost ({str(error).splitlines()[0]}); the same command goes on with the rest")
    report(failure)
    sys.exit(failure.exit_code)


@contextlib.contextmanager
def short_refusals() -> Iterator[None]:
    """Hydra's parser of options refuses in one line, instead of eight."""

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists keys and options")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = refuse
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before


def report(error: RunError) -> None:
    """Prints once for all processes of torchrun: in the first one, or in the only one that knows.

    The others leave it to torchrun to end them, with code 0, or its report would list each of them, and bury the line.
    If nothing ends them, no other process knows of the error.
    """
    if not speaks(error):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        if isinstance(error, Interrupted):  # perhaps by torchrun, which does not ask twice
            return time.sleep(5)
        time.sleep(PATIENCE)
    prefix = "" if isinstance(error, Interrupted) else "error: "
    where = "" if is_first() else f"process {os.environ['RANK']}: "
    say(f"{prefix}{where}{error}")
    tell_torchrun(error)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not error.one_process and not isinstance(error, Interrupted):
        time.sleep(GRACE)


def speaks(error: RunError) -> bool:
    return error.one_process or (is_first() and not isinstance(error, PeerLost))


def tell_torchrun(error: RunError) -> None:
    """Puts the error at the end of torchrun's own report, which has thirty lines of its own before."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}))


def is_first() -> bool:
    """Whether this is the process of a torchrun job that prints."""
    return int(os.environ.get("RANK", 0)) == 0
